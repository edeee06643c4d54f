"""What a store has done and what it holds, as values: by tier, by tenant, and in all."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kv_store.observer import Move
from kv_store.tiers import Tier
from protocol.kv_blocks import Tenant

MAX_NAMED_TENANTS = 1024
OTHER_TENANTS = Tenant("others")


@dataclass(frozen=True, slots=True)
class TierStats:
    """In blocks. `found`: leading blocks that requests were told of; `read`: to a device, or held for a reader elsewhere.
    `held`, `pinned` and `leaving` are among `used`. Of the disk, which keeps its own books, the store knows what passed."""

    tier: Tier
    capacity: int
    used: int
    writing: int = 0
    held: int = 0
    pinned: int = 0
    leaving: int = 0
    found: int = 0
    stored: int = 0
    read: int = 0
    evicted_used: int = 0
    evicted_unused: int = 0
    checksum_failures: int = 0


@dataclass(frozen=True, slots=True)
class TenantStats:
    """In blocks of the host tier."""

    tenant: Tenant
    used: int
    quota: int
    refused: int
    """Beyond its quota, with nothing of its own to give up."""


@dataclass(frozen=True, slots=True)
class MoveStats:
    """`failures`: batches that a copier or a disk failed at."""

    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class StoreStats:
    """`lookups`, `hits`: requests that asked, and those with a block here. `missed_blocks`: those that no tier had."""

    block_bytes: int
    tiers: tuple[TierStats, ...]
    tenants: tuple[TenantStats, ...]
    moves: Mapping[Move, MoveStats]
    lookups: int
    hits: int
    missed_blocks: int
    dropped_demotions: int
    refused_by_admission: int
    refused_by_quota: int
    refused_without_room: int
    quarantined: int
    second_touch: bool


@dataclass(slots=True)
class Counters:
    """What a store counts as it goes; guarded by its lock."""

    lookups: int = 0
    hits: int = 0
    missed_blocks: int = 0
    found_host: int = 0
    found_disk: int = 0
    stored_host: int = 0
    read_host: int = 0
    evicted_used: int = 0
    evicted_unused: int = 0
    checksum_failures: int = 0
    dropped_demotions: int = 0
    refused_by_admission: int = 0
    refused_without_room: int = 0
    quarantined: int = 0
    refused_by_quota: dict[Tenant, int] = field(default_factory=dict)
    moves: dict[Move, MoveStats] = field(default_factory=dict)

    def over_quota(self, tenant: Tenant, num_blocks: int) -> None:
        """Of one tenant, as long as few enough were refused to name them all: salts are the clients' to make up."""
        known = tenant in self.refused_by_quota or len(self.refused_by_quota) < MAX_NAMED_TENANTS
        name = tenant if known else OTHER_TENANTS
        self.refused_by_quota[name] = self.refused_by_quota.get(name, 0) + num_blocks

    def moved(self, move: Move, blocks: int, num_bytes: int, seconds: float) -> None:
        old = self.moves.get(move, MoveStats())
        self.moves[move] = MoveStats(old.blocks + blocks, old.bytes + num_bytes, old.seconds + seconds, old.failures)

    def failed(self, move: Move) -> None:
        old = self.moves.get(move, MoveStats())
        self.moves[move] = MoveStats(old.blocks, old.bytes, old.seconds, old.failures + 1)
