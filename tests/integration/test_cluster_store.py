"""Whatever keeps the KV of a prompt, the tokens are those of a cluster that keeps nothing: real models, greedy and seeded, in
fp32 and bf16, with a device cache that has forgotten everything between two turns."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from completions import Answer
from index_servers import IndexServer, index_server
from store_cluster import BLOCK_SIZE, StoreCluster, running_stores
from tiny_models import greedy_reference, load_reference, make_model

SMALL_CACHE = 32
"""Blocks: little more than one conversation."""

HOST_SLOTS = 42

TURN_TOKENS = 270
ANSWER_TOKENS = 12
SALTS = ("one tenant", "another tenant")
DTYPES = ("float32", "bfloat16")
PLACES = ("host", "host and disk", "peer", "store node")
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {}, "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def server() -> Iterator[IndexServer]:
    with index_server("valkey") as running:
        yield running


def words(seed: int, count: int = TURN_TOKENS) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, 512) for _ in range(count)]


def num_cached(answer: Answer) -> int:
    return int(answer.usage["prompt_tokens_details"]["cached_tokens"])


def full_blocks(num_tokens: int) -> int:
    """Tokens of a prompt that can be brought: the last one is computed in any case."""
    return (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE


async def forget(cluster: StoreCluster, num_blocks: int = SMALL_CACHE + 4) -> None:
    """What the devices hold: many small prompts take its place, each when what had to go for the one before it is saved."""
    for number in range(num_blocks):
        await cluster.ask(words(100 + number, BLOCK_SIZE + 1), 1, cache_salt="somebody else")
        await cluster.engines_at_rest()


async def converse(cluster: StoreCluster, forgetting: Any = forget, **sampling: Any) -> tuple[list[int], Answer]:
    """Two turns of one conversation; between them the device forgets. All tokens, and the second answer."""
    first = await cluster.ask(words(1), ANSWER_TOKENS, **sampling)
    await forgetting(cluster)
    second = await cluster.ask(second_turn(first), ANSWER_TOKENS, **sampling)
    return first.token_ids + second.token_ids, second


def second_turn(first: Answer) -> list[int]:
    return [*words(1), *first.token_ids, *words(2, 20)]


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[tuple[str, str], list[int]]:
    """By dtype and sampling: the tokens of a node that has a store of no kind, and forgets nothing."""
    return asyncio.run(compute_all(model))


async def compute_all(model: Path) -> dict[tuple[str, str], list[int]]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for dtype in DTYPES:
            async with running_stores(model, patch, {"dtype": dtype, "threads": 1}) as cluster:
                await cluster.start("decode", "d0", host_memory="0")
                for name, sampling in SAMPLING.items():
                    found[dtype, name], second = await converse(cluster, remember, cache_salt=name, **sampling)
                    assert num_cached(second) >= full_blocks(TURN_TOKENS)
    return found


async def remember(_: StoreCluster) -> None:
    """Nothing happens between two turns."""


def host_memory(cluster: StoreCluster) -> str:
    """Of HOST_SLOTS blocks."""
    config = json.loads((cluster.folder / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    itemsize = 2 if cluster.model["dtype"] == "bfloat16" else 4
    token_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * itemsize
    return str(HOST_SLOTS * BLOCK_SIZE * token_bytes)


async def start(cluster: StoreCluster, place: str, folder: Path) -> None:
    """The node that answers both turns, and the place that keeps the first one."""
    match place:
        case "host":
            await cluster.start("decode", "d0", num_blocks=SMALL_CACHE)
        case "host and disk":
            disk = {"disk_path": str(folder), "disk_size": "64MiB"}
            await cluster.start("decode", "d0", num_blocks=SMALL_CACHE, host_memory=host_memory(cluster), **disk)
        case "peer":
            await cluster.start("decode", "d0", num_blocks=SMALL_CACHE, write="through")
        case "store node":
            store = await cluster.start("store", "s0")
            await cluster.start("decode", "d0", num_blocks=SMALL_CACHE, write="through", stores=(store.url,))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
async def test_the_second_turn_comes_from_where_it_is_kept(
    dtype: str,
    place: str,
    model: Path,
    expected: dict[tuple[str, str], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """`peer` and `store node`: another node answers the second turn, and the first is gone where the store is to have it."""
    options = {"dtype": dtype, "threads": 1}
    async with running_stores(model, monkeypatch, options, local_prefill_tokens=0) as cluster:
        await start(cluster, place, tmp_path)

        async def move_on(cluster: StoreCluster) -> None:
            await forget(cluster, 2 * HOST_SLOTS if place == "host and disk" else SMALL_CACHE + 4)
            if place == "peer":
                await cluster.start("prefill", "p0", num_blocks=SMALL_CACHE, host_memory="0")
            elif place == "store node":
                await cluster.until_stored("s0", TURN_TOKENS // BLOCK_SIZE)
                await cluster.at_rest()
                await cluster.nodes.pop("d0").stop()
                await cluster.start("decode", "d1", num_blocks=SMALL_CACHE, host_memory="0")

        tokens, second = await converse(cluster, move_on)
        assert tokens == expected[dtype, "greedy"]
        assert num_cached(second) >= full_blocks(TURN_TOKENS)
        await cluster.at_rest()
        if place == "host and disk":
            assert (await cluster.tier("d0", "disk")).found > 0
        if place == "host":
            tokens, second = await converse(cluster, cache_salt="seeded", **SAMPLING["seeded"])
            assert tokens == expected[dtype, "seeded"]
            assert num_cached(second) >= full_blocks(TURN_TOKENS)
            await cluster.at_rest()


async def test_a_device_that_forgets_computes_the_same(
    model: Path, expected: dict[tuple[str, str], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32; in bf16 the KV of a token that was decoded and of one that was a prompt's differ in the last bit."""
    async with running_stores(model, monkeypatch, {"dtype": "float32", "threads": 1}) as cluster:
        await cluster.start("decode", "d0", num_blocks=SMALL_CACHE, host_memory="0")
        for name, sampling in SAMPLING.items():
            tokens, second = await converse(cluster, **sampling)
            assert (tokens, num_cached(second)) == (expected["float32", name], 0)


