"""The index on two real servers: what is published is found, and nothing else."""

import asyncio
import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_store.index.embedded import EmbeddedServer
from kv_store.index.follower import Follower
from kv_store.index.index import RedisIndex
from kv_store.index.keys import Keyspace
from kv_store.index.places import unpack
from tests.support.index_servers import (
    CHUNK_BLOCKS,
    IndexServer,
    addresses_of,
    cluster,
    index_server,
    owner_named,
    settings_for,
    stored_blocks,
    tls_proxy,
    until,
)

KEYS = Keyspace("headrace")


@pytest.fixture(scope="module", params=["valkey", "redis"])
def shared_server(request: pytest.FixtureRequest) -> Iterator[IndexServer]:
    with index_server(request.param) as server:
        yield server


@pytest.fixture
def server(shared_server: IndexServer) -> Iterator[IndexServer]:
    yield shared_server
    shared_server.flush()


async def published(index: RedisIndex, num_entries: int) -> None:
    await until(lambda: index.state().registered and index.state().entries == num_entries, f"{num_entries} entries")
    await until(lambda: index.state().lag_s == 0)


async def meets(index: RedisIndex, *names: str) -> None:
    await until(lambda: {member.worker_id for member in index.members()} == set(names), f"members {names}")


async def test_whole_chunks_are_found_and_the_owner_does_not_find_itself(server: IndexServer) -> None:
    chain = addresses_of(11)
    blocks = stored_blocks(chain)
    settings = settings_for(server.url)
    async with (
        RedisIndex(settings, owner_named("a"), lambda: []) as a,
        RedisIndex(settings, owner_named("b"), lambda: []) as b,
    ):
        await meets(b, "a", "b")
        await published(a, 0)
        a.stored(blocks[:3])
        a.stored(blocks[4:])  # the first chunk lacks its last block
        await published(a, 1)
        assert await b.find(chain) == ()
        a.stored(blocks[3:4])
        await published(a, 2)
        (source,) = await b.find(chain)
        assert (source.worker, source.incarnation, source.control_url) == ("a", "life-of-a", "http://a.test:8000")
        assert source.num_blocks == 2 * CHUNK_BLOCKS
        assert await a.find(chain) == ()
        assert await b.find(chain[: CHUNK_BLOCKS - 1]) == ()
        assert await b.find(addresses_of(8, text=1)) == ()


async def test_the_best_source_comes_first(server: IndexServer) -> None:
    chain = addresses_of(12)
    settings = settings_for(server.url)
    async with (
        RedisIndex(settings, owner_named("long"), lambda: stored_blocks(chain, "disk")) as long,
        RedisIndex(settings, owner_named("short"), lambda: stored_blocks(chain[:8])) as short,
        RedisIndex(settings, owner_named("slow"), lambda: stored_blocks(chain[:8], "disk")) as slow,
        RedisIndex(settings, owner_named("other", fingerprint="f" * 32), lambda: stored_blocks(chain)) as other,
        RedisIndex(settings, owner_named("reader"), lambda: []) as reader,
    ):
        for index, count in ((long, 3), (short, 2), (slow, 2), (other, 3)):
            await published(index, count)
        await meets(reader, "long", "short", "slow", "other", "reader")
        found = await reader.find(chain)
        assert [(source.worker, source.num_blocks) for source in found] == [("long", 12), ("short", 8), ("slow", 8)]


async def test_an_entry_says_where_the_chunk_is_and_follows_it(server: IndexServer) -> None:
    chain = addresses_of(4)
    host, disk = stored_blocks(chain), stored_blocks(chain, "disk", first_place=70)
    async with RedisIndex(settings_for(server.url), owner_named("a"), lambda: []) as index:

        def chunk_now() -> str:
            with server.client() as client:
                places = unpack(client.get(KEYS.entry(chain[-1])) or b"") or ()
            return " ".join(f"{place.chunk.tier}:{place.chunk.first}:{place.chunk.num_tokens}" for place in places)

        await published(index, 0)
        index.stored(host)
        await until(lambda: chunk_now() == "host:0:256")
        index.stored(disk)
        index.removed(host[1:2])  # what is only on disk in part counts as on disk
        await until(lambda: chunk_now() == "disk:70:256")
        index.removed(disk[1:2])
        await until(lambda: not server.keys("*:b:*"))


