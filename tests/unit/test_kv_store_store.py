"""KVStore: what is saved comes back, byte for byte or not at all; who waits for what; what is counted."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from kv_store.host_copier import HostCopier
from kv_store.observer import Move, NoObserver
from kv_store.quotas import Quotas
from kv_store.receiving import FetchUnsettled
from kv_store.settings import StoreSettings
from kv_store.store import KVStore
from kv_store.tiers import BlockCopier, Tier
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, Tenant
from runtime.clock import ManualClock
from tests.support.store_parts import FakeDisk, PlainMemory, TailsFirst, blocks_of, hashes_of

NUM_SLOTS = 16


@dataclass
class Scene:
    store: KVStore
    device: PlainMemory
    slab: PlainMemory
    disk: FakeDisk
    clock: ManualClock

    async def save(self, blocks: Sequence[CachedBlock]) -> int:
        ids = range(len(blocks))
        self.device.fill(ids, blocks)
        return await self.store.save(blocks, ids)

    async def save_and_write(self, blocks: Sequence[CachedBlock]) -> int:
        """Also to disk."""
        count = await self.save(blocks)
        await self.store.drain(5.0)
        return count

    async def written_ahead(self, count: int) -> None:
        """So many blocks are next to go and on disk."""
        while self.disk.num_blocks < count or self.store.stats().tiers[0].held:
            await asyncio.sleep(0.001)

    async def loads(self, blocks: Sequence[CachedBlock]) -> int:
        """How many come back, all of them right."""
        ids = range(100, 100 + len(blocks))
        count = await self.store.load(hashes_of(blocks), ids)
        assert self.device.right(ids[:count], blocks[:count])
        return count


@asynccontextmanager
async def scene(
    num_slots: int = NUM_SLOTS,
    settings: StoreSettings | None = None,
    with_disk: bool = False,
    copier: Callable[[PlainMemory, PlainMemory], BlockCopier] = HostCopier,
    observer: NoObserver | None = None,
) -> AsyncIterator[Scene]:
    device, slab, disk, clock = PlainMemory(200), PlainMemory(num_slots), FakeDisk(), ManualClock()
    settings = settings or StoreSettings(16, load="always")
    used = disk if with_disk else None
    store = KVStore(
        slab, num_slots, TailsFirst(), settings, copier=copier(device, slab), disk=used, clock=clock, observer=observer
    )
    async with store:
        yield Scene(store, device, slab, disk, clock)
    host = store.stats().tiers[0]
    assert (host.held, host.writing, host.leaving) == (0, 0, 0)


async def test_what_is_saved_comes_back() -> None:
    async with scene() as s:
        blocks = blocks_of("a", 6)
        assert s.store.wanted(blocks) == [True] * 6
        assert await s.save(blocks) == 6
        assert s.store.num_loadable(hashes_of(blocks)) == 6
        assert s.store.wanted(blocks) == [False] * 6
        assert await s.loads(blocks) == 6
        assert await s.save(blocks) == 0, "it is here already"
        assert await s.loads(blocks_of("b", 2)) == 0


async def test_a_changed_slot_is_a_miss_and_is_dropped() -> None:
    async with scene() as s:
        blocks = blocks_of("a", 4)
        await s.save(blocks)
        held = await s.store.hold(hashes_of(blocks))
        s.store.let_go(held)
        s.slab.block(held.slots[2])[5] ^= 0x10
        assert await s.loads(blocks) == 2
        assert s.store.match(hashes_of(blocks)).total == 2
        assert s.store.stats().tiers[0].checksum_failures == 1
        assert await s.save(blocks) == 1
        assert await s.loads(blocks) == 4


async def test_a_tier_full_of_held_blocks_keeps_nothing_and_loses_nothing() -> None:
    async with scene(num_slots=4) as s:
        blocks = blocks_of("a", 4)
        await s.save(blocks)
        held = await s.store.hold(hashes_of(blocks))
        assert await s.save(blocks_of("b", 3)) == 0
        assert s.slab.right(held.slots, held.blocks)
        s.store.let_go(held)
        assert s.store.stats().refused_without_room == 3
        assert await s.save(blocks_of("b", 3)) == 3


async def test_two_salts_share_nothing() -> None:
    async with scene() as s:
        one, other = blocks_of("a", 3, Tenant("one")), blocks_of("a", 3, Tenant("other"))
        await s.save(one)
        assert s.store.num_loadable(hashes_of(other)) == 0
        assert await s.loads(other) == 0
        await s.save(other)
        assert await s.store.clear(tenant=Tenant("one")) == 3
        assert (await s.loads(one), await s.loads(other)) == (0, 3)
        assert {tenant.tenant: tenant.used for tenant in s.store.stats().tenants} == {"other": 3}


async def test_a_tenant_has_its_quota_and_no_more() -> None:
    settings = StoreSettings(16, load="always", quotas=Quotas(0.25))
    async with scene(settings=settings) as s:
        await s.save(blocks_of("a", 4, Tenant("one")))
        await s.save(blocks_of("b", 8, Tenant("two")))
        assert {tenant.tenant: tenant.used for tenant in s.store.stats().tenants} == {"one": 4, "two": 4}


async def test_what_leaves_the_host_comes_back_from_disk() -> None:
    async with scene(num_slots=8, with_disk=True) as s:
        chains = [blocks_of(name, 8) for name in "abc"]
        for chain in chains:
            assert await s.save_and_write(chain) == 8
        assert s.store.stats().dropped_demotions == 0
        for chain in chains:
            assert s.store.num_loadable(hashes_of(chain)) == 8
            assert await s.loads(chain) == 8
        assert max(s.disk.num_writes.values()) == 1, "what is on disk is not written again"
        assert all(block_hash in s.disk for block_hash in hashes_of(chains[0])), "and stays there"


async def test_concurrent_readers_of_a_block_on_disk_read_it_once() -> None:
    async with scene(num_slots=8, with_disk=True) as s:
        chain = blocks_of("a", 4)
        await s.save_and_write(chain)
        await s.save(blocks_of("b", 8))
        assert s.store.match(hashes_of(chain)).host == 0
        loads = [s.store.load(hashes_of(chain), range(at, at + 4)) for at in (100, 110, 120)]
        held, *counts = await asyncio.gather(s.store.hold(hashes_of(chain)), *loads)
        assert counts == [4, 4, 4]
        assert s.slab.right(held.slots, chain)
        s.store.let_go(held)
        assert set(s.disk.num_reads.values()) == {1}


@pytest.mark.parametrize("places", [(0, 0), (0, 1, 0), (0, 1, 1, 2)])
async def test_a_chain_that_names_a_block_twice_holds_up_nobody(places: tuple[int, ...]) -> None:
    async with scene(with_disk=True) as s:
        old = blocks_of("old", 4)
        await s.save_and_write(old)
        await s.store.clear(tier="host")
        chain = [hashes_of(old)[place] for place in places]
        async with asyncio.timeout(5):
            s.store.let_go(await s.store.hold(chain))
            assert await s.store.pin(chain, 60.0) == len(chain)
        assert await s.loads(old) == 4


async def test_whoever_waits_for_a_read_hears_of_its_end_although_its_books_are_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with scene(with_disk=True) as s:
        old = blocks_of("old", 4)
        await s.save_and_write(old)
        await s.store.clear(tier="host")

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(s.store._host, "commit", fail)
            async with asyncio.timeout(5):
                assert not (await s.store.hold(hashes_of(old))).slots
                with pytest.raises(RuntimeError, match="a bug"):
                    await asyncio.gather(*s.store._promoter._tasks)  # type: ignore[union-attr]  # there is a disk
        s.store._host.abort([entry for entry in s.store._host._directory.snapshot() if not entry.ready])
        assert await s.loads(old) == 4


async def test_no_save_waits_for_a_disk_that_hangs() -> None:
    async with scene(with_disk=True) as s:
        s.disk.gate.clear()
        try:
            for index in range(6):
                s.device.fill(range(8), blocks_of(f"chain {index}", 8))
                await asyncio.wait_for(s.store.save(blocks_of(f"chain {index}", 8), range(8)), 5.0)
            stats = s.store.stats()
            assert 0 < stats.tiers[0].leaving <= NUM_SLOTS // 4, "little is bound up in the disk"
            assert stats.dropped_demotions > 0
        finally:
            s.disk.gate.set()


async def test_what_is_next_to_go_is_on_disk_before_its_slot_is_needed() -> None:
    async with scene(with_disk=True) as s:
        await s.save(blocks_of("a", NUM_SLOTS))
        await s.written_ahead(NUM_SLOTS // 2)
        assert s.store.match(hashes_of(blocks_of("a", NUM_SLOTS))).host == NUM_SLOTS, "and is here until then"
        await s.save(blocks_of("b", NUM_SLOTS // 2))
        assert s.store.stats().dropped_demotions == 0
        assert s.store.match(hashes_of(blocks_of("a", NUM_SLOTS))).total == NUM_SLOTS


async def test_what_is_used_while_it_is_next_to_go_stays() -> None:
    async with scene(with_disk=True) as s:
        chain = blocks_of("a", NUM_SLOTS)
        await s.save(chain)
        await s.written_ahead(NUM_SLOTS // 2)
        s.disk.keeps = 0
        assert await s.loads(chain) == NUM_SLOTS
        assert s.store.stats().tiers[0].leaving < NUM_SLOTS // 2


async def test_a_tenant_at_its_quota_is_demoted_and_not_dropped() -> None:
    settings = StoreSettings(16, load="always", quotas=Quotas(0.5))
    async with scene(settings=settings, with_disk=True) as s:
        tenant = Tenant("one")
        await s.save(blocks_of("a", 8, tenant))
        await s.written_ahead(4)
        await s.save(blocks_of("b", 4, tenant))
        assert s.store.stats().dropped_demotions == 0
        assert s.store.match(hashes_of(blocks_of("a", 8, tenant))).total == 8


async def test_what_the_disk_reads_is_nobody_elses_slot() -> None:
    async with scene(with_disk=True) as s:
        s.disk.gate.clear()
        chain = blocks_of("a", NUM_SLOTS)
        await s.save(chain)
        while not s.store.stats().tiers[0].leaving:
            await asyncio.sleep(0.001)
        leaving = s.store.stats().tiers[0].held
        try:
            assert await asyncio.wait_for(s.store.clear("host"), 5.0) == NUM_SLOTS
            await s.save(blocks_of("b", NUM_SLOTS))
            assert s.store.match(hashes_of(blocks_of("b", NUM_SLOTS))).total < NUM_SLOTS
        finally:
            s.disk.gate.set()
        await s.store.drain(5.0)
        assert "demote" in s.store.stats().moves
        assert s.store.stats().moves["demote"].failures == 0, "FakeDisk verifies what it is given"
        assert s.disk.num_blocks > leaving > 0


async def test_a_clear_takes_what_is_under_way_as_well() -> None:
    async with scene(with_disk=True) as s:
        chain, put, on_disk = blocks_of("a", NUM_SLOTS), blocks_of("put", 2), blocks_of("c", 4)
        await s.save_and_write(on_disk)
        await s.store.clear("host")
        s.disk.gate.clear()
        fetching, arrived = asyncio.Event(), asyncio.Event()

        async def fetch(wanted: Sequence[CachedBlock], slots: Sequence[int]) -> int:
            s.slab.fill(slots, wanted)
            fetching.set()
            await arrived.wait()
            return len(slots)

        receiving = asyncio.create_task(s.store.receive(put, fetch))
        await fetching.wait()
        loading = asyncio.create_task(s.loads(on_disk))
        s.device.fill(range(len(chain)), chain)
        saving = asyncio.create_task(s.store.save(chain, range(len(chain))))
        while not s.store.stats().tiers[0].leaving:
            await asyncio.sleep(0.001)
        clearing = asyncio.create_task(s.store.clear())
        await asyncio.sleep(0)
        arrived.set()
        s.disk.gate.set()
        await asyncio.gather(clearing, receiving, loading, saving)
        assert s.store.snapshot() == []
        assert await receiving == 0


async def test_a_clear_of_one_tenant_leaves_what_others_have_under_way() -> None:
    async with scene() as s:
        puts = {tenant: blocks_of("a", 2, Tenant(tenant)) for tenant in ("one", "other")}
        arrived = asyncio.Event()

        async def fetch(wanted: Sequence[CachedBlock], slots: Sequence[int]) -> int:
            s.slab.fill(slots, wanted)
            await arrived.wait()
            return len(slots)

        receiving = [asyncio.create_task(s.store.receive(blocks, fetch)) for blocks in puts.values()]
        await asyncio.sleep(0)
        await s.store.clear(tenant=Tenant("one"))
        arrived.set()
        assert await asyncio.gather(*receiving) == [0, 2]


async def test_a_drained_store_is_found_on_disk_by_the_next() -> None:
    async with scene(with_disk=True) as s:
        chain = blocks_of("a", NUM_SLOTS // 4)
        await s.save(chain)
        assert s.disk.num_blocks < len(chain)
        await s.store.drain(5.0)
        assert all(block_hash in s.disk for block_hash in hashes_of(chain))
        await s.store.drain(5.0)
        assert max(s.disk.num_writes.values()) == 1


async def test_a_drain_writes_heads_first_and_ends_although_the_disk_hangs() -> None:
    async with scene(with_disk=True) as s:
        chain = blocks_of("a", 4)
        s.disk.keeps = 0
        await s.save(chain)
        s.disk.gate.clear()
        await asyncio.wait_for(s.store.drain(0.01), 5.0)
        s.disk.gate.set()
        s.disk.keeps, s.disk.num_writes = 99, {}
        await s.store.drain(5.0)
        assert list(s.disk.num_writes) == hashes_of(chain)


async def test_a_store_ends_although_its_disk_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kv_store.store.CLOSE_TIMEOUT_S", 0.05)
    disk = FakeDisk()
    device, slab = PlainMemory(32), PlainMemory(NUM_SLOTS)
    copier = HostCopier(device, slab)
    store = KVStore(slab, NUM_SLOTS, TailsFirst(), StoreSettings(16), copier=copier, disk=disk)
    blocks = blocks_of("a", NUM_SLOTS)
    device.fill(range(NUM_SLOTS), blocks)
    disk.gate.clear()
    try:
        await store.save(blocks, range(NUM_SLOTS))
        await asyncio.wait_for(store.close(), 20.0)
        assert "does not answer" in caplog.text
    finally:
        disk.gate.set()


@pytest.mark.parametrize("fault", ["fails", "keeps nothing", "lies"])
async def test_a_bad_disk_is_a_miss(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    async with scene(num_slots=4, with_disk=True) as s:
        chain = blocks_of("a", 4)
        s.disk.failing, s.disk.keeps = fault == "fails", 99 if fault == "lies" else 0
        await s.save_and_write(chain)
        if fault == "lies":
            await s.save(blocks_of("b", 4))
            s.disk.flip(hashes_of(chain)[1])
            assert await s.loads(chain) == 1
        else:
            assert await s.save_and_write(blocks_of("b", 4)) == 4
            assert await s.save_and_write(blocks_of("c", 4)) == 4
            assert await s.loads(chain) == 0
            assert s.store.stats().dropped_demotions == 8
        assert len([record for record in caplog.records if "demote" in record.message]) == (fault == "fails")


class BrokenCopier:
    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        raise RuntimeError("no device")

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        raise RuntimeError("no device")


async def test_a_copier_that_fails_is_a_miss_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with scene(copier=lambda device, slab: BrokenCopier()) as s:
        assert await s.save(blocks_of("a", 4)) == 0
        assert await s.save(blocks_of("b", 4)) == 0
        assert s.store.stats().moves["save"].failures == 2
        assert len(caplog.records) == 1


class GatedCopier(HostCopier):
    """Copies half of a batch, then waits to be let through."""

    def __init__(self, device: PlainMemory, slab: PlainMemory) -> None:
        super().__init__(device, slab)
        self.began, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        half = len(slots) // 2
        super().copy_in(slots[:half], block_ids[:half])
        self.began.set()
        self.gate.wait()
        super().copy_in(slots[half:], block_ids[half:])


async def test_a_cancelled_load_ends_when_nothing_is_written_any_more() -> None:
    copiers: list[GatedCopier] = []

    def gated(device: PlainMemory, slab: PlainMemory) -> BlockCopier:
        copiers.append(GatedCopier(device, slab))
        return copiers[0]

    async with scene(copier=gated) as s:
        blocks = blocks_of("a", 4)
        await s.save(blocks)
        copiers[0].gate.clear()
        load = asyncio.create_task(s.store.load(hashes_of(blocks), range(100, 104)))
        await asyncio.to_thread(copiers[0].began.wait)
        load.cancel()
        await asyncio.sleep(0.02)
        assert not load.done()
        copiers[0].gate.set()
        with pytest.raises(asyncio.CancelledError):
            await load
        assert s.device.right(range(100, 104), blocks), "it was under way, and has ended"


class CountingCopier(HostCopier):
    """Notes what it is asked for; a save waits to be let through."""

    def __init__(self, device: PlainMemory, slab: PlainMemory) -> None:
        super().__init__(device, slab)
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        self.calls.append("save")
        self.gate.wait()
        super().copy_out(block_ids, slots)

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        self.calls.append("load")
        super().copy_in(slots, block_ids)


async def test_a_load_waits_for_one_batch_of_a_save_and_no_more() -> None:
    copiers: list[CountingCopier] = []

    def counting(device: PlainMemory, slab: PlainMemory) -> BlockCopier:
        copiers.append(CountingCopier(device, slab))
        return copiers[0]

    async with scene(num_slots=64, copier=counting) as s:
        await s.save(blocks_of("a", 4))
        copier = copiers[0]
        copier.calls.clear()
        copier.gate.clear()
        saves = [asyncio.create_task(s.store.save(blocks_of(name, 4), range(4))) for name in "bcdefg"]
        await asyncio.sleep(0)
        loading = asyncio.create_task(s.loads(blocks_of("a", 4)))
        await asyncio.sleep(0.01)
        copier.gate.set()
        await asyncio.gather(loading, *saves)
        assert copier.calls[:3] == ["save", "load", "save"]


async def test_a_put_is_fetched_into_slots_and_kept_as_far_as_it_came() -> None:
    async with scene() as s:
        blocks = blocks_of("a", 6)
        await s.save(blocks[:2])

        async def fetch(wanted: Sequence[CachedBlock], slots: Sequence[int]) -> int:
            assert list(wanted) == blocks[2:]
            s.slab.fill(slots[:3], wanted[:3])
            return 3

        assert await s.store.receive(blocks, fetch) == 3
        assert await s.loads(blocks) == 5


async def test_slots_of_a_fetch_that_has_not_settled_are_nobodys() -> None:
    async with scene(num_slots=4) as s:
        settled = asyncio.Event()
        seen: list[int] = []

        async def fetch(wanted: Sequence[CachedBlock], slots: Sequence[int]) -> int:
            seen.extend(slots)
            s.slab.fill(slots[:1], wanted[:1])
            raise FetchUnsettled(settled, 1)

        assert await s.store.receive(blocks_of("a", 3), fetch) == 1
        assert s.store.stats().quarantined == 2
        assert await s.save(blocks_of("b", 2)) == 2
        for slot in seen[1:]:
            s.slab.block(slot)[:] = bytes(s.slab.block_bytes)
        assert await s.loads(blocks_of("b", 2)) == 2
        settled.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert s.store.stats().quarantined == 0
        assert await s.save(blocks_of("c", 4)) == 4


async def test_pins_outlive_pressure_until_their_time_has_passed() -> None:
    async with scene(num_slots=8, with_disk=True) as s:
        chain = blocks_of("a", 4)
        await s.save_and_write(chain)
        await s.save(blocks_of("b", 8))
        assert await s.store.pin(hashes_of(chain), 60.0) == 4, "from disk, where it was"
        await s.save(blocks_of("c", 8))
        assert [places.pinned for places in s.store.locate(hashes_of(chain))] == [True] * 4
        assert s.store.match(hashes_of(chain)).host == 4
        s.clock.advance(61.0)
        await s.save(blocks_of("d", 8))
        assert s.store.match(hashes_of(chain)).host == 0


async def test_second_touch_takes_what_is_offered_twice_or_wanted_by_two_requests() -> None:
    async with scene(settings=StoreSettings(16, admission="second-touch")) as s:
        once, twice = blocks_of("once", 2), blocks_of("twice", 2)
        s.store.requested(once)
        s.store.requested(twice)
        s.store.requested(twice)
        assert s.store.wanted(once + twice) == [False, False, True, True]
        assert s.store.wanted(once) == [True, True]
        assert s.store.stats().refused_by_admission == 2


async def test_a_load_slower_than_computing_is_not_begun() -> None:
    rate = [0.0]
    async with scene(settings=StoreSettings(16, prefill_tokens_per_s=lambda: rate[0] or None)) as s:
        blocks = blocks_of("a", 4)
        await s.save(blocks)
        assert s.store.num_loadable(hashes_of(blocks)) == 4, "nothing is known yet"
        await s.loads(blocks)
        assert s.store.estimate_load_s(hashes_of(blocks)) is not None
        rate[0] = 1e12
        assert s.store.num_loadable(hashes_of(blocks)) == 0
        s.clock.advance(60.0)
        assert s.store.num_loadable(hashes_of(blocks)) == 4, "it is time to measure again"
        rate[0] = 1.0
        assert s.store.num_loadable(hashes_of(blocks)) == 4


async def test_a_closed_store_keeps_nothing_and_closes_its_disk() -> None:
    async with scene(with_disk=True) as s:
        await s.save(blocks_of("a", 2))
        await s.store.close()
        assert await s.loads(blocks_of("a", 2)) == 0
        assert await s.store.save(blocks_of("b", 2), [0, 1]) == 0
        assert s.disk.closed


class Recorder(NoObserver):
    def __init__(self) -> None:
        self.reuse_gaps: list[float] = []
        self.evictions: list[tuple[float, float, int]] = []
        self.moves: list[tuple[Move, int]] = []

    def reused(self, tier: Tier, gap_s: float) -> None:
        self.reuse_gaps.append(gap_s)

    def evicted(self, tier: Tier, lifetime_s: float, idle_s: float, num_uses: int) -> None:
        self.evictions.append((lifetime_s, idle_s, num_uses))

    def moved(self, move: Move, num_blocks: int, num_bytes: int, seconds: float) -> None:
        self.moves.append((move, num_blocks))


async def test_an_observer_hears_of_reuse_and_of_evictions() -> None:
    recorder = Recorder()
    async with scene(num_slots=1, observer=recorder) as s:
        await s.save(blocks_of("a", 1))
        s.clock.advance(3.0)
        await s.loads(blocks_of("a", 1))
        s.clock.advance(4.0)
        await s.save(blocks_of("b", 1))
        assert recorder.reuse_gaps == [3.0]
        assert recorder.evictions == [(7.0, 4.0, 1)]
        assert recorder.moves == [("save", 1), ("load", 1), ("save", 1)]


async def test_counts_of_what_requests_found() -> None:
    async with scene() as s:
        blocks = blocks_of("a", 5)
        await s.save(blocks[:3])
        s.store.num_loadable(hashes_of(blocks))
        s.store.num_loadable([BlockHash(bytes(16))])
        stats = s.store.stats()
        assert (stats.lookups, stats.hits, stats.tiers[0].found, stats.missed_blocks) == (2, 1, 3, 3)


async def test_pressure_is_what_no_tier_keeps() -> None:
    settings = StoreSettings(16, load="always", admission="auto")
    async with scene(num_slots=8, settings=settings, with_disk=True) as s:
        for index in range(60):
            await s.save_and_write(blocks_of(f"chain {index}", 8))
        assert not s.store.stats().second_touch, "the disk has it all"
    async with scene(num_slots=8, settings=settings) as s:
        for index in range(60):
            await s.save(blocks_of(f"chain {index}", 8))
        assert s.store.stats().second_touch
        assert not any(s.store.wanted(blocks_of("new", 4)))
