"""Stager: brings one export's final blocks to the wire, in order. Event loop only.

    final blocks | staged, announced | given back      KV blocks of one context, from its beginning
                                                       wire blocks are held between "staged" and "given back"

Where staging takes nothing from anybody (Staging.eager) blocks are staged as soon as they are final, once and for all.
Elsewhere they are staged for the reader that is attached, from the first block that it lacks, as room comes; what it says
has landed is given back, so that a context larger than the staging memory streams through it. A reader that has lost its
stream begins anew.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence

from kv_transfer.staging import StagedBlocks, Staging

Announce = Callable[[int, StagedBlocks], None]
"""Of blocks `first_block`, ... of the context. Called in their order, on the event loop."""


class Stager:
    """`failed` is called, at most once, with what staging raised; nothing is staged after it."""

    def __init__(self, staging: Staging, announce: Announce, failed: Callable[[Exception], None]) -> None:
        self._staging = staging
        self._announce = announce
        self._failed = failed
        self._final: list[int] = []
        self._next = 0
        self._staged: deque[tuple[int, int]] = deque()
        """Place in the context and wire id of what is to be given back, in order."""
        self._wanted = staging.eager
        self._task: asyncio.Task[None] | None = None

    def publish(self, block_ids: Sequence[int]) -> None:
        """The next blocks of the context are final. Returns at once."""
        self._final.extend(block_ids)
        self._start()

    def attach(self, first_block: int) -> tuple[int, ...]:
        """A reader is there, and lacks the blocks from here on. What another was told before holds no more: returns the wire
        ids of that, given back."""
        given_back = self.detach()
        if not self._staging.eager:
            self._next = first_block
            self._wanted = True
            self._start()
        return given_back

    def landed(self, num_blocks: int) -> tuple[int, ...]:
        """The reader has this many leading blocks, and reads no longer what they were staged in. Returns the wire ids that
        this gives back."""
        before = itertools.takewhile(lambda staged: staged[0] < num_blocks, self._staged)
        return self._give_back(len(list(before)))

    def detach(self) -> tuple[int, ...]:
        """The reader is gone, and nothing reads any more what was staged for it. Returns the wire ids given back."""
        if self._staging.eager:
            return ()
        self._wanted = False
        self._stop()
        return self._give_back(len(self._staged))

    def end(self) -> None:
        """The export is over, and nothing reads any more what was staged. Idempotent."""
        self._wanted = False
        self._final.clear()
        self._stop()
        self._give_back(len(self._staged))

    def _start(self) -> None:
        if self._wanted and self._task is None and self._next < len(self._final):
            self._task = asyncio.create_task(self._run(), name="kv-stage")
            self._task.add_done_callback(self._ended)

    def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    async def _run(self) -> None:
        while self._next < len(self._final):
            first = self._next
            ids = self._final[first : first + self._staging.max_blocks]
            staged = await self._staging.stage(ids)
            if not self._staging.eager:
                self._staged.extend(enumerate(staged.wire_ids, first))
            self._next = first + len(ids)
            self._announce(first, staged)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task is self._task:
            self._task = None
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._wanted = False
            self._failed(error)

    def _give_back(self, count: int) -> tuple[int, ...]:
        wire_ids = tuple(self._staged.popleft()[1] for _ in range(count))
        if wire_ids:
            self._staging.unstage(wire_ids)
        return wire_ids
