"""Entry: one block in one slot of a tier, and what is said of several at once."""

from dataclasses import dataclass, field

from kv_store.tiers import StoredBlock, Tier
from protocol.kv_blocks import CachedBlock


class Entry:
    """One block in a slot, from `reserve` until the slot is free again. Only the directory changes it."""

    __slots__ = (
        "block",
        "checksum",
        "doomed",
        "heard",
        "leaving",
        "num_readers",
        "num_uses",
        "pinned_until",
        "ready",
        "slot",
        "stored_at",
        "used_at",
    )

    def __init__(self, block: CachedBlock, slot: int) -> None:
        self.block = block
        self.slot = slot
        self.checksum = 0
        self.ready = False
        self.leaving = False
        self.doomed = False
        self.heard = False
        """The policy knows of the use that is about to come."""
        self.num_readers = 0
        self.num_uses = 0
        self.pinned_until = 0.0
        self.stored_at = 0.0
        self.used_at = 0.0

    def stored(self, tier: Tier) -> StoredBlock:
        return StoredBlock(self.block, tier, self.slot, self.checksum)


@dataclass(frozen=True, slots=True)
class Reservation:
    """`entries`: to be written and then committed or aborted, in the order of the blocks that were asked for. `evicted`: what
    had to go for them. The other blocks: already here or on their way, beyond the tenant's quota, or without room."""

    entries: tuple[Entry, ...]
    evicted: tuple[Entry, ...]
    num_duplicates: int
    num_over_quota: int
    num_without_room: int


@dataclass(frozen=True, slots=True)
class Held:
    """Leading blocks of a chain that stay where they are until `KVStore.let_go`, once. Slot `slots[i]` holds `blocks[i]`."""

    blocks: tuple[CachedBlock, ...]
    slots: tuple[int, ...]
    checksums: tuple[int, ...]
    entries: tuple[Entry, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Slots by state; `held`, `pinned` and `leaving` are ready ones."""

    free: int
    writing: int
    ready: int
    doomed: int
    held: int
    pinned: int
    leaving: int
