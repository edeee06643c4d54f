"""The parts of the index that need no server."""

import asyncio
import random
import socket
import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_store.index.breaker import MAX_COOLDOWN_S, Breaker
from kv_store.index.chunk_book import ChunkBook
from kv_store.index.flight import Flight, in_time
from kv_store.index.keys import NUM_SHARDS, Keyspace, shard_of
from kv_store.index.lookup import choose_sources
from kv_store.index.members import Member, num_buckets_for
from kv_store.index.news import News
from kv_store.index.places import MAX_PLACES, PLACE_BYTES, Chunk, checksum_of, lives, pack, unpack
from kv_store.tiers import StoredBlock, Tier
from protocol.ids import BlockHash, Incarnation, WorkerId
from protocol.kv_blocks import CachedBlock
from runtime.clock import ManualClock

CHUNK = Chunk("host", 7, 16, 0x1122334455667788, 256)


class TestBreaker:
    def opened(self) -> tuple[Breaker, ManualClock]:
        clock = ManualClock()
        breaker = Breaker(clock, jitter=lambda: 0.5)
        for _ in range(3):
            attempt = breaker.admit()
            assert attempt is not None
            breaker.failed(attempt)
        assert breaker.state == "open"
        return breaker, clock

    def test_only_failures_in_a_row_open_it(self) -> None:
        breaker = Breaker(ManualClock())
        for outcome in (breaker.failed, breaker.failed, breaker.succeeded, breaker.failed, breaker.failed):
            attempt = breaker.admit()
            assert attempt is not None
            outcome(attempt)
        assert breaker.state == "closed"

    def test_requests_are_not_let_through_until_a_probe_has_succeeded(self) -> None:
        breaker, clock = self.opened()
        assert breaker.admit() is None
        assert breaker.probe() is None
        assert breaker.retry_in_s == 1.0
        clock.advance(1.0)
        assert breaker.admit() is None
        probe = breaker.probe()
        assert probe is not None
        assert breaker.probe() is None
        assert breaker.admit() is None
        breaker.succeeded(probe)
        assert breaker.admit() is not None
        assert breaker.retry_in_s == 0

    def test_the_cooldown_doubles_up_to_its_limit_and_begins_anew(self) -> None:
        breaker, clock = self.opened()
        waits = []
        for _ in range(7):
            waits.append(breaker.retry_in_s)
            clock.advance(breaker.retry_in_s)
            probe = breaker.probe()
            assert probe is not None
            breaker.failed(probe)
        assert waits == [1, 2, 4, 8, 16, MAX_COOLDOWN_S, MAX_COOLDOWN_S]
        clock.advance(breaker.retry_in_s)
        probe = breaker.probe()
        assert probe is not None
        breaker.succeeded(probe)
        for _ in range(3):
            attempt = breaker.admit()
            assert attempt is not None
            breaker.failed(attempt)
        assert breaker.retry_in_s == 1.0

    def test_late_outcomes_are_ignored(self) -> None:
        breaker = Breaker(ManualClock())
        late = breaker.admit()
        assert late is not None
        for _ in range(3):
            attempt = breaker.admit()
            assert attempt is not None
            breaker.failed(attempt)
        breaker.succeeded(late)
        breaker.failed(late)
        assert breaker.state == "open"
        assert breaker.num_opened == 1


class TestFlight:
    """Times are those of a clock moved by hand; a budget of 0 of the real loop is over at once."""

    @staticmethod
    async def turns(count: int = 10) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def test_the_servers_time_begins_when_the_question_is_written(self) -> None:
        clock = ManualClock()
        with Flight(clock) as flight:
            clock.advance(5)
            assert flight.is_connecting(longer_than_s=4)
            assert not flight.is_overdue(0.1)
            flight.opened()
            assert not flight.is_connecting(longer_than_s=4)
            clock.advance(5)
            assert not flight.is_overdue(0.1)
            await self.turns()
            clock.advance(0.05)
            assert not flight.is_overdue(0.1)
            clock.advance(0.05)
            assert flight.is_overdue(0.1)
            assert await flight.was_slow(0.1)
        assert not flight.is_overdue(0.1)

    async def test_who_has_answered_when_the_loop_looks_was_not_slow(self) -> None:
        clock = ManualClock()
        with Flight(clock) as flight:
            flight.opened()
            await self.turns()
            verdict = asyncio.create_task(flight.was_slow(1000))
            await self.turns()
        clock.advance(5000)
        assert not await verdict

    async def test_a_flight_that_fails_was_slow(self) -> None:
        with pytest.raises(ConnectionError), Flight(ManualClock()) as flight:
            verdict = asyncio.create_task(flight.was_slow(1000))
            await self.turns()
            raise ConnectionError
        assert await verdict

    async def test_what_has_arrived_when_the_budget_is_over_is_taken(self) -> None:
        """It came while the loop was busy, so that it is due in one turn with the timer, or in the next."""
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            loop = asyncio.get_running_loop()
            reply = asyncio.create_task(loop.sock_recv(near, 1))
            await self.turns()
            loop.call_soon(far.send, b"1")
            loop.call_soon(time.sleep, 0.02)
            assert await in_time(reply, 0.01)
            assert not await in_time(loop.create_future(), 0.0)


