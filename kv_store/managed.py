"""ManagedKVStore: a node's store as an operator sees it: its tiers, its tenants, its index, and the engine's own cache.

Every node has one, also without a store: then there is nothing but the device's cache to speak of.
"""

from collections.abc import Callable, Sequence

from kv_store.disk.stats import DiskStats
from kv_store.index.state import IndexState
from kv_store.quotas import Quotas
from kv_store.stats import StoreStats, TierStats
from kv_store.store import KVStore
from kv_store.telemetry import num_damaged, refusals
from protocol.errors import InvalidParameter
from protocol.ids import BlockHash, WorkerId
from protocol.kv_blocks import Tenant
from protocol.kv_events import StorageTier
from protocol.store_admin import (
    MAX_TENANTS,
    PINNED_BIT,
    TIER_BITS,
    IndexReport,
    StoreReport,
    TenantReport,
    TierReport,
)


class ManagedKVStore:
    """A kv_store.admin.ManagedStore. `clear_device` forgets what the engine's prefix cache holds and nobody uses; None on a node
    without an engine. `disk` is DiskTier.stats, `index` RedisIndex.state."""

    def __init__(
        self,
        worker_id: WorkerId,
        store: KVStore | None,
        *,
        disk: Callable[[], DiskStats] | None = None,
        index: Callable[[], IndexState] | None = None,
        clear_device: Callable[[], None] | None = None,
    ) -> None:
        self._worker_id = worker_id
        self._store = store
        self._disk = disk
        self._index = index
        self._clear_device = clear_device

    def report(self) -> StoreReport:
        index = None if self._index is None else _index_report(self._index())
        if self._store is None:
            return StoreReport(worker=self._worker_id, block_bytes=0, tiers=(), index=index)
        stats, disk = self._store.stats(), None if self._disk is None else self._disk()
        return StoreReport(
            worker=self._worker_id,
            block_bytes=stats.block_bytes,
            tiers=tuple(_tier_report(tier, disk) for tier in stats.tiers),
            lookups=stats.lookups,
            hits=stats.hits,
            missed=stats.missed_blocks,
            refused=refusals(stats),
            tenants=_tenant_reports(stats, disk, self._store.quotas),
            index=index,
        )

    def locate(self, block_hashes: Sequence[BlockHash]) -> bytes:
        if self._store is None:
            return b""
        return bytes(
            TIER_BITS["host"] * place.host | TIER_BITS["disk"] * place.disk | PINNED_BIT * place.pinned
            for place in self._store.locate(block_hashes)
        )

    async def pin(self, block_hashes: Sequence[BlockHash], ttl_s: float) -> int:
        return 0 if self._store is None else await self._store.pin(block_hashes, ttl_s)

    def unpin(self, block_hashes: Sequence[BlockHash] | None) -> int:
        return 0 if self._store is None else self._store.unpin(block_hashes)

    async def clear(self, tier: StorageTier | None, tenant: Tenant | None) -> int:
        """What the device forgets is not counted, because its engine does that when it next comes to it. Raises
        InvalidParameter for a device's blocks of one tenant: it does not know them apart."""
        if tier == "device" and tenant is not None:
            raise InvalidParameter("a device's cache is cleared for all tenants or for none", param="tenant")
        if self._clear_device is not None and tier in (None, "device") and tenant is None:
            self._clear_device()
        if self._store is None or tier == "device":
            return 0
        return await self._store.clear(tier, tenant)


def _tier_report(tier: TierStats, disk: DiskStats | None) -> TierReport:
    evicted, unused = tier.evicted_used + tier.evicted_unused, tier.evicted_unused
    if disk is not None and tier.tier == "disk":
        evicted = disk.counts.blocks_evicted
    return TierReport(
        tier=tier.tier,
        capacity=tier.capacity,
        used=tier.used,
        pinned=tier.pinned,
        held=tier.held,
        found=tier.found,
        stored=tier.stored,
        evicted=evicted,
        unused=unused,
        damaged=num_damaged(tier, disk),
    )


def _tenant_reports(stats: StoreStats, disk: DiskStats | None, quotas: Quotas) -> tuple[TenantReport, ...]:
    """The largest ones of either tier. What the disk refuses it does not count by tenant."""
    reports = [
        TenantReport(tenant=one.tenant, tier="host", used=one.used, quota=one.quota, refused=one.refused)
        for one in stats.tenants
    ]
    if disk is not None:
        capacity = next((tier.capacity for tier in stats.tiers if tier.tier == "disk"), 0)
        reports += [
            TenantReport(tenant=tenant, tier="disk", used=used, quota=quotas.limit(tenant, capacity))
            for tenant, used in disk.tenants.items()
        ]
    return tuple(sorted(reports, key=lambda report: -report.used)[:MAX_TENANTS])


def _index_report(state: IndexState) -> IndexReport:
    counters = state.counters
    return IndexReport(
        breaker=state.breaker,
        retry_in_s=state.retry_in_s,
        registered=state.registered,
        lag_s=state.lag_s,
        queued=state.queued,
        entries=state.entries,
        members=state.members,
        lookups=counters.lookups,
        found=counters.hits,
        late=counters.timeouts,
        skipped=counters.skipped,
        errors=counters.errors,
        drift=counters.drift,
    )
