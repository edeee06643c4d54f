"""The index under a server that dies, hangs, forgets or lies: a lookup never raises and never waits longer than its budget, and
when the server is back so is everything that is held."""

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from kv_store.index.embedded import EmbeddedServer
from kv_store.index.follower import Follower
from kv_store.index.index import RedisIndex
from kv_store.index.keys import Keyspace
from kv_store.index.server import Command, RedisServer, Reply
from runtime.child_python import child_python
from tests.support.index_servers import (
    IndexServer,
    addresses_of,
    finds,
    index_server,
    owner_named,
    settings_for,
    stored_blocks,
    until,
)

KEYS = Keyspace("headrace")
GARBAGE = random.Random(4).randbytes(1 << 20)


@pytest.fixture(params=["valkey", "redis"])
def server(request: pytest.FixtureRequest) -> Iterator[IndexServer]:
    with index_server(request.param) as server:
        yield server


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """pytest's own would be too long for the name of a socket."""
    with tempfile.TemporaryDirectory(prefix="hr-") as folder:
        yield Path(folder)


async def test_a_server_that_comes_back_empty_is_filled_again(server: IndexServer) -> None:
    chain = addresses_of(80)
    held = stored_blocks(chain)
    settings = settings_for(server.url)
    async with (
        RedisIndex(settings, owner_named("a"), lambda: list(held)) as a,
        RedisIndex(settings, owner_named("b"), lambda: []) as b,
    ):
        await finds(b, chain, 80)
        server.kill()
        for _ in range(5):
            assert await b.find(chain) == ()
        assert b.state().breaker == "open"
        assert b.state().counters.skipped == 2
        a.removed([held.pop(40)])  # what happens meanwhile is not lost
        server.start()
        await finds(b, chain, 40)
        assert [member.incarnation for member in b.members()] == ["life-of-a", "life-of-b"]


async def test_a_server_that_hangs_costs_three_budgets_and_then_nothing(server: IndexServer) -> None:
    chain = addresses_of(8)
    settings = settings_for(server.url, budget_s=0.05, reply_timeout_s=0.3)
    async with (
        RedisIndex(settings, owner_named("a"), lambda: stored_blocks(chain)),
        RedisIndex(settings, owner_named("b"), lambda: []) as b,
    ):
        await finds(b, chain, 8)
        server.pause()
        before = b.state().counters
        try:
            for _ in range(20):
                assert await b.find(chain) == ()
        finally:
            server.resume()
        after = b.state().counters
        assert after.timeouts + after.errors - before.timeouts - before.errors == 3
        assert after.skipped - before.skipped == 17
        assert after.slow_server - before.slow_server == after.timeouts - before.timeouts
        await finds(b, chain, 8)


async def test_a_loop_that_is_late_is_not_taken_for_a_slow_server(server: IndexServer) -> None:
    """It is blocked, for several budgets, before the question is written, and before the reply is read."""
    chain = addresses_of(8)
    settings = settings_for(server.url, budget_s=0.02)
    async with (
        RedisIndex(settings, owner_named("a"), lambda: stored_blocks(chain)),
        RedisIndex(settings, owner_named("b"), lambda: []) as b,
    ):
        await finds(b, chain, 8)
        before = b.state().counters
        for turns in [*range(5)] * 2:
            lookup = asyncio.create_task(b.find(chain))
            for _ in range(turns):
                await asyncio.sleep(0)
            time.sleep(0.1)  # noqa: ASYNC251 - what it is about
            found = await lookup
            assert turns < 4 or [source.num_blocks for source in found] == [8]  # it was written: the reply is there
            await asyncio.sleep(0.05)
        after = b.state().counters
        assert after.hits + after.late_loop - before.hits - before.late_loop == 10
        assert after.slow_server == before.slow_server
        assert b.state().breaker == "closed"
        await finds(b, chain, 8)


async def test_a_server_that_answers_too_late_is_slow() -> None:
    """Also where every request has long gone when the reply comes; and it is taken back when it is quick again."""
    chain = addresses_of(8)
    with index_server("valkey") as server, server.client() as client:
        settings = settings_for(server.url, budget_s=0.02, record_ttl_s=5.0)
        async with (
            RedisIndex(settings, owner_named("a"), lambda: stored_blocks(chain)),
            RedisIndex(settings, owner_named("b"), lambda: []) as b,
        ):
            await finds(b, chain, 8)
            before = b.state().counters
            for _ in range(3):
                server.pause()
                assert await b.find(chain) == ()
                await asyncio.sleep(0.05)
                server.resume()
                await asyncio.to_thread(client.ping)
                await asyncio.sleep(0.02)
            after = b.state()
            assert after.breaker == "open"
            assert (after.counters.slow_server - before.slow_server, after.counters.late_loop) == (3, before.late_loop)
            await finds(b, chain, 8)


async def test_data_that_is_deleted_under_way_comes_back(server: IndexServer) -> None:
    chain = addresses_of(80)
    held = stored_blocks(chain)
    settings = settings_for(server.url)
    async with (
        RedisIndex(settings, owner_named("a"), lambda: list(held)) as a,
        RedisIndex(settings, owner_named("b"), lambda: []) as b,
    ):
        for _ in range(3):
            await finds(b, chain, 80)
            server.flush()
        a.removed([held.pop()])
        await finds(b, chain, 76)