async def test_what_is_expected_is_what_the_transformers_library_says(
    model: Path, expected: dict[tuple[str, str], list[int]]
) -> None:
    reference = load_reference(model)
    tokens = expected["float32", "greedy"]
    assert greedy_reference(reference, words(1), ANSWER_TOKENS) == tokens[:ANSWER_TOKENS]
    turn = [*words(1), *tokens[:ANSWER_TOKENS], *words(2, 20)]
    assert greedy_reference(reference, turn, ANSWER_TOKENS) == tokens[ANSWER_TOKENS:]


@pytest.mark.parametrize("host_memory", ["0", "4MiB"])
async def test_preempted_decodes_come_back(model: Path, monkeypatch: pytest.MonkeyPatch, host_memory: str) -> None:
    prompts = [words(seed, 100) for seed in range(6)]
    async with running_stores(model, monkeypatch, {"dtype": "float32", "threads": 1}) as cluster:
        node = await cluster.start("decode", "d0", num_blocks=SMALL_CACHE, host_memory=host_memory, write="through")
        alone = [(await cluster.ask(prompt, 180, cache_salt="alone")).token_ids for prompt in prompts]
        assert node.engine is not None
        assert node.engine.load().preemptions == 0
        together = await asyncio.gather(*(cluster.ask(prompt, 180) for prompt in prompts))
        assert [answer.token_ids for answer in together] == alone
        assert node.engine.load().preemptions > 0, "the cache was to be too small for all of them"
        await cluster.at_rest()
        if host_memory != "0":
            assert node.engine.load().loaded_prompt_tokens > 0, "nobody came back from the host tier"


async def test_two_salts_side_by_side(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_stores(model, monkeypatch, {"dtype": "float32", "threads": 1}) as cluster:
        await cluster.start("decode", "d0", num_blocks=SMALL_CACHE, write="through")
        first = [await cluster.ask(words(1), ANSWER_TOKENS, cache_salt=salt) for salt in SALTS]
        assert [num_cached(answer) for answer in first] == [0, 0], "a tenant has seen another one's blocks"
        await cluster.until_stored("d0", 2 * (TURN_TOKENS // BLOCK_SIZE))
        await forget(cluster)
        for salt in SALTS:
            again = await cluster.ask(words(1), ANSWER_TOKENS, cache_salt=salt)
            assert again.token_ids == first[0].token_ids
            assert num_cached(again) == full_blocks(TURN_TOKENS)
        assert num_cached(await cluster.ask(words(1), ANSWER_TOKENS)) == 0, "nor without a salt"
        await cluster.at_rest()


async def test_two_layouts_share_a_folder_and_an_index(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: IndexServer
) -> None:
    """Two models see the same token ids, one after the other on one folder, and at the same time in one index."""
    models = {"llama": model, "qwen3": make_model("qwen3", tmp_path)}
    disk = {"disk_path": str(tmp_path / "disk"), "disk_size": "64MiB", "policy": "lru", "redis": server.url}
    (tmp_path / "disk").mkdir()
    seen: dict[str, list[int]] = {}
    for turn in range(2):
        for name, folder in models.items():
            async with running_stores(folder, monkeypatch, {"dtype": "float32", "threads": 1}) as cluster:
                memory = host_memory(cluster)
                await cluster.start("decode", "d0", num_blocks=SMALL_CACHE, host_memory=memory, **disk)
                answer = await cluster.ask(words(1), ANSWER_TOKENS)
                assert answer.token_ids == seen.setdefault(name, answer.token_ids)
                assert num_cached(answer) == (full_blocks(TURN_TOKENS) if turn else 0)
                if not turn:
                    await forget(cluster, 2 * HOST_SLOTS)
                await cluster.at_rest()
    assert seen["llama"] != seen["qwen3"]
    assert len([folder for folder in (tmp_path / "disk").iterdir() if folder.is_dir()]) == 2
    async with (
        running_stores(models["llama"], monkeypatch, {"dtype": "float32", "threads": 1}) as one,
        running_stores(models["qwen3"], monkeypatch, {"dtype": "float32", "threads": 1}) as other,
    ):
        for cluster, name in ((one, "llama"), (other, "qwen3")):
            await cluster.start("decode", f"{name}-0", redis=server.url, write="through", redis_budget_s=2.0)
            answer = await cluster.ask(words(1), ANSWER_TOKENS)
            assert (answer.token_ids, num_cached(answer)) == (seen[name], 0)
            await cluster.at_rest()