async def test_an_owner_that_is_gone_is_void_at_once_and_swept_to_the_last_key(server: IndexServer) -> None:
    chain = addresses_of(400)
    settings = settings_for(server.url)
    async with RedisIndex(settings, owner_named("reader"), lambda: []) as reader:
        async with RedisIndex(settings, owner_named("gone"), lambda: stored_blocks(chain)) as gone:
            await published(gone, 100)
            await meets(reader, "gone", "reader")
            assert (await reader.find(chain))[0].num_blocks == 400
        await meets(reader, "reader")
        assert await reader.find(chain) == ()
        await until(lambda: not server.keys("*:b:*"), "all entries are swept")
        await until(lambda: reader.state().dead_owners == 0)
        assert reader.state().counters.swept == 100
        with server.client() as client:
            assert client.hlen(KEYS.lives) == 1
        assert not server.keys("*:o:*")
        assert not server.keys("*:n:gone")
        assert len(server.keys("*:e:*")) == 1


async def test_a_restarted_owner_takes_the_place_of_its_earlier_life(server: IndexServer) -> None:
    """Also while the earlier one's process is still there: the newer one wins, and the other's writes are refused."""
    chain = addresses_of(8)
    held = stored_blocks(chain)
    settings = settings_for(server.url)
    async with (
        RedisIndex(settings, owner_named("reader"), lambda: []) as reader,
        RedisIndex(settings, owner_named("a", "first"), lambda: list(held)) as first,
    ):
        await published(first, 2)
        async with RedisIndex(settings, owner_named("a", "second"), lambda: stored_blocks(chain[:4])) as second:
            await published(second, 1)
            await until(lambda: not first.state().registered)
            held += stored_blocks(addresses_of(4, text=5))
            first.stored(held[-4:])
            await until(lambda: [m.incarnation for m in reader.members() if m.worker_id == "a"] == ["second"])
            (source,) = await reader.find(chain)
            assert (source.incarnation, source.num_blocks) == ("second", 4)
            assert first.state().counters.fenced
            await until(lambda: len(server.keys("*:b:*")) == 1, "the first life is swept")
        await until(lambda: first.state().registered, "the name is free again")
        await published(first, 3)


async def test_news_that_does_not_fit_is_made_up_for_from_a_snapshot(server: IndexServer) -> None:
    chain = addresses_of(40)
    held = stored_blocks(chain)
    async with RedisIndex(settings_for(server.url, max_queued=16), owner_named("a"), lambda: held) as index:
        await published(index, 10)
        held = stored_blocks(chain[:20])
        index.removed(stored_blocks(chain)[20:])
        await published(index, 5)
        assert index.state().counters.overflows == 1


async def test_drift_is_found_and_mended(server: IndexServer) -> None:
    chain = addresses_of(16)
    settings = settings_for(server.url, drift_check_s=0.1)
    async with RedisIndex(settings, owner_named("a"), lambda: stored_blocks(chain)) as index:
        await published(index, 4)
        stray = bytes(range(16))
        with server.client() as client:
            life = int(client.hkeys(KEYS.lives)[0])
            client.delete(KEYS.entry(chain[3]))
            good = client.get(KEYS.entry(chain[7]))
            client.set(KEYS.entry(chain[7]), good[:-8] + bytes(8))
            client.set(KEYS.entry(stray), good)
            client.sadd(KEYS.bucket_of(stray, life, 2), stray)
            await until(lambda: index.state().counters.drift >= 3, "drift is seen")
            await until(lambda: client.exists(KEYS.entry(chain[3])) == 1, "the lost entry is back")
            await until(lambda: client.exists(KEYS.entry(stray)) == 0, "the stray entry is gone")


async def test_an_entry_has_room_for_so_many_and_no_more(server: IndexServer) -> None:
    chain = addresses_of(4)
    with server.client() as client:
        others = b"".join(struct.pack("<IBIHQII", life, 1, 0, 4, 1, 256, 1) for life in range(1, 9))
        client.set(KEYS.entry(chain[-1]), b"\x01" + others)
        async with RedisIndex(settings_for(server.url), owner_named("a"), lambda: stored_blocks(chain)) as index:
            await until(lambda: index.state().counters.crowded == 1)
            assert client.get(KEYS.entry(chain[-1])) == b"\x01" + others


async def test_a_follower_hears_of_everything_and_makes_up_for_gaps(server: IndexServer) -> None:
    chain = addresses_of(12)
    settings = settings_for(server.url)
    ends = [bytes(address) for address in chain[CHUNK_BLOCKS - 1 :: CHUNK_BLOCKS]]
    async with Follower(settings) as follower:
        assert await follower.poll() == []
        async with RedisIndex(settings, owner_named("a"), lambda: stored_blocks(chain[:4])) as index:
            await published(index, 1)
            kinds = [change.kind for change in await follower.poll()]
            assert kinds[:2] == ["joined", "resynced"]
            assert follower.addresses("a") == {ends[0]}
            index.stored(stored_blocks(chain))
            await published(index, 3)
            (change,) = await follower.poll()
            assert (change.kind, set(change.stored)) == ("changed", set(ends[1:]))
            stream = server.keys("*:e:*")[0]
            index.removed(stored_blocks(chain)[:1])
            await published(index, 2)
            with server.client() as client:
                client.xtrim(stream, maxlen=0, approximate=False)
            index.removed(stored_blocks(chain)[5:6])
            await published(index, 1)
            (change,) = await follower.poll()
            assert (change.kind, change.stored, change.removed) == (
                "resynced",
                (ends[2],),
                tuple(sorted(ends[:2])),
            )
        assert [change.kind for change in await follower.poll()] == ["left"]
        assert follower.addresses("a") == frozenset()


