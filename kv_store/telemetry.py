"""StoreTelemetry: brings the store's metrics up to date with what a store, its disk and its index have counted."""

from collections.abc import Callable, Mapping
from typing import Protocol

from prometheus_client import Counter

from kv_store.disk.stats import DiskStats
from kv_store.index.state import IndexState
from kv_store.observer import Move
from kv_store.stats import StoreStats, TierStats
from kv_store.tiers import Tier
from runtime.metric_feeds import Total
from runtime.metrics import StoreMetrics

MAX_TENANTS = 20
"""That have series of their own, the largest first: every series costs memory here and in every scraper."""


class PutCounts(Protocol):
    """Blocks on their way to store nodes (now waiting), and what became of the others."""

    @property
    def num_put(self) -> int: ...

    @property
    def num_refused(self) -> int: ...

    @property
    def num_dropped(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...


class StoreHistograms:
    """A StoreObserver that observes: what happens to single blocks and batches. From any thread."""

    def __init__(self, metrics: StoreMetrics) -> None:
        self._metrics = metrics

    def reused(self, tier: Tier, gap_s: float) -> None:
        self._metrics.reuse_gap.labels(tier).observe(gap_s)

    def evicted(self, tier: Tier, lifetime_s: float, idle_s: float, num_uses: int) -> None:  # noqa: ARG002  # totals have it
        self._metrics.lifetime.labels(tier).observe(lifetime_s)
        self._metrics.idle.labels(tier).observe(idle_s)

    def moved(self, move: Move, num_blocks: int, num_bytes: int, seconds: float) -> None:  # noqa: ARG002  # totals have it
        self._metrics.move_seconds.labels(move).observe(seconds)


class StoreTelemetry:
    """`stats` is KVStore.stats, `disk` DiskTier.stats, `index` RedisIndex.state, where there are such; `puts` counts what goes to
    store nodes."""

    def __init__(
        self,
        metrics: StoreMetrics,
        stats: Callable[[], StoreStats],
        disk: Callable[[], DiskStats] | None = None,
        index: Callable[[], IndexState] | None = None,
        puts: Callable[[], PutCounts] | None = None,
    ) -> None:
        self._metrics = metrics
        self._stats = stats
        self._disk = disk
        self._index = index
        self._puts = puts
        self._totals: dict[tuple[str, ...], Total] = {}

    def update(self) -> None:
        stats = self._stats()
        disk = None if self._disk is None else self._disk()
        self._show_tiers(stats, disk)
        self._show_requests(stats)
        self._show_moves(stats)
        if disk is not None:
            self._show_disk(disk)
        if self._index is not None:
            self._show_index(self._index())
        if self._puts is not None:
            self._show_puts(self._puts())

    def _show_tiers(self, stats: StoreStats, disk: DiskStats | None) -> None:
        metrics = self._metrics
        metrics.tiers.set({(tier.tier,): _tier_values(tier, disk) for tier in stats.tiers})
        for tier in stats.tiers:
            if tier.tier == "host":
                self._count(metrics.evicted, tier.evicted_used, tier.tier, "used")
                self._count(metrics.evicted, tier.evicted_unused, tier.tier, "unused")
        largest = sorted(stats.tenants, key=lambda tenant: -tenant.used)[:MAX_TENANTS]
        metrics.tenants.set({(one.tenant, "host"): {"used": one.used, "quota": one.quota} for one in largest})

    def _show_requests(self, stats: StoreStats) -> None:
        metrics = self._metrics
        self._count(metrics.requests, stats.hits, "hit")
        self._count(metrics.requests, stats.lookups - stats.hits, "miss")
        self._count(metrics.missed_blocks, stats.missed_blocks)
        for reason, count in refusals(stats).items():
            self._count(metrics.refused, count, reason)
        metrics.second_touch.set(stats.second_touch)
        metrics.quarantined.set(stats.quarantined)

    def _show_moves(self, stats: StoreStats) -> None:
        for move, done in stats.moves.items():
            self._count(self._metrics.moved_blocks, done.blocks, move)
            self._count(self._metrics.moved_bytes, done.bytes, move)
            self._count(self._metrics.move_failures, done.failures, move)

    def _show_disk(self, disk: DiskStats) -> None:
        self._metrics.disk_paused.set(disk.paused_s)
        self._count(self._metrics.evicted, disk.counts.blocks_evicted, "disk", "file")
        failures: Mapping[str, Mapping[str, int]] = {"read": disk.read_failures, "write": disk.write_failures}
        for operation, by_cause in failures.items():
            for cause, count in by_cause.items():
                self._count(self._metrics.disk_failures, count, operation, cause)

    def _show_index(self, index: IndexState) -> None:
        metrics, counters = self._metrics, index.counters
        metrics.index_up.set(index.breaker == "closed")
        metrics.index_lag.set(index.lag_s)
        metrics.index_queue.set(index.queued)
        metrics.index_entries.set(index.entries)
        for outcome, field in _LOOKUPS.items():
            self._count(metrics.index_lookups, getattr(counters, field), outcome)
        for cause, field in _LATE.items():
            self._count(metrics.index_late, getattr(counters, field), cause)
        for outcome in _WRITES:
            self._count(metrics.index_writes, getattr(counters, outcome), outcome)
        for kind, field in _INCIDENTS.items():
            self._count(metrics.index_incidents, getattr(counters, field), kind)

    def _show_puts(self, puts: PutCounts) -> None:
        self._metrics.put_waiting.set(puts.num_waiting)
        for outcome, count in (("kept", puts.num_put), ("refused", puts.num_refused), ("dropped", puts.num_dropped)):
            self._count(self._metrics.put_blocks, count, outcome)

    def _count(self, counter: Counter, total: float, *labels: str) -> None:
        key = (str(id(counter)), *labels)
        if key not in self._totals:
            self._totals[key] = Total(counter.labels(*labels) if labels else counter)
        self._totals[key].set(total)


_LOOKUPS = {"hit": "hits", "miss": "misses", "timeout": "timeouts", "error": "errors", "skipped": "skipped"}
_LATE = {"server": "slow_server", "loop": "late_loop"}
_WRITES = ("published", "withdrawn", "crowded", "fenced")
_INCIDENTS = {
    "drift": "drift",
    "resync": "resyncs",
    "overflow": "overflows",
    "outage": "outages",
    "garbage": "garbage",
    "swept": "swept",
}


def refusals(stats: StoreStats) -> dict[str, int]:
    """Blocks that were not taken in, or not taken on to disk, by reason."""
    return {
        "admission": stats.refused_by_admission,
        "quota": stats.refused_by_quota,
        "room": stats.refused_without_room,
        "backlog": stats.dropped_demotions,
    }


def num_damaged(tier: TierStats, disk: DiskStats | None) -> int:
    """The disk tier keeps its own books of what it found damaged."""
    return tier.checksum_failures + (disk.counts.checksum_failures if disk is not None and tier.tier == "disk" else 0)


def _tier_values(tier: TierStats, disk: DiskStats | None) -> dict[str, float]:
    return {
        "capacity": tier.capacity,
        "used": tier.used,
        "pinned": tier.pinned,
        "held": tier.held,
        "found": tier.found,
        "stored": tier.stored,
        "damaged": num_damaged(tier, disk),
    }
