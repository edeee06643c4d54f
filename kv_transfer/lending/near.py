"""NearSource: KV that this node keeps itself, beside the device: in its host memory, on its disk.

A request that waits for its first blocks gets them from here before any peer is asked. Loading may be slower than
computing, or as fast: then the first of the blocks are computed meanwhile, and the two meet in the middle.

    | valid | computed here ──▶ | ◀── loaded |  rest: borrowed, or computed |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.ids import BlockHash


@dataclass(frozen=True, slots=True)
class NearPlan:
    """Of the blocks that a request lacks: the first `num_computed` are computed here while the `num_loaded` after them are
    loaded. Without any to load there is nothing to wait for."""

    num_computed: int
    num_loaded: int


OnLoaded = Callable[[int], None]
"""`on_loaded(num_blocks)`: so many further blocks of the chain have come, verified. On the event loop."""

NOTHING_NEAR = NearPlan(0, 0)


class NearSource(Protocol):
    async def load(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[int], on_loaded: OnLoaded) -> int:
        """Bring the leading blocks of this chain into our blocks, verified. Returns how many have come, and tells
        `on_loaded` of so many more as they come, which is what a cancelled load has brought; what the others hold then
        is undefined. Nothing is written any more when it returns or raises, also when it is cancelled. Raises nothing
        that a tier can cause."""
        ...

    def plan(self, block_hashes: Sequence[BlockHash]) -> NearPlan:
        """How to come by the leading blocks of this chain, none of which is valid, in the least time. From memory."""
        ...


class NoNearSource:
    """What the device forgets is gone."""

    async def load(
        self,
        block_hashes: Sequence[BlockHash],  # noqa: ARG002  # it holds nothing
        block_ids: Sequence[int],  # noqa: ARG002
        on_loaded: OnLoaded,  # noqa: ARG002
    ) -> int:
        return 0

    def plan(self, block_hashes: Sequence[BlockHash]) -> NearPlan:  # noqa: ARG002  # it holds nothing
        return NOTHING_NEAR
