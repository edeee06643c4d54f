"""Export: a context's blocks, announced to one reader and kept for it under a lease. A state machine without I/O.

    computing --finish--> leased --+-- released (by the reader)
        |                          +-- expired  (ttl_s after the prefill finished or the last renewal)
        +--- failed ---------------+            any state may also fail

A prefix that is lent is leased from the start. What comes after the end changes nothing. A reader that loses its stream may attach again until then, and hears
everything from the start; two at once may not.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.errors import HeadraceError, LeaseExpired
from protocol.phases import PrefillPhases
from protocol.tokens import SampledToken
from protocol.transfer import BlocksReady, HandoffFailed, HandoffMessage, PrefillDone, PrefixDone, TransferTicket

MAX_BLOCKS_PER_MESSAGE = 4096


@dataclass(frozen=True, slots=True)
class Completion:
    """What ends a hand-off well. `computed_at`: instant of the owner's clock at which its last chunk ended."""

    first_token: SampledToken
    finished: bool
    computed_at: float
    phases: PrefillPhases

    def message(self, now: float) -> PrefillDone:
        since_computed_s = max(0.0, now - self.computed_at)
        return PrefillDone(self.first_token, self.finished, since_computed_s, self.phases)


class Lent:
    """What ends the announcements of a lent prefix."""

    def message(self, _: float) -> PrefixDone:
        return PrefixDone()


class Export:
    """Created by ExportTable. `changed` is set whenever a reader may find something new; `give_back` is called once, when
    the blocks are the owner's again. `scarce`: what is announced lies in staging memory, for one reader at a time
    (`restart`)."""

    def __init__(self, ticket: TransferTicket, give_back: Callable[[], None], *, scarce: bool = False) -> None:
        self.ticket = ticket
        self.give_back = give_back
        self._scarce = scarce
        self.attached = False
        self.changed = asyncio.Event()
        self.ended = False
        self._end_error: HeadraceError | None = None
        self._first = 0
        self._block_ids: list[int] = []
        self._checksums: list[int] = []
        self._readable: set[int] = set()
        self._submitted = 0
        self._completion: Completion | Lent | None = None
        self._renewed_at: float | None = None
        self._finished_at: float | None = None

    @property
    def num_announced(self) -> int:
        return self._first + len(self._block_ids)

    def submit(self, first_block: int, num_blocks: int) -> None:
        """Blocks first_block, ... are final; their checksums will follow, in the same order, by `announce`."""
        assert first_block == self._submitted, f"block {first_block} is published after {self._submitted} blocks"
        assert self._completion is None, "blocks are published after the prefill finished"
        self._submitted += num_blocks

    def announce(self, block_ids: Sequence[int], checksums: Sequence[int]) -> None:
        self._block_ids.extend(block_ids)
        self._checksums.extend(checksums)
        self._readable.update(block_ids)
        self.changed.set()

    def restart(self, first_block: int) -> None:
        """Forget what was announced: a reader will hear of these blocks anew, from `first_block` on."""
        self._first = first_block
        self._block_ids.clear()
        self._checksums.clear()
        self._readable.clear()

    def withdraw(self, block_ids: Sequence[int]) -> None:
        """Of announced blocks: nobody may read them any more under these ids."""
        self._readable.difference_update(block_ids)

    def finish(self, completion: Completion | Lent, now: float) -> None:
        """Everything is submitted; the reader hears so after the last submitted block."""
        self._completion = completion
        self._finished_at = now
        self.changed.set()

    def renew(self, now: float) -> None:
        self._renewed_at = now

    def end(self, error: HeadraceError | None) -> None:
        """Terminal. `error` is what a reader that still listens gets to hear; None if it ended this itself."""
        assert not self.ended
        self.ended = True
        self._end_error = error
        self.changed.set()

    def expired(self, now: float) -> bool:
        """Only a finished prefill can expire: until then the blocks are the prefill's own."""
        if self._finished_at is None:
            return False
        return now >= max(self._finished_at, self._renewed_at or self._finished_at) + self.ticket.ttl_s

    def may_read(self, block_ids: Sequence[int]) -> bool:
        """Safe from any thread: ids come and go one at a time."""
        return not self.ended and all(block_id in self._readable for block_id in block_ids)

    def next_message(self, cursor: int, now: float) -> HandoffMessage | None:
        """What a reader that heard of `cursor` blocks gets next: None if there is nothing new."""
        if self.ended:
            if self._end_error is None:
                return None
            return HandoffFailed(self._end_error.to_info())
        if cursor < self.num_announced:
            news = slice(cursor - self._first, cursor - self._first + MAX_BLOCKS_PER_MESSAGE)
            ids, sums = tuple(self._block_ids[news]), tuple(self._checksums[news])
            return BlocksReady(cursor, ids, sums, scarce=self._scarce)
        if self._completion is None or self.num_announced < self._submitted:
            return None
        return self._completion.message(now)


def lease_gone(why: str) -> LeaseExpired:
    return LeaseExpired(f"the exported KV blocks are gone: {why}")