async def test_two_namespaces_on_one_server_do_not_meet(server: IndexServer) -> None:
    chain = addresses_of(4)
    async with (
        RedisIndex(settings_for(server.url, namespace="one"), owner_named("a"), lambda: stored_blocks(chain)) as one,
        RedisIndex(settings_for(server.url, namespace="two"), owner_named("b"), lambda: []) as two,
    ):
        await published(one, 1)
        await meets(two, "b")
        assert await two.find(chain) == ()


@pytest.mark.parametrize("user", ["", "cache"])
async def test_password_and_user(server: IndexServer, user: str) -> None:
    chain = addresses_of(4)
    with index_server(server.kind, "--requirepass", "s3cret/word") as guarded:
        rules = "on >s3cret/word ~{headrace:* +@read +@write +@scripting +@connection +info +time"
        with guarded.client(password="s3cret/word") as client:
            client.execute_command("ACL", "SETUSER", "cache", *rules.split())
        right = settings_for(guarded.url.replace("unix://", f"unix://{user}:s3cret%2Fword@"))
        wrong = settings_for(guarded.url.replace("unix://", f"unix://{user}:guess@"))
        async with (
            RedisIndex(right, owner_named("a"), lambda: stored_blocks(chain)) as index,
            RedisIndex(wrong, owner_named("b"), lambda: []) as outside,
        ):
            await published(index, 1)
            await until(lambda: outside.state().counters.outages == 1)
            assert await outside.find(chain) == ()
            assert "s3cret" not in f"{index.state()}{right}{right.shown_url}"


async def test_tls(server: IndexServer, tmp_path: Path) -> None:
    chain = addresses_of(4)
    async with tls_proxy(server, tmp_path) as (port, certificate):
        trusted = settings_for(f"rediss://localhost:{port}?ssl_ca_certs={certificate}")
        async with (
            RedisIndex(trusted, owner_named("a"), lambda: stored_blocks(chain)) as a,
            RedisIndex(trusted, owner_named("b"), lambda: []) as b,
            RedisIndex(settings_for(f"rediss://localhost:{port}"), owner_named("c"), lambda: []) as stranger,
        ):
            await published(a, 1)
            await meets(b, "a", "b")
            assert len(await b.find(chain)) == 1
            await until(lambda: stranger.state().counters.outages == 1, "an unknown certificate is refused")
            assert not stranger.state().registered


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_a_cluster_works_like_one_server(scheme: str) -> None:
    chain = addresses_of(160)
    with cluster() as url:
        settings = settings_for(url.replace("redis", scheme, 1))
        async with (
            RedisIndex(settings, owner_named("a"), lambda: stored_blocks(chain)) as a,
            RedisIndex(settings, owner_named("b"), lambda: []) as b,
            Follower(settings) as follower,
        ):
            await published(a, 40)
            await meets(b, "a", "b")
            assert [source.num_blocks for source in await b.find(chain)] == [160]
            await follower.poll()
            assert len(follower.addresses("a")) == 40
            a.removed(stored_blocks(chain)[100:101])
            await published(a, 39)
            assert [source.num_blocks for source in await b.find(chain)] == [100]
            await a.__aexit__()
            await meets(b, "b")
            await until(lambda: b.state().counters.swept == 39)


async def test_a_server_that_evicts_is_warned_of_with_the_cure(
    server: IndexServer, caplog: pytest.LogCaptureFixture
) -> None:
    with server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with caplog.at_level(logging.WARNING):
                async with RedisIndex(settings_for(server.url), owner_named("a"), lambda: []) as index:
                    await published(index, 0)
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    assert "CONFIG SET maxmemory-policy noeviction" in caplog.text


async def test_the_embedded_server_serves_one_user_and_leaves_nothing() -> None:
    chain = addresses_of(4)
    async with EmbeddedServer() as server:
        folder = server.socket_path.parent
        assert folder.stat().st_mode & 0o777 == 0o700
        async with RedisIndex(settings_for(server.url), owner_named("a"), lambda: stored_blocks(chain)) as index:
            await published(index, 1)
    assert not folder.exists()
    with pytest.raises(FileNotFoundError):
        await asyncio.open_unix_connection(str(folder / "index.sock"))
