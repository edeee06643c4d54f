"""What a store tells whoever measures it, one fact at a time. Totals are in kv_store.stats; here is what makes histograms."""

from typing import Literal, Protocol

from kv_store.tiers import Tier

Move = Literal["save", "load", "demote", "promote", "receive"]
"""Device to host, host to device, host to disk, disk to host, another node to host."""


class StoreObserver(Protocol):
    """Called from any thread, under the store's lock: takes microseconds, calls nothing of the store and never raises."""

    def reused(self, tier: Tier, gap_s: float) -> None:
        """A block was read `gap_s` after it was stored or last read."""
        ...

    def evicted(self, tier: Tier, lifetime_s: float, idle_s: float, num_uses: int) -> None:
        """A block was given up, `lifetime_s` after it was stored and `idle_s` after its last use."""
        ...

    def moved(self, move: Move, num_blocks: int, num_bytes: int, seconds: float) -> None:
        """One batch has been moved, its checksums computed or verified."""
        ...


class NoObserver:
    def reused(self, tier: Tier, gap_s: float) -> None:
        pass

    def evicted(self, tier: Tier, lifetime_s: float, idle_s: float, num_uses: int) -> None:
        pass

    def moved(self, move: Move, num_blocks: int, num_bytes: int, seconds: float) -> None:
        pass