class TestPlaces:
    def test_golden_bytes(self) -> None:
        assert pack(0xAABBCCDD, CHUNK).hex() == "ddccbbaa01070000001000887766554433221100010000"

    def test_what_is_packed_is_read(self) -> None:
        value = b"\x01" + pack(3, CHUNK) + b"\x05\x00\x00\x00" + pack(4, CHUNK) + b"\x06\x00\x00\x00"
        found = unpack(value)
        assert found is not None
        assert [(place.life, place.chunk, place.created) for place in found] == [(3, CHUNK, 5), (4, CHUNK, 6)]
        assert lives(value) == ((3, 1), (4, 1))

    @given(st.binary(max_size=PLACE_BYTES * (MAX_PLACES + 2)))
    def test_anything_can_be_read(self, value: bytes) -> None:
        for read in (unpack(value), lives(value)):
            assert read is None or len(read) * PLACE_BYTES + 1 == len(value)

    def test_other_versions_and_too_many_places_are_not_read(self) -> None:
        place = pack(3, CHUNK) + bytes(4)
        assert unpack(b"\x02" + place) is None
        assert unpack(b"\x01" + place * (MAX_PLACES + 1)) is None
        assert unpack(b"\x01") is None
        assert unpack(b"\x01" + place[:4] + b"\x09" + place[5:]) is None


def stored(block: CachedBlock, tier: Tier = "host") -> StoredBlock:
    return StoredBlock(block, tier, block.position, block.position + 100)


class TestChunkBook:
    """Chains part within a chunk here, so that a block is in several of them."""

    @staticmethod
    def tree(chunk_blocks: int, seed: int) -> list[CachedBlock]:
        rng = random.Random(seed)
        root = bytes(16)
        blocks: list[CachedBlock] = []
        for number in range(1, 40):
            parent = rng.choice([None, *blocks])
            position = 0 if parent is None else parent.position + 1
            address = bytes([number]) * 16
            blocks.append(CachedBlock(address, root if parent is None else parent.block_hash, position))
        return blocks

    @staticmethod
    def complete(held: dict[tuple[bytes, Tier], CachedBlock], chunk_blocks: int) -> dict[bytes, Tier]:
        """By trying every block."""
        by_hash = {address: block for (address, _), block in held.items()}
        found: dict[bytes, Tier] = {}
        for address, block in by_hash.items():
            if (block.position + 1) % chunk_blocks:
                continue
            members = [block]
            while len(members) < chunk_blocks and members[-1].parent in by_hash:
                members.append(by_hash[members[-1].parent])
            if len(members) == chunk_blocks:
                in_host = all((member.block_hash, "host") in held for member in members)
                found[address] = "host" if in_host else "disk"
        return found

    @settings(deadline=None, max_examples=150)
    @given(
        seed=st.integers(0, 1000),
        chunk_blocks=st.sampled_from([1, 2, 3]),
        steps=st.lists(st.tuples(st.integers(0, 38), st.booleans(), st.booleans(), st.booleans()), max_size=120),
    )
    def test_what_was_taken_is_what_is_complete(
        self, seed: int, chunk_blocks: int, steps: Sequence[tuple[int, bool, bool, bool]]
    ) -> None:
        blocks = self.tree(chunk_blocks, seed)
        book = ChunkBook(chunk_blocks, 16)
        held: dict[tuple[bytes, Tier], CachedBlock] = {}
        taken: dict[bytes, Tier] = {}
        for number, on_disk, add, take in steps:
            block, tier = blocks[number], "disk" if on_disk else "host"
            if add:
                book.stored([stored(block, tier)])
                held[block.block_hash, tier] = block
            else:
                book.removed([stored(block, tier)])
                held.pop((block.block_hash, tier), None)
            if take:
                self.take(book, taken)
        self.take(book, taken)
        assert taken == self.complete(held, chunk_blocks)
        assert book.num_blocks == len({address for address, _ in held})

        again = ChunkBook(chunk_blocks, 16)
        again.stored([stored(block) for block in blocks])
        again.replace([stored(block, tier) for (_, tier), block in held.items()])
        fresh = {address: chunk.tier for address, chunk in again.take_marked(1000).items() if chunk is not None}
        assert fresh == taken

    @staticmethod
    def take(book: ChunkBook, taken: dict[bytes, Tier]) -> None:
        for address, chunk in book.take_marked(1000).items():
            taken.pop(address, None)
            if chunk is not None:
                taken[address] = chunk.tier

    def test_a_chunk_says_where_it_begins_and_what_is_in_it(self) -> None:
        blocks = [CachedBlock(bytes([i + 1]) * 16, bytes([i]) * 16, i) for i in range(4)]
        book = ChunkBook(2, 128)
        book.stored([stored(block) for block in blocks])
        assert book.take_marked(1) == {blocks[1].block_hash: Chunk("host", 0, 2, checksum_of([100, 101]), 256)}
        assert book.take_marked(9) == {blocks[3].block_hash: Chunk("host", 2, 2, checksum_of([102, 103]), 256)}
        assert book.num_marked == 0


