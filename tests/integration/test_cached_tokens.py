"""usage.cached_tokens, and what operators see, of real nodes whose devices have forgotten what their stores still have."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from store_cluster import BLOCK_SIZE, StoreCluster, running_stores
from tiny_models import make_model

from headrace.cli import main

NUM_FULL = 10
PROMPT = [(3 * i) % 500 + 2 for i in range(NUM_FULL * BLOCK_SIZE + 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


async def headrace(cluster: StoreCluster, *arguments: str) -> int:
    return await asyncio.to_thread(main, ["cache", *arguments, "--cluster", cluster.control_url])


async def cached(cluster: StoreCluster, path: str, body: dict[str, Any]) -> int:
    """cached_tokens of one answer, streamed or not."""
    body = {"max_tokens": 4, "temperature": 0, "ignore_eos": True} | body
    async with cluster.session.post(f"{cluster.url}/v1/{path}", json=body) as response:
        assert response.status == 200, await response.text()
        if not body.get("stream"):
            usage = (await response.json())["usage"]
        else:
            lines = [line async for line in response.content if line.startswith(b"data: {")]
            usage = json.loads(lines[-1][6:])["usage"]
    tokens: int = usage["prompt_tokens_details"]["cached_tokens"]
    assert tokens % BLOCK_SIZE == 0
    return tokens


STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


async def test_tokens_from_the_store_count_for_every_kind_of_answer(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_stores(model, monkeypatch) as cluster:
        await cluster.start("decode", "d0", write="through")
        assert await cached(cluster, "completions", {"prompt": PROMPT}) == 0
        await cluster.until_stored("d0", NUM_FULL)
        for options in ({}, {"n": 2}, STREAMED, STREAMED | {"n": 2}):
            assert await cached(cluster, "completions", {"prompt": PROMPT} | options) == NUM_FULL * BLOCK_SIZE
            assert await headrace(cluster, "clear", "--tier", "device", "--yes") == 0
            assert await cached(cluster, "completions", {"prompt": PROMPT} | options) == NUM_FULL * BLOCK_SIZE
        assert (await cluster.tier("d0")).found > 0
        await cluster.at_rest()


async def test_another_salt_is_told_nothing_and_touches_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_stores(model, monkeypatch) as cluster:
        await cluster.start("decode", "d0", write="through")
        assert await cached(cluster, "completions", {"prompt": PROMPT, "cache_salt": "a"}) == 0
        await cluster.until_stored("d0", NUM_FULL)
        assert await headrace(cluster, "clear", "--tier", "device", "--yes") == 0
        before = await cluster.tier("d0")
        assert await cached(cluster, "completions", {"prompt": PROMPT, "cache_salt": "b"}) == 0
        after = await cluster.tier("d0")
        assert (after.found, after.damaged, after.evicted) == (before.found, before.damaged, before.evicted)
        assert await cached(cluster, "completions", {"prompt": PROMPT, "cache_salt": "a"}) == NUM_FULL * BLOCK_SIZE
        await cluster.at_rest()


async def test_an_operator_sees_the_prompt_wander_from_device_to_store(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts, request = tmp_path / "prompts.jsonl", tmp_path / "request.json"
    request.write_text(json.dumps({"prompt": PROMPT}))
    prompts.write_text(request.read_text() + "\n")
    async with running_stores(model, monkeypatch) as cluster:
        await cluster.start("decode", "d0", write="through")

        async def lookup() -> dict[str, Any]:
            assert await headrace(cluster, "lookup", "--request", str(request), "--json") == 0
            found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])["prompts"][0]
            return found

        async def until_found(expected_tokens: int, **blocks: int) -> None:
            """The router hears of what a node has, and has no longer, by its heartbeats."""
            async with asyncio.timeout(10):
                while True:
                    found = await lookup()
                    there = blocks.items() <= found["nodes"][0].items()
                    if there and found["expected_tokens"] == expected_tokens:
                        return
                    await asyncio.sleep(0.02)

        assert (await lookup())["expected_tokens"] == 0
        for expected in (f"{len(PROMPT)} tokens computed, 0 were", f"5 tokens computed, {NUM_FULL * BLOCK_SIZE} were"):
            assert await asyncio.to_thread(main, ["cache", "warm", str(prompts), "--api", cluster.url]) == 0
            assert expected in capsys.readouterr().out
        await until_found(NUM_FULL * BLOCK_SIZE, device=NUM_FULL, host=NUM_FULL)
        assert await headrace(cluster, "pin", "--request", str(request), "--ttl", "1h", "--json") == 0
        assert json.loads(capsys.readouterr().out)["nodes"] == [{"worker": "d0", "num_blocks": NUM_FULL}]
        assert await headrace(cluster, "clear", "--tier", "device", "--yes", "--json") == 0
        capsys.readouterr()
        await until_found(NUM_FULL * BLOCK_SIZE, device=0, host=NUM_FULL, pinned=NUM_FULL)
        assert await headrace(cluster, "clear", "--yes", "--json") == 0
        assert json.loads(capsys.readouterr().out)["nodes"] == [{"worker": "d0", "num_blocks": NUM_FULL}]
        await until_found(0, leading=0)
        await cluster.at_rest()
