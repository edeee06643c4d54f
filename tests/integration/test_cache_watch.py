"""`headrace cache watch --events`: what owners tell a real index, as they tell it."""

import asyncio
import json

import pytest

from headrace.cli import main
from kv_store.index.index import RedisIndex
from tests.support.index_servers import (
    CHUNK_BLOCKS,
    CLUSTER_KEY,
    addresses_of,
    index_server,
    owner_named,
    settings_for,
    stored_blocks,
    until,
)


async def test_changes_are_told_as_they_come(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CLUSTER_KEY", CLUSTER_KEY)
    blocks = stored_blocks(addresses_of(2 * CHUNK_BLOCKS))
    with index_server("valkey") as server:
        watch = ["cache", "watch", "--events", "--redis", server.url, "--interval", "0.1", "--count", "3"]
        async with RedisIndex(settings_for(server.url), owner_named("a"), lambda: blocks[:CHUNK_BLOCKS]) as index:
            await until(lambda: index.state().entries == 1, "an entry")
            watching = asyncio.create_task(asyncio.to_thread(main, [*watch, "--json"]))
            while not watching.done():  # nobody knows when it begins to listen
                index.stored(blocks[CHUNK_BLOCKS:])
                await asyncio.sleep(0.1)
                index.removed(blocks[CHUNK_BLOCKS:])
                await asyncio.sleep(0.1)
            assert await watching == 0
            told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert [each["kind"] for each in told] == ["joined", "resynced", "changed"]
            end = blocks[2 * CHUNK_BLOCKS - 1].block.block_hash.hex()
            assert end in told[2]["stored"] + told[2]["removed"]
            index.stored(blocks[CHUNK_BLOCKS:])
            await until(lambda: index.state().entries == 2 and index.state().lag_s == 0, "two entries")
            assert await asyncio.to_thread(main, [*watch[:-1], "2"]) == 0
            shown = capsys.readouterr().out
            assert "joined" in shown
            assert "stored 2 chunks" in shown


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    watch = ["cache", "watch", "--events"]
    assert main([*watch, "--redis", "redis://:hush@127.0.0.1:1/0"]) == 1
    told = capsys.readouterr().err
    assert "127.0.0.1:1" in told
    assert "hush" not in told
    assert main([*watch, "--redis", "nonsense"]) == 2
