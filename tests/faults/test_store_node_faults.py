"""What becomes of KV when processes die: a node's successor finds what the node has put; a store that dies costs nothing, and
finds its files again."""

import asyncio
import json
import time
from pathlib import Path

import aiohttp
import pytest
from cluster import Cluster, Process
from completions import Answer, complete
from tiny_models import make_model

PROMPT_BLOCKS = 20
PROMPT = [(5 * i) % 500 + 2 for i in range(PROMPT_BLOCKS * 16 + 3)]
NUM_TOKENS = 4
DEADLINE_S = 20
SETTINGS: dict[str, object] = {
    "model.runner": "simulated",
    "cache.memory": "2MiB",
    "store.host_memory": "2MiB",
    "store.write": "through",
    "store.admission": "all",
    "store.load": "always",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


def start_store(cluster: Cluster, model: Path, disk: Path, port: int = 0) -> Process:
    settings = SETTINGS | {
        "model.model": str(model),
        "model.dtype": "float32",
        "worker_id": "store-0",
        "port": port,
        "routers": json.dumps([cluster.router.listening["control_url"]]),
        "transfer.transport": "tcp",
        "store.disk_path": str(disk),
        "store.disk_size": "8MiB",
    }
    process = cluster.start("store", "store-0", settings)
    process.wait_listening()
    return process


async def ask(cluster: Cluster, prompt: list[int] = PROMPT) -> Answer:
    async with aiohttp.ClientSession() as session:
        return await complete(session, cluster.url, prompt, NUM_TOKENS)


def num_cached(answer: Answer) -> int:
    return int(answer.usage["prompt_tokens_details"]["cached_tokens"])


async def until_stored(process: Process, num_blocks: int, tier: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while await asyncio.to_thread(process.metric, "headrace_store_used_blocks", tier=tier) < num_blocks:
        assert time.monotonic() < deadline, process.tail()
        await asyncio.sleep(0.05)


async def test_a_killed_nodes_successor_loads_what_it_had_put(model: Path, tmp_path: Path) -> None:
    with Cluster(tmp_path, str(model), prefill=0, transport="tcp", settings=SETTINGS) as cluster:
        store = start_store(cluster, model, tmp_path / "disk")
        decode = SETTINGS | {"store.stores": json.dumps([store.url])}
        cluster.kill("decode-0")
        cluster._node_settings |= decode
        cluster.start_node("decode", "decode-0")
        await asyncio.to_thread(cluster.wait_ready)
        first = await ask(cluster)
        await until_stored(store, PROMPT_BLOCKS, "host")
        cluster.kill("decode-0")
        cluster.start_node("decode", "decode-0")
        await asyncio.to_thread(cluster.wait_ready)
        again = await ask(cluster)
        assert again.token_ids == first.token_ids
        assert num_cached(again) == PROMPT_BLOCKS * 16
        await asyncio.to_thread(cluster.wait_idle)

        cluster.kill("store-0")
        other = [token + 1 for token in PROMPT]
        without = await ask(cluster, other)
        assert (await ask(cluster, other)).token_ids == without.token_ids, "nobody needs a store"
        await asyncio.to_thread(cluster.wait_idle)
