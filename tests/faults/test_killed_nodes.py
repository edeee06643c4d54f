"""kill -9 of either node, at many moments of a request: a right answer or a typed error in time, never a wrong answer,
and the survivor serves on."""

import asyncio
import json
import random
import signal
import time
from pathlib import Path

import aiohttp
import pytest
from cluster import Cluster
from completions import complete
from tiny_models import greedy_reference, load_reference, make_model

PROMPT = [random.Random(1).randrange(2, 512) for _ in range(1800)]
NUM_TOKENS = 150
DEADLINE_S = 30
DELAYS_S = [0.0, 0.03, 0.1, 0.2, 0.4, 0.7]
RETRYABLE_CODES = {"node_lost", "no_worker", "overloaded", "unavailable", "draining", "peer_lost"}
SETTINGS = {"scheduler.max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    return greedy_reference(load_reference(model), PROMPT, NUM_TOKENS)


async def stream(url: str) -> tuple[list[int], dict[str, object] | None]:
    """The tokens that arrived, and the typed error if one ended the stream. Fails on silence past the deadline."""
    body = {
        "model": "llama",
        "prompt": PROMPT,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    received: list[int] = []
    async with (
        asyncio.timeout(DEADLINE_S),
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", json=body) as response,
    ):
        if response.status != 200:
            return [], (await response.json())["error"]
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return received, chunk["error"]
                received += chunk["choices"][0].get("token_ids") or []
    return received, None


async def stream_while_killing(
    cluster: Cluster, victim: str, delay_s: float
) -> tuple[list[int], dict[str, object] | None]:
    running = asyncio.create_task(stream(cluster.url))
    await asyncio.sleep(delay_s)
    cluster.kill(victim)
    return await running


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_kill_at_any_moment(victim: str, model: Path, expected: list[int], tmp_path: Path) -> None:
    router_settings = {"worker_wait_s": 0.5}  # the killed node comes back only after the answer
    with Cluster(tmp_path, str(model), settings=SETTINGS, router_settings=router_settings) as cluster:
        for delay_s in DELAYS_S:
            received, error = await stream_while_killing(cluster, victim, delay_s)
            assert received == expected[: len(received)], f"wrong tokens after {delay_s} s"
            if error is None:
                assert received == expected, f"short answer without an error after {delay_s} s"
            else:
                assert error["code"] in RETRYABLE_CODES, error
            if victim == "prefill-0":
                assert error is None, f"the decode node could have answered alone: {error}"
            await asyncio.to_thread(cluster.wait_idle)
            cluster.start_node(victim.split("-")[0], victim)
            await asyncio.to_thread(cluster.wait_ready)
            async with aiohttp.ClientSession() as session:
                answer = await complete(session, cluster.url, PROMPT, NUM_TOKENS)
            assert answer.token_ids == expected
        await asyncio.to_thread(cluster.wait_idle)


async def test_a_stream_survives_its_decode_node(model: Path, expected: list[int], tmp_path: Path) -> None:
    with Cluster(tmp_path, str(model), decode=2, settings=SETTINGS) as cluster:
        running = asyncio.create_task(stream(cluster.url))
        victim = None
        deadline = time.monotonic() + DEADLINE_S
        while victim is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            busy = [n for n in cluster.nodes if n.role == "decode" and n.metric("headrace_requests_running") > 0]
            victim = busy[0].name if busy else None
        assert victim is not None
        cluster.kill(victim)
        assert await running == (expected, None)
        await asyncio.to_thread(cluster.wait_idle)


async def test_a_stopped_prefill_node_is_given_up(model: Path, expected: list[int], tmp_path: Path) -> None:
    settings = SETTINGS | {"transfer.stall_timeout_s": 1.0}
    with Cluster(tmp_path, str(model), settings=settings) as cluster:
        running = asyncio.create_task(stream(cluster.url))
        await asyncio.sleep(0.1)
        cluster.processes["prefill-0"].signal(signal.SIGSTOP)
        try:
            assert await running == (expected, None)
        finally:
            cluster.processes["prefill-0"].signal(signal.SIGCONT)
        await asyncio.to_thread(cluster.wait_idle)
        assert await stream(cluster.url) == (expected, None)
        await asyncio.to_thread(cluster.wait_idle)


async def test_a_restarted_router_finds_its_nodes_again(model: Path, expected: list[int], tmp_path: Path) -> None:
    with Cluster(tmp_path, str(model), settings=SETTINGS) as cluster:
        running = asyncio.create_task(stream(cluster.url))
        await asyncio.sleep(0.1)
        ports = {key: int(cluster.router.listening[key].rsplit(":", 1)[1]) for key in ("url", "control_url")}
        cluster.kill("router")
        with pytest.raises(aiohttp.ClientError):
            await running
        await asyncio.to_thread(cluster.wait_idle)
        cluster.start(
            "router", "router", {"model": str(model), "port": ports["url"], "control_port": ports["control_url"]}
        )
        await asyncio.to_thread(cluster.wait_ready)
        assert await stream(cluster.url) == (expected, None)
