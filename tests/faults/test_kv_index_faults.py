"""The index under a server that dies, hangs, forgets or lies: a lookup never raises and never waits longer than its budget, and
when the server is back so is everything that is held."""

import asyncio
import hmac
import os
import random
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import msgspec
import pytest

from kv_store.index.embedded import EmbeddedServer
from kv_store.index.follower import Follower
from kv_store.index.index import RedisIndex
from kv_store.index.keys import NUM_SHARDS, Keyspace
from kv_store.index.membership import MAX_LIVES, record
from kv_store.index.seal import Seal
from kv_store.index.server import Command, RedisServer, Reply
from runtime.child_python import child_python
from tests.support.index_servers import (
    CLUSTER_KEY,
    IndexServer,
    addresses_of,
    cluster,
    index_server,
    owner_named,
    pump,
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


async def finds(reader: RedisIndex, chain: Sequence[bytes], num_blocks: int) -> None:
    deadline = time.monotonic() + 20
    while sum(source.num_blocks for source in await reader.find(chain)) != num_blocks:  # type: ignore[arg-type]
        assert time.monotonic() < deadline, f"{num_blocks} blocks are not found: {reader.state()}"
        await asyncio.sleep(0.01)


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


class Forger:
    """Writes to the index what no owner would."""

    def __init__(self, server: IndexServer, chain: Sequence[bytes]) -> None:
        self._server = server
        self._chain = chain

    def entry(self, life: int, count: int = 1) -> None:
        place = struct.pack("<IBIHQII", life, 1, 0, 4, 1, 256, 1)
        with self._server.client() as client:
            for address in self._chain[3::4]:
                client.set(KEYS.entry(address), b"\x01" + place * count)

    def member(self, life: int, text: bytes, worker: str, incarnation: str) -> None:
        """Sealed as those are who have no cluster key."""
        seal = hmac.digest(b"", msgspec.msgpack.encode(("headrace index owner", "headrace", life, text)), "sha256")
        with self._server.client() as client:
            client.hset(KEYS.lives, str(life), seal + text)
            for shard in range(NUM_SHARDS):
                client.set(KEYS.record(shard, worker), record(life, incarnation, 0), px=5000)


async def test_forged_entries_and_members_are_left_out_or_no_more_than_hints() -> None:
    chain = addresses_of(8)
    with index_server("valkey") as server:
        forger = Forger(server, chain)
        loopback = {"control_url": "http://127.0.0.1:8000"}
        settings = settings_for(server.url, cluster_key=None)
        async with RedisIndex(settings, owner_named("b", **loopback), lambda: []) as b:
            await until(lambda: b.state().registered)
            forger.entry(life=77)  # of nobody
            assert await b.find(chain) == ()
            owner = msgspec.structs.asdict(owner_named("x", **loopback))
            for index, wrong in enumerate(
                [
                    {"control_url": "file:///etc/passwd"},
                    {"control_url": "http://user:pass@host"},
                    {"worker_id": "a b\nc"},
                    {"num_buckets": 1 << 30},
                    {"fingerprint": "short"},
                    {"capacity_blocks": -1},
                ]
            ):
                forger.member(100 + index, msgspec.msgpack.encode(owner | wrong), "x", "life-of-x")
                forger.entry(life=100 + index)
            forger.member(200, msgspec.msgpack.encode(owner | {"fingerprint": "f" * 32}), "x", "life-of-x")
            forger.entry(life=200)  # of another layout
            await until(lambda: len(b.members()) == 2)
            assert await b.find(chain) == ()
            assert b.state().counters.garbage
            forger.member(201, msgspec.msgpack.encode(owner), "x", "life-of-x")
            forger.entry(life=201, count=3)  # well-formed, and a lie: what it costs is a question to x
            await until(lambda: any(member.life == 201 for member in b.members()))
            assert [source.num_blocks for source in await b.find(chain)] == [8]


@pytest.mark.parametrize("cluster_key", [CLUSTER_KEY, None])
async def test_who_may_only_write_to_the_server_is_never_a_member(cluster_key: str | None) -> None:
    """With a key: whose seal is not by it, or for another life. Without: who is not on loopback."""
    chain = addresses_of(8)
    url = "http://b.test:8000" if cluster_key else "http://127.0.0.1:8000"
    with index_server("valkey") as server, server.client() as client:
        forger = Forger(server, chain)
        settings = settings_for(server.url, cluster_key=cluster_key)
        async with (
            RedisIndex(settings, owner_named("a", control_url=url), lambda: stored_blocks(chain)) as a,
            RedisIndex(settings, owner_named("b", control_url=url), lambda: []) as b,
        ):
            await finds(b, chain, 8)
            forger.member(77, msgspec.msgpack.encode(owner_named("evil", role="store")), "evil", "life-of-evil")
            forger.entry(life=77)
            if cluster_key:
                sealed = client.hget(KEYS.lives, str(min(member.life for member in b.members())))
                client.hset(KEYS.lives, "78", sealed)
            await until(lambda: b.state().strangers == (2 if cluster_key else 1), "strangers are counted")
            await until(lambda: {member.worker_id for member in b.members()} == {"a", "b"})
            assert "not believed" in b.state().why
            assert all(source.worker == "a" for source in await b.find(chain))
            client.hdel(KEYS.lives, "77", "78")
            await until(lambda: b.state().why == "")
            life = next(member.life for member in b.members() if member.worker_id == "a")
            forger.member(life, msgspec.msgpack.encode(owner_named("evil")), "evil", "life-of-evil")
            await until(lambda: a.state().counters.registrations == 2, "who is overwritten registers again")
            await finds(b, chain, 8)


@pytest.mark.parametrize("cluster_key", [CLUSTER_KEY, None])
async def test_thousands_of_forged_lives_neither_hide_members_nor_stay(cluster_key: str | None) -> None:
    chain = addresses_of(8)
    url = "http://127.0.0.1:8000"
    with index_server("valkey") as server, server.client() as client:
        settings = settings_for(server.url, cluster_key=cluster_key)
        async with (
            RedisIndex(settings, owner_named("a", control_url=url), lambda: stored_blocks(chain)) as a,
            RedisIndex(settings, owner_named("b", control_url=url), lambda: []) as b,
        ):
            await finds(b, chain, 8)
            forged = [(life, owner_named(f"x{life}", num_buckets=1 << 14)) for life in range(1, 3001)]
            lives = {str(life): Seal(None, "headrace").close(life, owner) for life, owner in forged}
            client.hset(KEYS.lives, mapping=lives | {str(10_000 + life): b"?" for life in range(3000)})
            await until(lambda: client.hlen(KEYS.lives) <= MAX_LIVES, "what nobody is behind is deleted")
            assert a.state().counters.pruned + b.state().counters.pruned > 1000
            assert {member.worker_id for member in b.members()} == {"a", "b"}
            assert a.state().counters.registrations == b.state().counters.registrations == 1
            a.stored(stored_blocks(addresses_of(8, text=3)))
            await finds(b, addresses_of(8, text=3), 8)


async def test_a_cluster_that_is_away_at_first_is_used_when_it_is_there() -> None:
    chain = addresses_of(8)
    with cluster(1) as there:
        port = int(there.rpartition(":")[2])
        proxy = Proxy(port)
        settings = settings_for(f"redis+cluster://127.0.0.1:{proxy.port}", reply_timeout_s=0.5)
        async with RedisIndex(settings, owner_named("b"), lambda: []) as b:
            for _ in range(5):
                assert await b.find(chain) == ()
            await until(lambda: b.state().breaker == "open" and b.state().counters.outages == 1)
            assert "RedisClusterException" in b.state().why
            async with proxy:
                await until(lambda: b.state().registered, "registered")
                await until(lambda: b.state().breaker == "closed", "lookups are asked for")
                assert b.state().why == ""


class Proxy:
    """A port at which nobody listens, and within `async with` the server at `upstream`."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, sock=self._socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(pump(reader, far_writer))
                group.create_task(pump(far_reader, writer))
        finally:
            writer.close()
            far_writer.close()
            self._tasks.discard(task)


ODD_REPLIES = {
    "nil": b"$-1\r\n",
    "int": b":1\r\n",
    "text": b"+x\r\n",
    "pair": b"*2\r\n:1\r\n:2\r\n",
    "nested": b"*1\r\n*1\r\n$1\r\na\r\n",
    "empty": b"*0\r\n",
    "deep": b"*1\r\n" * 20_000,
    "long": b"$9999999999\r\n" + b"x" * 1000,
    "moved": b"-MOVED 1 127.0.0.1:1\r\n",
    "info": b"$3\r\na:b\r\n",
}


@pytest.mark.parametrize("reply", ODD_REPLIES.values(), ids=ODD_REPLIES)
async def test_a_server_that_answers_nonsense_ends_nothing(reply: bytes) -> None:
    chain = addresses_of(8)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while text := await reader.read(1 << 16):
                writer.write(reply * max(1, text.count(b"\r\n*") + text.startswith(b"*")))
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        settings = settings_for(f"redis://127.0.0.1:{port}", reply_timeout_s=0.1, budget_s=0.5)
        async with RedisIndex(settings, owner_named("b"), lambda: []) as b:
            for _ in range(5):
                assert await b.find(chain) == ()
            await until(lambda: b.state().counters.outages == 1, "it counts as an outage")
            assert b.state().why
            running = {task.get_name() for task in asyncio.all_tasks()}
            assert {"kv-index-reader", "kv-index-keeper", "kv-index-probe"} <= running


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
