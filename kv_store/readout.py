"""A store's statistics, read at one moment from its tiers and counters."""

from kv_store.host_tier import HostTier
from kv_store.stats import Counters, StoreStats, TenantStats, TierStats
from kv_store.tiers import BlockDisk
from protocol.kv_blocks import Tenant


def read_stats(host: HostTier, disk: BlockDisk | None, now: float) -> StoreStats:
    """From any thread. Each tier's figures fit together; those of two tiers may be a moment apart."""
    counters = host.read_counters()
    tiers = [_host_stats(host, counters)]
    if disk is not None:
        tiers.append(_disk_stats(disk, counters, host.memory.block_bytes))
    with host.lock:
        second_touch = host.admission.second_touch(now)
    return StoreStats(
        block_bytes=host.memory.block_bytes,
        tiers=tuple(tiers),
        tenants=_tenant_stats(host, counters),
        moves=counters.moves,
        lookups=counters.lookups,
        hits=counters.hits,
        missed_blocks=counters.missed_blocks,
        dropped_demotions=counters.dropped_demotions,
        refused_by_admission=counters.refused_by_admission,
        refused_by_quota=sum(counters.refused_by_quota.values()),
        refused_without_room=counters.refused_without_room,
        quarantined=counters.quarantined,
        second_touch=second_touch,
    )


def _host_stats(host: HostTier, counters: Counters) -> TierStats:
    slots = host.occupancy()
    return TierStats(
        tier="host",
        capacity=host.num_slots,
        used=host.num_slots - slots.free,
        writing=slots.writing,
        held=slots.held,
        pinned=slots.pinned,
        leaving=slots.leaving,
        found=counters.found_host,
        stored=counters.stored_host,
        read=counters.read_host,
        evicted_used=counters.evicted_used,
        evicted_unused=counters.evicted_unused,
        checksum_failures=counters.checksum_failures,
    )


def _disk_stats(disk: BlockDisk, counters: Counters, block_bytes: int) -> TierStats:
    figures = disk.stats()
    demoted, promoted = counters.moves.get("demote"), counters.moves.get("promote")
    return TierStats(
        tier="disk",
        capacity=figures.capacity_bytes // block_bytes,
        used=figures.num_blocks,
        found=counters.found_disk,
        stored=demoted.blocks if demoted else 0,
        read=promoted.blocks if promoted else 0,
    )


def _tenant_stats(host: HostTier, counters: Counters) -> tuple[TenantStats, ...]:
    used = host.slots_by_tenant()
    return tuple(
        TenantStats(
            tenant=Tenant(tenant),
            used=used.get(tenant, 0),
            quota=host.quotas.limit(tenant, host.num_slots),
            refused=counters.refused_by_quota.get(tenant, 0),
        )
        for tenant in sorted(used.keys() | counters.refused_by_quota.keys())
    )