def member(name: str, life: int, fingerprint: str = "f") -> Member:
    return Member(
        worker_id=WorkerId(name),
        incarnation=Incarnation("i"),
        life=life,
        role="store",
        control_url=f"http://{name}",
        fingerprint=fingerprint,
        capacity_blocks=0,
        used_blocks=0,
    )


def entry(*held: int) -> bytes:
    return b"\x01" + b"".join(pack(life, CHUNK) + bytes(4) for life in held)


MEMBERS = {life: member(name, life) for life, name in enumerate("abc", start=1)}


class TestLookup:
    def find(self, *values: bytes) -> list[tuple[str, int]]:
        found = choose_sources(values, MEMBERS, 16, "f", WorkerId("c"))
        return [(source.worker, source.num_blocks) for source in found.sources]

    def test_gaps_end_what_a_member_is_good_for(self) -> None:
        assert self.find(entry(1, 2), entry(2), entry(1, 2)) == [("b", 48), ("a", 16)]
        assert self.find(entry(1), b"", entry(1)) == [("a", 16)]
        assert self.find(b"", entry(1)) == []

    def test_nobody_finds_himself_or_strangers(self) -> None:
        assert self.find(entry(3, 99)) == []
        assert choose_sources([entry(99)], MEMBERS, 16, "f", WorkerId("c")).strangers
        assert not choose_sources([entry(1)], MEMBERS, 16, "f", WorkerId("c")).strangers
        assert choose_sources([entry(1)], MEMBERS, 16, "other", WorkerId("c")).sources == ()

    def test_garbage_is_counted_and_ends_the_chain(self) -> None:
        found = choose_sources([entry(1), b"garbage", entry(1)], MEMBERS, 16, "f", WorkerId("c"))
        assert (found.num_garbage, found.sources[0].num_blocks) == (1, 16)

    def test_a_place_named_twice_counts_once(self) -> None:
        assert self.find(entry(1, 1)) == [("a", 16)]


class TestNews:
    async def test_order_is_kept_and_what_does_not_fit_is_noticed(self) -> None:
        blocks = [stored(CachedBlock(bytes([i]) * 16, bytes(16), i)) for i in range(8)]
        news = News(max_blocks=4)
        news.add(stored=blocks)
        news.attach(asyncio.get_running_loop())
        assert news.overflowed()
        news.add(stored=blocks[:2])
        thread = threading.Thread(target=news.add, kwargs={"removed": blocks[:2]})
        thread.start()
        thread.join()
        await news.wait(5)
        assert [(len(item.stored), len(item.removed)) for item in news.take()] == [(2, 0), (0, 2)]
        assert not news.overflowed()
        news.add(stored=blocks[:5])
        news.add(stored=blocks[:1])
        assert news.take() == []
        assert news.overflowed()
        news.detach()
        news.add(stored=blocks[:1])
        assert news.num_queued == 0


def test_the_keys_of_a_shard_have_one_hash_tag() -> None:
    keys = Keyspace("ns")
    for number in range(64):
        address = BlockHash(bytes([number]) * 16)
        tag = f"{{ns:{shard_of(address):x}}}:".encode()
        for key in (keys.entry(address), keys.bucket_of(address, 9, 4), keys.record(shard_of(address), "w")):
            assert key.startswith(tag)
        assert keys.address(keys.entry(address)) == address
    assert len({keys.record(shard, "w") for shard in range(NUM_SHARDS)}) == NUM_SHARDS


@pytest.mark.parametrize(
    ("num_chunks", "expected"), [(0, 1), (1024, 1), (1025, 2), (100_000, 128), (10_000_000, 16384)]
)
def test_buckets_stay_small(num_chunks: int, expected: int) -> None:
    assert num_buckets_for(num_chunks) == expected
