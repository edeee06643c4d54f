"""EvictionPolicy: the order in which a tier gives up its blocks. Pure bookkeeping: it holds no bytes and frees none.

A policy hears of every request, also of what it wanted in vain, because what comes back is what there is to learn. It may
remember addresses that have been evicted, a bounded number of them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock


class EvictionPolicy(Protocol):
    """Of one tier. Not thread-safe; `now` is in seconds and never falls. All methods are amortised O(log n) a block or better.

    Every victim that is chosen keeps the rest usable: a block goes before the block that it continues, as far as
    `may_evict` lets it, because a chain without its head is worth nothing.
    """

    def wanted(self, blocks: Sequence[CachedBlock], num_held: int, now: float) -> None:
        """A request wants this chain, of which the first `num_held` blocks are in the tier. Once a request, before what
        it computes is added."""
        ...

    def added(self, blocks: Sequence[CachedBlock], now: float) -> None:
        """These are in the tier from now on, and were not before."""
        ...

    def removed(self, block_hashes: Sequence[BlockHash]) -> None:
        """These are not in the tier any more, whether evicted or dropped for another reason."""
        ...

    def victims(self, count: int, now: float, may_evict: Callable[[BlockHash], bool]) -> list[BlockHash]:
        """Up to `count` blocks to give up, the first of them first; fewer if no more may go. They count as held until
        `removed`."""
        ...
