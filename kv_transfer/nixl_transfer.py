"""NixlTransfer: one read or write of many blocks, cut into chunks that are posted one by one.

Chunks exist because some of the library's calls copy all bytes before they return: a large transfer would keep all others
waiting. Two are in flight at once, so that the wire has work while one ends.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kv_transfer.nixl_blocks import NixlBlocks
from protocol.errors import PeerLost, TransferError

CHUNK_BYTES = 8 << 20
"""About a millisecond of one core's copying. Larger chunks gain nothing; of smaller ones the first microseconds count."""
CHUNKS_IN_FLIGHT = 2

Operation = Literal["READ", "WRITE"]
Indices = NDArray[np.int32]


class NixlPeer:
    """A remote agent known to ours. The agent thread alone changes it."""

    def __init__(self, name: str, metadata: bytes, blocks: NixlBlocks) -> None:
        self.name = name
        self.metadata = metadata
        self.blocks = blocks
        self.descriptors: Any = None
        """The library's handle on all blocks of the peer."""
        self.num_links = 0
        self.num_transfers = 0
        self.lost = False

    @property
    def in_use(self) -> bool:
        return self.num_links > 0 or self.num_transfers > 0


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """sources[i] goes to destinations[i], in an order in which neighbours on both sides stand beside each other: the
    library merges those into one descriptor. `num_pieces`: what is left after merging."""

    sources: Indices
    destinations: Indices
    num_pieces: int


def plan_copy(sources: Sequence[int], destinations: Sequence[int], chunk_blocks: int) -> CopyPlan:
    """In order of destination; the ids are known to be in range. Raises TransferError if the two differ in length or two
    blocks would land in the same place."""
    if len(sources) != len(destinations):
        raise TransferError(f"{len(sources)} blocks cannot go to {len(destinations)} places")
    from_ids, to_ids = np.array(sources, np.int32), np.array(destinations, np.int32)
    order = np.argsort(to_ids)
    from_ids, to_ids = from_ids[order], to_ids[order]
    steps = np.diff(to_ids)
    if not steps.all():
        raise TransferError("two blocks would land in the same place")
    breaks = (steps != 1) | (np.diff(from_ids) != 1)
    breaks[chunk_blocks - 1 :: chunk_blocks] = True
    return CopyPlan(from_ids, to_ids, int(breaks.sum()) + min(1, len(to_ids)))


class NixlTransfer:
    """`ended` gets None, or an error, when no byte of it can move any more. The agent thread alone changes the rest, but
    for `abandoned`: set by who stopped waiting, so that no further chunk starts and polling may be slow."""

    def __init__(
        self,
        operation: Operation,
        peer: NixlPeer,
        plan: CopyPlan,
        chunk_blocks: int,
        ended: asyncio.Future[None],
    ) -> None:
        self.operation: Operation = operation
        self.peer = peer
        self.ended = ended
        self.loop = ended.get_loop()
        self.abandoned = False
        self.error: TransferError | None = None
        self.in_flight: list[Any] = []
        """The library's handles of the chunks that are posted and not over."""
        self._plan = plan
        self._chunk_blocks = chunk_blocks
        self._num_posted = 0

    @property
    def _all_posted(self) -> bool:
        """Or given up: no further chunk will start."""
        given_up = self.error is not None or self.abandoned or self.peer.lost
        return given_up or self._num_posted == len(self._plan.sources)

    @property
    def may_post(self) -> bool:
        return len(self.in_flight) < CHUNKS_IN_FLIGHT and not self._all_posted

    @property
    def over(self) -> bool:
        return not self.in_flight and self._all_posted

    def next_chunk(self) -> tuple[Indices, Indices]:
        """Local and remote indices of the next chunk, which is about to be posted."""
        chunk = slice(self._num_posted, self._num_posted + self._chunk_blocks)
        sources, destinations = self._plan.sources[chunk], self._plan.destinations[chunk]
        self._num_posted += len(sources)
        return (destinations, sources) if self.operation == "READ" else (sources, destinations)

    def outcome(self) -> TransferError | None:
        """Why it did not move everything, once it is over."""
        if self.error is None and self._num_posted < len(self._plan.sources):
            return PeerLost("the connection to the peer is lost, or the transfer was given up")
        return self.error
