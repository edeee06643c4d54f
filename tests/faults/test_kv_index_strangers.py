"""The index among strangers: what others write to the server, and servers that are not what they should be, cost hits at most."""

import asyncio
import hmac
import socket
import struct
from collections.abc import Sequence
from typing import Self

import msgspec
import pytest

from kv_store.index.index import RedisIndex
from kv_store.index.keys import NUM_SHARDS, Keyspace
from kv_store.index.membership import MAX_LIVES, record
from kv_store.index.seal import Seal
from tests.support.index_servers import (
    CLUSTER_KEY,
    IndexServer,
    addresses_of,
    cluster,
    finds,
    index_server,
    owner_named,
    pump,
    settings_for,
    stored_blocks,
    until,
)

KEYS = Keyspace("headrace")


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
        settings = settings_for(server.url, cluster_key=cluster_key, record_ttl_s=5.0)
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
