"""Disaggregated output == single-node output == the transformers library's greedy output, token for token, in fp32."""

import asyncio
import random
from pathlib import Path

import aiohttp
import pytest
from cluster import Cluster
from completions import complete, complete_all
from tiny_models import CONFIGS, greedy_reference, load_reference, make_model

BLOCK_SIZE = 16
CHUNK = 64
NUM_TOKENS = 24
PROMPT_LENGTHS = [1, 7, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 5 * BLOCK_SIZE, CHUNK, CHUNK + 1, 333]
SETTINGS = {"cache.block_size": BLOCK_SIZE, "scheduler.max_num_batched_tokens": CHUNK}


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 512) for _ in range(length)] for length in PROMPT_LENGTHS]


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_family_and_prompt_length(family: str, tmp_path: Path) -> None:
    model = make_model(family, tmp_path)
    reference = load_reference(model)
    expected = [greedy_reference(reference, prompt, NUM_TOKENS) for prompt in prompts(1)]
    with Cluster(tmp_path, str(model), settings=SETTINGS) as cluster:
        disaggregated = asyncio.run(complete_all(cluster.url, prompts(1), NUM_TOKENS))
        cluster.wait_idle()
        moved = cluster.processes["decode-0"].metric("headrace_kv_transfer_blocks_total")
        assert moved == sum(-(-length // BLOCK_SIZE) for length in PROMPT_LENGTHS)
    with Cluster(tmp_path, str(model), prefill=0, settings=SETTINGS) as single:
        alone = asyncio.run(complete_all(single.url, prompts(1), NUM_TOKENS))
    assert disaggregated == expected
    assert alone == expected


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_every_transport(transport: str, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    reference = load_reference(model)
    expected = [greedy_reference(reference, prompt, NUM_TOKENS) for prompt in prompts(2)]
    with Cluster(tmp_path, str(model), transport=transport, settings=SETTINGS) as cluster:
        assert asyncio.run(complete_all(cluster.url, prompts(2), NUM_TOKENS)) == expected
        cluster.wait_idle()


def test_nixl_over_tcp(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    reference = load_reference(model)
    expected = [greedy_reference(reference, prompt, NUM_TOKENS) for prompt in prompts(3)]
    with Cluster(tmp_path, str(model), settings=SETTINGS, environment={"UCX_TLS": "tcp"}) as cluster:
        assert asyncio.run(complete_all(cluster.url, prompts(3), NUM_TOKENS)) == expected
        cluster.wait_idle()


class TestOnOneCluster:
    """What needs no cluster of its own."""

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return make_model("llama", tmp_path_factory.mktemp("model"))

    @pytest.fixture(scope="class")
    def cluster(self, model: Path, tmp_path_factory: pytest.TempPathFactory):
        with Cluster(tmp_path_factory.mktemp("cluster"), str(model), settings=SETTINGS) as cluster:
            yield cluster

    async def test_32_concurrent_mixed_requests(self, model: Path, cluster: Cluster) -> None:
        rng = random.Random(4)
        reference = load_reference(model)
        jobs = [
            ([rng.randrange(2, 512) for _ in range(rng.randrange(1, 200))], rng.randrange(1, 30)) for _ in range(32)
        ]
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

    async def test_seeded_sampling_reproduces(self, cluster: Cluster) -> None:
        prompt = prompts(5)[5]
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

    async def test_a_shared_prefix_is_computed_once(self, cluster: Cluster) -> None:
        node = cluster.processes["prefill-0"]
        rng = random.Random(6)
        shared = [rng.randrange(2, 512) for _ in range(8 * BLOCK_SIZE)]
        async with aiohttp.ClientSession() as session:
            await complete(session, cluster.url, [*shared, 3, 4, 5], 4)
            before = node.metric("headrace_prompt_tokens_computed_total")
            second = await complete(session, cluster.url, [*shared, *range(20, 40)], 4)
        assert node.metric("headrace_prompt_tokens_computed_total") - before == 20
        assert second.usage["prompt_tokens_details"]["cached_tokens"] == 8 * BLOCK_SIZE

    async def test_salts_share_nothing(self, cluster: Cluster) -> None:
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
    async def test_a_cancelled_stream_frees_everything(self, cluster: Cluster, prompt_tokens: int) -> None:
        prompt = [random.Random(8).randrange(2, 512) for _ in range(prompt_tokens)]
        async with aiohttp.ClientSession() as session:
            body = {"model": "llama", "prompt": prompt, "max_tokens": 400, "stream": True, "ignore_eos": True}
            async with session.post(f"{cluster.url}/v1/completions", json=body) as response:
                await response.content.readany()
        await asyncio.to_thread(cluster.wait_idle)

    async def test_the_phases_add_up(self, cluster: Cluster) -> None:
        async with aiohttp.ClientSession() as session:
            answer = await complete(session, cluster.url, prompts(9)[-1], 32, include_timing=True)
        phases = dict(answer.timing)
        total = phases.pop("total_ms")
        assert set(phases) == {"router_ms", "queue_ms", "prefill_ms", "handoff_ms", "decode_ms", "transit_ms"}
        assert all(value >= 0 for value in phases.values())
        assert sum(phases.values()) == pytest.approx(total, rel=0.01)
        assert phases["prefill_ms"] > 0
        assert phases["decode_ms"] > 0
