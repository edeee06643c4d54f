"""NearSource: KV that this node keeps itself, beside the device: in its host memory, on its disk.

A request that waits for its first blocks gets them from here before any peer is asked. Loading may be slower than
computing, or as fast: then the first of the blocks are computed meanwhile, and the two meet in the middle.

    | valid | computed here ──▶ | ◀── loaded |  rest: borrowed, or computed |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.ids import BlockHash


@dataclass(frozen=True, slots=True)
class NearPlan:
    """Of the blocks that a request lacks: the first `num_computed` are computed here while the `num_loaded` after them are
    loaded. Without any to load there is nothing to wait for."""

    num_computed: int
    num_loaded: int


NOTHING_NEAR = NearPlan(0, 0)


class NearSource(Protocol):
    async def load(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> int:
        """Bring the leading blocks of this chain into our blocks, verified. Returns how many have come; what the others
        hold then is undefined. Nothing is written any more when it returns or raises, also when it is cancelled. Raises
        nothing that a tier can cause."""
        ...

    def plan(self, block_hashes: Sequence[BlockHash]) -> NearPlan:
        """How to come by the leading blocks of this chain, none of which is valid, in the least time. From memory."""
        ...


class NoNearSource:
    """What the device forgets is gone."""

    async def load(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> int:  # noqa: ARG002  # it holds nothing
        return 0

    def plan(self, block_hashes: Sequence[BlockHash]) -> NearPlan:  # noqa: ARG002  # it holds nothing
        return NOTHING_NEAR
