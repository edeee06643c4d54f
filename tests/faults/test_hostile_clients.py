"""Clients that leave at random moments, a router that was paused, a registration that makes no sense: afterwards everything
is back, and the next request is answered right."""

import asyncio
import json
import random
import signal
from pathlib import Path

import aiohttp
import pytest
from cluster import Cluster
from completions import complete
from tiny_models import greedy_reference, load_reference, make_model

from protocol.wire import encode

SETTINGS = {"scheduler.max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


def prompt_of(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, 512) for _ in range(num_tokens)]


async def leave_after(url: str, prompt: list[int], seconds: float) -> None:
    """Send a streaming request and cut the connection, wherever the request is by then."""
    body = {"model": "llama", "prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    writer.write(f"{head}\r\n\r\n".encode() + data)
    await writer.drain()
    await asyncio.sleep(seconds)
    writer.close()
    await writer.wait_closed()


async def test_a_storm_of_disconnects_leaves_every_block_free(model: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    with Cluster(tmp_path, str(model), settings=SETTINGS) as cluster:
        for round_number in range(6):
            prompts = [prompt_of(100 * round_number + i, 800) for i in range(30)]
            await asyncio.gather(*(leave_after(cluster.url, prompt, rng.random() * 0.3) for prompt in prompts))
        await asyncio.to_thread(cluster.wait_idle)
        async with aiohttp.ClientSession() as session:
            answer = await complete(session, cluster.url, prompt_of(7, 100), 32)
    assert answer.token_ids == greedy_reference(load_reference(model), prompt_of(7, 100), 32)


async def test_a_paused_router_loses_no_stream(model: Path, tmp_path: Path) -> None:
    prompts = [prompt_of(i, 200) for i in range(12)]
    with Cluster(tmp_path, str(model), settings=SETTINGS) as cluster:
        async with aiohttp.ClientSession() as session:
            running = [asyncio.create_task(complete(session, cluster.url, prompt, 200)) for prompt in prompts]
            await asyncio.sleep(0.3)
            cluster.router.signal(signal.SIGSTOP)
            await asyncio.sleep(4)
            cluster.router.signal(signal.SIGCONT)
            answers = await asyncio.gather(*running)
    reference = load_reference(model)
    assert [answer.token_ids for answer in answers] == [greedy_reference(reference, prompt, 200) for prompt in prompts]


async def test_a_senseless_registration_is_refused(model: Path, tmp_path: Path) -> None:
    with Cluster(tmp_path, str(model), settings=SETTINGS) as cluster:
        url = f"{cluster.router.listening['control_url']}/internal/v1/workers/register"
        async with aiohttp.ClientSession() as session:
            for control_url in ("http://..", f"http://{'a' * 300}", "http://nowhere.invalid:1", "file:///etc/passwd"):
                message = {"worker_id": "x", "incarnation": "i", "role": "decode", "control_url": control_url}
                async with session.post(url, data=encode(message)) as response:
                    assert 400 <= response.status < 500
            answer = await complete(session, cluster.url, prompt_of(3, 40), 8)
        assert len(answer.token_ids) == 8
