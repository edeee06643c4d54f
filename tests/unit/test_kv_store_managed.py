"""A store as operators and scrapers see it: reports, pins, clearing, and every figure as a metric."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from store_parts import BLOCK_BYTES, FakeDisk, PlainMemory, TailsFirst, blocks_of, hashes_of

from kv_store.disk.stats import DiskCounts, DiskScan, DiskStats
from kv_store.host_copier import HostCopier
from kv_store.index.state import IndexCounters, IndexState
from kv_store.managed import ManagedKVStore
from kv_store.quotas import Quotas
from kv_store.store import KVStore, StoreSettings
from kv_store.telemetry import MAX_TENANTS, StoreHistograms, StoreTelemetry
from protocol.block_hash import hash_blocks, root_hash
from protocol.errors import InvalidParameter
from protocol.ids import BlockHash, WorkerId
from protocol.kv_blocks import NO_TENANT, CachedBlock, Tenant, chain, tenant_of
from protocol.store_admin import PINNED_BIT, TIER_BITS
from runtime.clock import ManualClock
from runtime.metrics import StoreMetrics, render

HOST, DISK = TIER_BITS["host"], TIER_BITS["disk"]
NOWHERE = BlockHash(b"x" * 16)
OTHER = Tenant("b0b0b0b0b0b0")


@dataclass(frozen=True)
class Puts:
    num_put: int
    num_refused: int
    num_dropped: int
    num_waiting: int


class Bench:
    """A store of `num_slots` slots and a disk, and what watches it."""

    def __init__(self, num_slots: int = 4, quotas: Quotas | None = None) -> None:
        self.clock = ManualClock()
        self.registry = CollectorRegistry()
        metrics = StoreMetrics(self.registry)
        self.device = PlainMemory(64)
        slots = PlainMemory(num_slots)
        self.disk = FakeDisk()
        self.index = IndexState(
            url="unix:///s", breaker="open", retry_in_s=2.0, registered=False, lag_s=1.5, queued=3, entries=7, members=2,
            dead_owners=0, counters=IndexCounters(lookups=9, hits=4, misses=2, timeouts=1, skipped=2, drift=5, published=8),
        )  # fmt: skip
        self.disk_stats = DiskStats(
            capacity_bytes=640, used_bytes=64, stranger_bytes=0, num_files=1, num_blocks=1, dead_blocks=0,
            tenants={OTHER: 1}, counts=DiskCounts(checksum_failures=2, blocks_evicted=3),
            read_failures={"input/output error": 1}, write_failures={}, paused_s=4.0, scan=DiskScan(), io="buffered",
        )  # fmt: skip
        self.store = KVStore(
            slots,
            num_slots,
            TailsFirst(),
            StoreSettings(block_size=16, admission="all", quotas=quotas or Quotas()),
            copier=HostCopier(self.device, slots),
            disk=self.disk,
            clock=self.clock,
            observer=StoreHistograms(metrics),
        )
        self.puts = Puts(num_put=6, num_refused=1, num_dropped=2, num_waiting=3)
        self.telemetry = StoreTelemetry(
            metrics, self.store.stats, lambda: self.disk_stats, lambda: self.index, lambda: self.puts
        )
        self.device_cleared = 0
        self.managed = ManagedKVStore(
            WorkerId("p0"),
            self.store,
            disk=lambda: self.disk_stats,
            index=lambda: self.index,
            clear_device=self._clear_device,
        )

    def _clear_device(self) -> None:
        self.device_cleared += 1

    async def save(self, name: str, count: int, tenant: Tenant = NO_TENANT) -> list[BlockHash]:
        blocks = blocks_of(name, count, tenant)
        self.device.fill(range(count), blocks)
        await self.store.save(blocks, range(count))
        return hashes_of(blocks)

    def samples(self) -> dict[str, float]:
        self.telemetry.update()
        return {
            sample.name.removeprefix("headrace_")
            + "".join(f" {value}" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(render(self.registry).decode())
            for sample in family.samples
        }


@contextlib.asynccontextmanager
async def opened(bench: Bench) -> AsyncIterator[Bench]:
    try:
        yield bench
    finally:
        await bench.store.close()


async def test_blocks_are_located_tier_by_tier() -> None:
    async with opened(Bench()) as bench:
        first = await bench.save("a", 3)
        await bench.store.drain(5.0)
        bench.clock.advance(1)
        second = await bench.save("b", 3)
        await bench.store.close()
        located = bench.managed.locate([*first, *second, NOWHERE])
        assert all(located[i] & HOST for i in range(3, 6)), "the newest are in host memory"
        assert all(located[i] & (HOST | DISK) for i in range(6)), "what host memory gave up is on disk"
        assert located[6] == 0


async def test_pins_are_shown_and_end() -> None:
    async with opened(Bench(num_slots=8)) as bench:
        hashes = await bench.save("a", 3)
        assert await bench.managed.pin(hashes[:2], ttl_s=60) == 2
        assert bench.managed.locate(hashes) == bytes([HOST | PINNED_BIT] * 2 + [HOST])
        assert bench.managed.report().tiers[0].pinned == 2
        bench.clock.advance(61)
        assert bench.managed.locate(hashes) == bytes([HOST] * 3)
        await bench.managed.pin(hashes, ttl_s=60)
        assert bench.managed.unpin(hashes[:1]) == 1
        assert bench.managed.unpin(None) == 2


async def test_clearing_is_by_tier_and_tenant() -> None:
    async with opened(Bench(num_slots=8)) as bench:
        await bench.save("a", 2)
        await bench.save("b", 3, OTHER)
        assert await bench.managed.clear("host", OTHER) == 3
        assert await bench.managed.clear("host", OTHER) == 0
        assert bench.device_cleared == 0
        assert await bench.managed.clear("device", None) == 0
        assert bench.device_cleared == 1
        with pytest.raises(InvalidParameter, match="tenant"):
            await bench.managed.clear("device", OTHER)
        assert await bench.managed.clear(None, None) >= 2, "a block that is in two tiers counts twice"
        assert bench.device_cleared == 2
        assert bench.managed.report().tiers[0].used == 0


async def test_a_report_tells_whose_blocks_they_are() -> None:
    async with opened(Bench(num_slots=8, quotas=Quotas(share=0.5))) as bench:
        await bench.save("a", 2)
        await bench.save("b", 5, OTHER)
        report = bench.managed.report()
        assert [(one.tenant, one.tier, one.used, one.quota) for one in report.tenants] == [
            (OTHER, "host", 4, 4),
            (NO_TENANT, "host", 2, 8),
            (OTHER, "disk", 1, report.tiers[1].capacity // 2),
        ]
        disk = report.tiers[1]
        assert (disk.tier, disk.evicted, disk.damaged) == ("disk", 3, 2)
        assert report.index is not None
        assert (report.index.breaker, report.index.found, report.index.late, report.index.drift) == ("open", 4, 1, 5)


async def test_a_node_without_a_store_answers_all_the_same() -> None:
    bare = ManagedKVStore(WorkerId("d0"), None)
    assert bare.report().tiers == ()
    assert bare.locate([NOWHERE]) == b""
    assert await bare.pin([NOWHERE], 1.0) == bare.unpin(None) == await bare.clear(None, None) == 0


async def test_every_figure_becomes_a_metric() -> None:
    async with opened(Bench(num_slots=4)) as bench:
        hashes = await bench.save("a", 3)
        bench.clock.advance(10)
        assert bench.store.num_loadable([*hashes, NOWHERE]) == 3
        assert bench.store.num_loadable([NOWHERE]) == 0
        assert await bench.store.load(hashes, [10, 11, 12]) == 3
        bench.clock.advance(5)
        await bench.store.drain(5.0)
        await bench.save("b", 4, OTHER)
        assert bench.store._demoter is not None
        await bench.store._demoter.idle()
        found = bench.samples()
        assert found["store_requests_total hit"] == 1
        assert found["store_requests_total miss"] == 1
        assert found["store_found_blocks_total host"] == 3
        assert found["store_missed_blocks_total"] == 2
        assert found["store_capacity_blocks host"] == 4
        assert found["store_moved_blocks_total save"] == 7
        assert found["store_moved_bytes_total load"] == 3 * BLOCK_BYTES
        assert found["store_move_seconds_count load"] == 3, "in batches of a quarter of the tier"
        assert found["store_reuse_gap_seconds_sum host"] == 30, "three blocks, ten seconds after they were stored"
        assert found["store_evicted_blocks_total used host"] == 3
        assert found["store_evicted_blocks_total file disk"] == 3
        assert found["store_idle_before_eviction_seconds_sum host"] == 15
        assert found["store_block_lifetime_seconds_sum host"] == 45
        assert found[f"store_tenant_blocks {OTHER} host"] == 4
        assert found["store_checksum_failures_total disk"] == 2
        assert found["store_disk_failures_total input/output error read"] == 1
        assert found["store_disk_paused_seconds"] == 4
        assert found["store_put_blocks_total kept"] == 6
        assert found["store_put_waiting_blocks"] == 3
        assert found["index_up"] == 0
        assert found["index_lag_seconds"] == 1.5
        assert found["index_incidents_total drift"] == 5
        assert {name: found[f"index_lookups_total {name}"] for name in ("hit", "miss", "timeout", "skipped")} == {
            "hit": 4,
            "miss": 2,
            "timeout": 1,
            "skipped": 2,
        }
        assert bench.samples() == found, "an update without news changes nothing"


async def test_series_of_tenants_are_bounded() -> None:
    async with opened(Bench(num_slots=64)) as bench:
        for number in range(MAX_TENANTS + 5):
            await bench.save("a", 1 + number % 2, Tenant(f"t{number}"))
        assert sum(name.startswith("store_tenant_blocks") for name in bench.samples()) == MAX_TENANTS


async def test_the_same_prompt_under_another_salt_touches_nothing() -> None:
    """Not even what eviction goes by: an age that a stranger could change would tell him that the blocks are there."""

    def chain_under(salt: str | None) -> list[CachedBlock]:
        root = root_hash("layout", salt)
        return chain(root, hash_blocks(range(64), 16, root), tenant_of(salt))

    async with opened(Bench(num_slots=8)) as bench:
        mine, others = chain_under("mine"), chain_under("another")
        bench.device.fill(range(4), mine)
        assert await bench.store.save(mine, range(4)) == 4
        before = bench.store.stats().tiers
        assert bench.managed.locate(hashes_of(others)) == bytes(4)
        assert bench.store.num_loadable(hashes_of(others)) == 0
        assert await bench.store.load(hashes_of(others), range(10, 14)) == 0
        bench.store.requested(others)
        assert await bench.managed.pin(hashes_of(others), 60) == 0
        assert await bench.managed.clear(None, tenant_of("another")) == 0
        assert bench.store.stats().tiers == before
        samples = bench.samples()
        assert "store_reuse_gap_seconds_count host" not in samples
        assert bench.managed.locate(hashes_of(mine)) == bytes([HOST] * 4)
