"""kill -9 of owner, reader, store node and index at each step of a put and of a get: the right tokens or a typed error that says
to try again, then the right tokens; nothing is left held, and what was torn is never served."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from cluster import Cluster
from index_servers import IndexServer, index_server
from mortal_role import ORDERS, order
from store_failures import StoreRow
from tiny_models import make_model

from engine.simulated_runner import next_token
from kv_store.admin import PATH
from protocol.store_admin import BlocksChanged, ClearStore
from runtime.rpc_client import RpcClient

BLOCK_SIZE = 16
PROMPT_BLOCKS = 32
NUM_TOKENS = 3
VOCAB_SIZE = 512
DEADLINE_S = 20
TRY_AGAIN = {"node_lost", "no_worker", "overloaded", "unavailable", "draining", "peer_lost"}
SETTINGS: dict[str, object] = {
    "model.runner": "simulated",
    "cache.block_size": BLOCK_SIZE,
    "cache.memory": "4MiB",
    "transfer.borrow": "always",
    "transfer.stall_timeout_s": 2.0,
    "store.host_memory": "4MiB",
    "store.write": "through",
    "store.admission": "all",
    "store.load": "always",
    "store.redis_budget_s": 0.2,
}
IN_PUT = [
    ("copy", "decode-0", "itself"),
    ("offer", "decode-0", "itself"),
    ("serve", "decode-0", "itself"),
    ("verify", "store-0", "itself"),
    ("publish", "store-0", "itself"),
    ("publish", "store-0", "index"),
]
"""Step, who comes to it, who dies."""

IN_GET = [
    ("lookup", "decode-0", "itself"),
    ("lend", "store-0", "itself"),
    ("read", "decode-0", "itself"),
    ("serve", "store-0", "itself"),
    ("verify", "decode-0", "itself"),
    ("release", "store-0", "itself"),
    ("lookup", "decode-0", "index"),
]


def prompt(number: int) -> list[int]:
    return [(7 * number + 3 * i) % 500 + 2 for i in range(PROMPT_BLOCKS * BLOCK_SIZE + 5)]


def expected(context: list[int]) -> list[int]:
    """Worked out by hand: tokens depend on the KV of the whole context."""
    tokens = list(context)
    for _ in range(NUM_TOKENS):
        tokens.append(next_token(tokens, VOCAB_SIZE))
    return tokens[len(context) :]


@dataclass
class Scene:
    """A decode node, a store node and an index, for all tests of this file: what died is started again."""

    cluster: Cluster
    server: IndexServer
    orders: Path
    num_prompts: int = 0

    def start_again(self) -> None:
        for name, process in list(self.cluster.processes.items()):
            if process.process.poll() is not None:
                process.close()
                self.cluster.expected_dead.add(name)
                self.cluster.start_node(process.role, name)
        if not self.server.running:
            self.server.kill()
            self.server.start()
        self.cluster.wait_ready()

    def metric(self, name: str, metric: str, **labels: str) -> float:
        return self.cluster.processes[name].metric(metric, **labels)

    async def until_found(self, context: list[int]) -> None:
        """Until the store has it, and the decode node knows."""
        deadline = time.monotonic() + DEADLINE_S
        while await outcome(self, context) != ("right", PROMPT_BLOCKS * BLOCK_SIZE):
            assert time.monotonic() < deadline, self.cluster.processes["store-0"].tail()
            await asyncio.sleep(0.3)  # the put is under way
            await self.forget()

    async def forget(self) -> None:
        """Have the decode node forget everything, on its device as well. What is being saved would stay, so wait for that."""
        await asyncio.to_thread(self.cluster.wait_idle)
        async with RpcClient(None) as client:
            await client.call(
                f"{self.cluster.processes['decode-0'].url}{PATH}/clear", ClearStore(None, None), BlocksChanged, 5.0
            )

    def order(self, step: str, at: str, victim: str) -> None:
        order(self.orders, step, at, self.server.pid if victim == "index" else None)

    async def until_dead(self, at: str, victim: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.server.running if victim == "index" else self.cluster.processes[at].process.poll() is None:
            assert time.monotonic() < deadline, f"{at} has not come to that step"
            await asyncio.sleep(0.02)

    async def begin(self) -> list[int]:
        """A new prompt, for a cluster that is well, whatever became of the test before."""
        for left in self.orders.iterdir():
            left.unlink()
        await asyncio.to_thread(self.start_again)
        self.num_prompts += 1
        return prompt(self.num_prompts)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("kills")
    orders = folder / "orders"
    orders.mkdir()
    model = make_model("llama", folder)
    router = {"worker_wait_s": 0.2}
    with index_server("valkey") as server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        settings = SETTINGS | {"store.redis": server.url}
        options = {"environment": {ORDERS: str(orders)}, "module": "tests.support.mortal_role"}
        with Cluster(
            folder,
            str(model),
            prefill=0,
            transport="tcp",
            settings=settings,
            decode_settings={"store.stores": json.dumps([f"http://127.0.0.1:{port}"])},
            router_settings=router,
            **options,
        ) as cluster:
            cluster.role_settings["store"] = {"port": port}
            cluster.start_node("store", "store-0")
            cluster.wait_ready()
            yield Scene(cluster, server, orders)


async def outcome(scene: Scene, context: list[int]) -> tuple[str, int]:
    """Of one request: "right", or the code of an error that says to try again; and how many tokens were cached."""
    body = {
        "model": "llama",
        "prompt": context,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    url = f"{scene.cluster.url}/v1/completions"
    async with (
        asyncio.timeout(DEADLINE_S),
        aiohttp.ClientSession() as session,
        session.post(url, json=body) as response,
    ):
        answer = await response.json()
    if response.status != 200:
        assert answer["error"]["code"] in TRY_AGAIN, answer
        return answer["error"]["code"], 0
    assert answer["choices"][0]["token_ids"] == expected(context), "wrong tokens"
    return "right", answer["usage"]["prompt_tokens_details"]["cached_tokens"]


async def check_after(scene: Scene, row: StoreRow, context: list[int]) -> None:
    """What died comes back; the request is answered, and so is another one, which is put and comes back from the store."""
    await asyncio.to_thread(scene.start_again)
    tokens, cached = await outcome(scene, context)
    assert tokens == "right"
    await scene.forget()
    assert (await outcome(scene, context))[0] == "right"
    await asyncio.to_thread(scene.cluster.wait_idle)
    held = await asyncio.to_thread(scene.metric, "store-0", "headrace_store_held_blocks", tier="host")
    assert held == 0, "a reader's blocks are still held"
    row.after, row.leaked = f"right, {cached} cached", "nothing"


@pytest.mark.failure("kill -9 in a put:")
@pytest.mark.parametrize(("step", "at", "victim"), IN_PUT)
async def test_in_a_put(scene: Scene, row: StoreRow, step: str, at: str, victim: str) -> None:
    context = await scene.begin()
    scene.order(step, at, victim)
    row.tokens, cached = await outcome(scene, context)
    row.cached = str(cached)
    await scene.until_dead(at, victim)
    await check_after(scene, row, context)


@pytest.mark.failure("kill -9 in a get:")
@pytest.mark.parametrize(("step", "at", "victim"), IN_GET)
async def test_in_a_get(scene: Scene, row: StoreRow, step: str, at: str, victim: str) -> None:
    context = await scene.begin()
    await scene.until_found(context)
    await scene.forget()
    scene.order(step, at, victim)
    row.tokens, cached = await outcome(scene, context)
    row.cached = str(cached)
    await scene.until_dead(at, victim)
    await check_after(scene, row, context)
