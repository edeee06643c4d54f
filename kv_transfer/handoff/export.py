"""Export: a context's blocks, announced to one reader and kept for it under a lease. A state machine without I/O.

    computing --finish--> leased --+-- released (by the reader)
        |                          +-- expired  (ttl_s after the prefill finished or the last renewal)
        +--- failed ---------------+            any state may also fail

A prefix that is lent is leased from the start. What comes after the end changes nothing. A reader that loses its stream may
attach again until then, and hears everything from the start; two at once may not.

Of a block's way: submitted (final) -> staged (there for peers, its checksum known) -> announced; to a reader that wants
them pushed they are announced when they have landed.

Where wire blocks are scarce (kv_transfer.memory.staging) they are staged for the reader that is attached, from the first block that
it lacks (`restart`), and taken back as they land there (`take_back`), to be staged in for what comes next.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kv_transfer.handoff.push import Push
from kv_transfer.memory.staging import StagedBlocks
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


@dataclass(frozen=True, slots=True)
class AllLent:
    """What ends the announcements of a lent prefix."""


@dataclass(frozen=True, slots=True)
class ExportStats:
    """Totals since start; `num_open` and `num_unsettled` are now. opened = open + released + expired + failed, always.
    `num_unsettled`: exports that have ended and whose blocks something still copies or writes from."""

    num_open: int
    num_opened: int
    num_released: int
    num_expired: int
    num_failed: int
    num_bytes_announced: int
    num_unsettled: int


class Export:
    """Created by ExportTable. `changed` is set whenever a reader may find something new; `give_back` is called once, when
    the blocks are the owner's again; `on_doubt` before that, where the reader calls a block damaged."""

    def __init__(self, ticket: TransferTicket, give_back: Callable[[], None], *, scarce: bool = False) -> None:
        self.ticket = ticket
        self.give_back = give_back
        self.on_doubt: Callable[[int], None] | None = None
        self._scarce = scarce
        self.attached = False
        self.staging: asyncio.Task[None] | None = None
        self.push: Push | None = None
        self.changed = asyncio.Event()
        self.ended = False
        self._end_error: HeadraceError | None = None
        self._block_ids: list[int] = []
        self._wire_ids: list[int] = []
        self._checksums: list[int] = []
        self._first_staged = 0
        self._num_taken_back = 0
        self._readable: set[int] = set()
        self._completion: Completion | AllLent | None = None
        self._renewed_at: float | None = None
        self._finished_at: float | None = None

    @property
    def num_staged(self) -> int:
        """Leading blocks that are staged, or that the reader had before."""
        return self._first_staged + len(self._wire_ids)

    @property
    def settled(self) -> bool:
        """Nothing copies or writes from its blocks."""
        return self.staging is None and not self.writing

    @property
    def writing(self) -> bool:
        """A push of it has not ended."""
        return self.push is not None and self.push.writing

    @property
    def pushed(self) -> bool:
        """Everything has landed at a reader, and nothing is to come."""
        return self._completion is not None and self.push is not None and self.push.num_landed >= len(self._block_ids)

    def submit(self, first_block: int, block_ids: Sequence[int]) -> None:
        """Blocks first_block, ... are final."""
        assert first_block == len(self._block_ids), (
            f"block {first_block} is published after {len(self._block_ids)} blocks"
        )
        assert self._completion is None, "blocks are published after the prefill finished"
        self._block_ids.extend(block_ids)

    def unstaged(self, max_blocks: int) -> tuple[int, ...]:
        """The next KV blocks to stage."""
        return tuple(self._block_ids[self.num_staged : self.num_staged + max_blocks])

    def stage(self, staged: StagedBlocks) -> None:
        """The next of the submitted blocks are there for peers."""
        self._wire_ids.extend(staged.wire_ids)
        self._checksums.extend(staged.checksums)
        self._readable.update(staged.wire_ids)
        if self.push is not None:
            self.offer_push(self.push)
        self.changed.set()

    def restart(self, first_block: int) -> tuple[int, ...]:
        """A reader lacks the blocks from here on, and will hear of them anew. Returns what is to be unstaged: all that was
        staged for another. Nothing may be reading or writing that."""
        taken_back = self.take_back(self.num_staged)
        self._first_staged = first_block
        self._num_taken_back = 0
        self._wire_ids.clear()
        self._checksums.clear()
        return taken_back

    def take_back(self, num_blocks: int) -> tuple[int, ...]:
        """Nobody needs the wire blocks of this many leading blocks any more. Returns those to be unstaged."""
        upto = max(self._num_taken_back, min(num_blocks, self.num_staged) - self._first_staged)
        taken_back = tuple(self._wire_ids[self._num_taken_back : upto])
        self._num_taken_back = upto
        self._readable.difference_update(taken_back)
        return taken_back

    def finish(self, completion: Completion | AllLent, now: float) -> None:
        """The prefill is done; the reader hears so after the last submitted block."""
        self._completion = completion
        self._finished_at = now
        if self.push is not None:
            self.push.hasten()
        self.changed.set()

    def offer_push(self, push: Push) -> None:
        """Let a push have what it has not been offered yet."""
        push.offer(self._wire_ids[push.num_offered - self._first_staged :])
        if self._completion is not None:
            push.hasten()

    def renew(self, now: float) -> None:
        self._renewed_at = now

    def end(self, error: HeadraceError | None) -> None:
        """Terminal. `error` is what a reader that still listens gets to hear; None if it ended this itself."""
        assert not self.ended
        self.ended = True
        self._end_error = error
        if self.push is not None:
            self.push.stop()
        self.changed.set()

    def expired(self, now: float) -> bool:
        """Only a finished prefill can expire: until then the blocks are the prefill's own."""
        if self._finished_at is None:
            return False
        return now >= max(self._finished_at, self._renewed_at or self._finished_at) + self.ticket.ttl_s

    def may_read(self, wire_ids: Sequence[int]) -> bool:
        """Safe from any thread: ids come and go one at a time."""
        return not self.ended and all(block_id in self._readable for block_id in wire_ids)

    def next_message(self, cursor: int, now: float) -> HandoffMessage | None:
        """What a reader that heard of `cursor` blocks gets next: None if there is nothing new."""
        if self.ended:
            return None if self._end_error is None else HandoffFailed(self._end_error.to_info(), self.writing)
        num_ready = self.num_staged if self.push is None else self.push.num_landed
        if cursor < num_ready:
            start = cursor - self._first_staged
            news = slice(start, start + min(num_ready - cursor, MAX_BLOCKS_PER_MESSAGE))
            ids, sums = tuple(self._wire_ids[news]), tuple(self._checksums[news])
            return BlocksReady(cursor, ids, sums, scarce=self._scarce and self.push is None)
        if self._completion is None or cursor < len(self._block_ids):
            return None
        return self._end_message(self._completion, now)

    def _end_message(self, completion: Completion | AllLent, now: float) -> HandoffMessage:
        if isinstance(completion, AllLent):
            return PrefixDone()
        wire_s = 0.0 if self.push is None else self.push.timeline.exposed(completion.computed_at, now).wire_s
        return PrefillDone(
            first_token=completion.first_token,
            finished=completion.finished,
            since_computed_s=max(0.0, now - completion.computed_at),
            phases=completion.phases,
            wire_s=wire_s,
        )


def lease_gone(why: str) -> LeaseExpired:
    return LeaseExpired(f"the exported KV blocks are gone: {why}")