@pytest.mark.parametrize("step", range(8))
async def test_a_server_killed_at_any_step_of_publishing(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps: inspect, allot, records, life, announce, beat, members, records, entries, event."""
    chain = addresses_of(16)
    with index_server("valkey") as server:
        settings = settings_for(server.url)
        async with RedisIndex(settings, owner_named("b"), lambda: []) as b:
            await until(lambda: b.state().registered)
            kill_at_step(monkeypatch, server, step)
            async with RedisIndex(settings, owner_named("a"), lambda: stored_blocks(chain)):
                await finds(b, chain, 16)


def kill_at_step(monkeypatch: pytest.MonkeyPatch, server: IndexServer, step: int) -> None:
    """The server dies before step `step` of any connection, half of the time with the commands already carried out."""
    run = RedisServer.run
    steps = iter(range(step + 1))

    async def run_or_die(
        self: RedisServer, commands: Sequence[Command], on_open: Callable[[], None] | None = None
    ) -> list[Reply]:
        if next(steps, None) == step:
            if step % 2:
                await run(self, commands, on_open)
            server.kill()
            server.start()
        return await run(self, commands, on_open)

    monkeypatch.setattr(RedisServer, "run", run_or_die)


async def test_garbage_in_every_key_is_replaced_and_hurts_nobody(server: IndexServer) -> None:
    chain = addresses_of(16)
    settings = settings_for(server.url, drift_check_s=0.1)
    async with (
        RedisIndex(settings, owner_named("a"), lambda: stored_blocks(chain)) as a,
        RedisIndex(settings, owner_named("b"), lambda: []) as b,
    ):
        await finds(b, chain, 16)
        with server.client() as client:
            keys = server.keys()
            for key in keys:
                client.set(key, GARBAGE)
            assert await b.find(chain) == ()
            await finds(b, chain, 16)
            for key in keys:
                client.delete(key)
                client.lpush(key, GARBAGE)
            assert await b.find(chain) == ()
            await finds(b, chain, 16)
            client.hset(KEYS.lives, mapping={b"9" * 20: b"x", b"7": GARBAGE, b"8": b"{}", GARBAGE[:100]: b""})
            client.sadd(KEYS.bucket(0, 1, 0), GARBAGE)
            await until(lambda: client.hlen(KEYS.lives) <= 4, "what cannot be an owner is deleted")
        a.removed(stored_blocks(chain)[-1:])
        await finds(b, chain, 12)


@pytest.mark.parametrize("event", [GARBAGE, b"", b"\xc1", msgspec.msgpack.encode({"number": -1})])
async def test_a_follower_survives_any_event(event: bytes) -> None:
    chain = addresses_of(8)
    with index_server("redis") as server, server.client() as client:
        settings = settings_for(server.url)
        async with (
            RedisIndex(settings, owner_named("a"), lambda: stored_blocks(chain)) as a,
            Follower(settings) as follower,
        ):
            await until(lambda: a.state().entries == 2 and a.state().lag_s == 0)
            await follower.poll()
            client.xadd(server.keys("*:e:*")[0], {"e": event})
            (change,) = await follower.poll()
            assert (change.kind, len(change.stored)) == ("resynced", 2)


async def test_a_server_that_is_full_refuses_entries_and_nobody_is_lost() -> None:
    chain = addresses_of(400)
    with index_server("redis") as server, server.client() as client:
        settings = settings_for(server.url)
        async with (
            RedisIndex(settings, owner_named("a"), lambda: stored_blocks(chain)) as a,
            RedisIndex(settings, owner_named("b"), lambda: []) as b,
        ):
            await finds(b, chain, 400)
            client.config_set("maxmemory", 1)
            a.stored(stored_blocks(addresses_of(4, text=1)))
            await until(lambda: a.state().counters.refused > 0)
            await asyncio.sleep(2 * settings.record_ttl_s)
            assert {member.worker_id for member in b.members()} == {"a", "b"}


async def test_an_owner_that_is_killed_is_void_when_its_record_expires_and_swept() -> None:
    chain = addresses_of(40)
    with index_server("valkey") as server:
        async with RedisIndex(settings_for(server.url), owner_named("b"), lambda: []) as b:
            command, environment = child_python("tests.support.index_owner", server.url, "40")
            process = await asyncio.create_subprocess_exec(*command, env=environment)
            try:
                await finds(b, chain, 40)
            finally:
                process.kill()
                await process.wait()
            await finds(b, chain, 0)
            await until(lambda: not server.keys("*:b:*") and not server.keys("*:o:*"), "swept")


async def test_the_embedded_server_ends_with_the_process_that_started_it(short_folder: Path) -> None:
    command, environment = child_python("tests.support.index_owner", "embedded", "0")
    environment["TMPDIR"] = str(short_folder)  # nobody is left to remove what the server had
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    os.kill(pid, 0)
    process.kill()
    await process.wait()
    await until(lambda: not is_alive(pid), "the server has ended")


async def test_an_embedded_server_that_died_is_noticed() -> None:
    async with EmbeddedServer() as server:
        os.kill(server.pid, 9)
        assert await server.wait() == -9


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
