"""EvictionPolicy: the order in which a tier gives up its blocks. Pure bookkeeping: it holds no bytes and frees none.

A policy hears of every request, also of what it wanted in vain, because what comes back is what there is to learn. It may
remember addresses that have been evicted, a bounded number of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock

STEP_BLOCKS = 256
"""Of a chain, looked at in one step of `wanted`: prompts have thousands of blocks, and somebody waits for the tier's lock."""


class EvictionPolicy(Protocol):
    """Of one tier. Not thread-safe; `now` is in seconds and never falls. All methods are amortised O(log n) a block or better.

    Every victim that is chosen keeps the rest usable: a block goes before the block that it continues, as far as
    `may_evict` lets it, because a chain without its head is worth nothing.
    """

    def wanted(self, blocks: Sequence[CachedBlock], num_held: int, now: float) -> Iterator[None]:
        """A request wants this chain, of which the first `num_held` blocks are in the tier. Once a request, before what
        it computes is added. Happens as it is iterated, to the end; each step looks at some STEP_BLOCKS blocks and
        ends with sound books, so that anything else may happen between two."""
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


def steps_of(blocks: Sequence[CachedBlock]) -> Iterator[Sequence[CachedBlock]]:
    """STEP_BLOCKS of them at a time."""
    for first in range(0, len(blocks), STEP_BLOCKS):
        yield blocks[first : first + STEP_BLOCKS]
