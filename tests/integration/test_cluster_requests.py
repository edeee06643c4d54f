"""One cluster, many requests: concurrency, seeds, prefix reuse, salts, cancelled streams, the phase ledger."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cluster import Cluster
from completions import complete
from tiny_models import greedy_reference, load_reference, make_model

BLOCK_SIZE = 16
SETTINGS = {"cache.block_size": BLOCK_SIZE, "scheduler.max_num_batched_tokens": 64}
REMOTE = {"local_prefill_tokens": 0}


def prompt_of(num_tokens: int) -> list[int]:
    rng = random.Random(num_tokens)
    return [rng.randrange(2, 512) for _ in range(num_tokens)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), str(model), settings=SETTINGS, router_settings=REMOTE) as cluster:
        yield cluster


async def test_32_concurrent_mixed_requests(model: Path, cluster: Cluster) -> None:
    rng = random.Random(4)
    reference = load_reference(model)
    jobs = [([rng.randrange(2, 512) for _ in range(rng.randrange(1, 200))], rng.randrange(1, 30)) for _ in range(32)]
    async with aiohttp.ClientSession() as session:
        answers = await asyncio.gather(
            *(
                complete(session, cluster.url, prompt, length, stream=bool(i % 2))
                for i, (prompt, length) in enumerate(jobs)
            )
        )
    assert [answer.token_ids for answer in answers] == [
        greedy_reference(reference, prompt, length) for prompt, length in jobs
    ]
    cluster.wait_idle()


async def test_seeded_sampling_reproduces(cluster: Cluster) -> None:
    prompt = prompt_of(80)
    options = {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5}
    async with aiohttp.ClientSession() as session:
        first, again, other = [
            await complete(session, cluster.url, prompt, 32, seed=seed, **options) for seed in (11, 11, 12)
        ]
        together = await asyncio.gather(
            *(complete(session, cluster.url, prompt, 32, seed=seed, **options) for seed in range(8, 14))
        )
    assert first.token_ids == again.token_ids == together[3].token_ids
    assert first.token_ids != other.token_ids


async def test_a_shared_prefix_is_computed_once(cluster: Cluster) -> None:
    node = cluster.processes["prefill-0"]
    rng = random.Random(6)
    shared = [rng.randrange(2, 512) for _ in range(8 * BLOCK_SIZE)]
    async with aiohttp.ClientSession() as session:
        await complete(session, cluster.url, [*shared, 3, 4, 5], 4)
        before = node.metric("headrace_prompt_tokens_computed_total")
        second = await complete(session, cluster.url, [*shared, *range(20, 40)], 4)
    assert node.metric("headrace_prompt_tokens_computed_total") - before == 20
    assert second.usage["prompt_tokens_details"]["cached_tokens"] == 8 * BLOCK_SIZE


async def test_salts_share_nothing(cluster: Cluster) -> None:
    rng = random.Random(7)
    prompt = [rng.randrange(2, 512) for _ in range(4 * BLOCK_SIZE + 1)]
    async with aiohttp.ClientSession() as session:
        answers = [
            await complete(session, cluster.url, prompt, 4, cache_salt=salt)
            for salt in ("tenant-a", "tenant-b", "tenant-a")
        ]
    cached = [answer.usage["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, 0, 4 * BLOCK_SIZE]
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids


@pytest.mark.parametrize("prompt_tokens", [200, 1500])
async def test_a_cancelled_stream_frees_everything(cluster: Cluster, prompt_tokens: int) -> None:
    prompt = [random.Random(8).randrange(2, 512) for _ in range(prompt_tokens)]
    async with aiohttp.ClientSession() as session:
        body = {"model": "llama", "prompt": prompt, "max_tokens": 400, "stream": True, "ignore_eos": True}
        async with session.post(f"{cluster.url}/v1/completions", json=body) as response:
            await response.content.readany()
    await asyncio.to_thread(cluster.wait_idle)


async def test_the_phases_add_up(cluster: Cluster) -> None:
    async with aiohttp.ClientSession() as session:
        answer = await complete(session, cluster.url, prompt_of(333), 32, include_timing=True)
    phases = dict(answer.timing)
    total, parts = phases.pop("total_ms"), phases.pop("handoff")
    assert set(parts) == {"queue_ms", "wire_ms", "verify_ms", "join_ms"}
    assert all(value >= 0 for value in parts.values())
    assert sum(parts.values()) == pytest.approx(phases["handoff_ms"], abs=0.01)
    assert set(phases) == {"router_ms", "queue_ms", "prefill_ms", "handoff_ms", "decode_ms", "transit_ms"}
    assert all(value >= 0 for value in phases.values())
    assert sum(phases.values()) == pytest.approx(total, rel=0.01)
    assert phases["prefill_ms"] > 0
    assert phases["decode_ms"] > 0


async def test_a_local_prompt_is_accounted_for_though_a_stop_string_ends_it(model: Path, tmp_path: Path) -> None:
    body = {"model": "llama", "prompt": prompt_of(100), "max_tokens": 24, "temperature": 0, "include_timing": True}
    with Cluster(tmp_path, str(model), prefill=0, settings=SETTINGS) as single:
        async with aiohttp.ClientSession() as session:

            async def ask(**options: object) -> dict[str, Any]:
                async with session.post(f"{single.url}/v1/completions", json=body | options) as response:
                    answer: dict[str, Any] = await response.json()
                    return answer

            text = (await ask())["choices"][0]["text"]
            for stop in (text[:1], text[len(text) // 2 :][:3]):
                answer = await ask(stop=stop)
                choice, timing = answer["choices"][0], answer["choices"][0]["timing"]
                assert (choice["text"], choice["stop_reason"]) == (text[: text.index(stop)], stop)
                assert timing["prefill_ms"] > 0
                assert timing["handoff_ms"] == 0
                assert sum(timing.pop("handoff").values()) == 0
                assert sum(timing.values()) == pytest.approx(2 * timing["total_ms"], rel=0.01)
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 6 * BLOCK_SIZE
        single.wait_idle()


@pytest.mark.parametrize("options", [{"stop_token_ids": [5], "logit_bias": {"5": 100}}, {}])
async def test_a_first_token_that_is_the_last_leaves_no_lease(cluster: Cluster, options: dict[str, object]) -> None:
    node = cluster.processes["prefill-0"]
    expired = node.metric("headrace_leases_expired_total")
    async with aiohttp.ClientSession() as session:
        for length in (20, 200):
            num_tokens = 8 if options else 1
            body = {"model": "llama", "prompt": prompt_of(length), "max_tokens": num_tokens, **options}
            async with session.post(f"{cluster.url}/v1/completions", json=body) as response:
                assert (await response.json())["usage"]["completion_tokens"] == 1
    await asyncio.to_thread(cluster.wait_idle, 3)
    assert node.metric("headrace_leases_expired_total") == expired


async def test_one_request_cannot_fail_its_neighbours(model: Path, cluster: Cluster) -> None:
    reference = load_reference(model)
    prompt = prompt_of(50)
    async with aiohttp.ClientSession() as session:
        neighbours = [asyncio.create_task(complete(session, cluster.url, prompt, 64)) for _ in range(3)]
        for penalty in (1e-300, 1e-39, 0.01, 100):
            body = {"model": "llama", "prompt": prompt_of(9), "max_tokens": 16, "repetition_penalty": penalty}
            async with session.post(f"{cluster.url}/v1/completions", json=body | {"temperature": 1e-5}) as response:
                assert response.status == (400 if penalty < 0.01 else 200), await response.text()
        answers = await asyncio.gather(*neighbours)
    assert [answer.token_ids for answer in answers] == [greedy_reference(reference, prompt, 64)] * 3
