"""ExportStaging: brings the final blocks of exports to where peers reach them, in the order of each context.

Where wire blocks are plenty that happens as blocks become final. Where they are scarce (kv_transfer.memory.staging) it is for
readers that are there to read, and what they have read is taken back. One for all exports of an owner; event loop only.
"""

import asyncio
import logging
from typing import Protocol

from kv_transfer.handoff.export import Export
from kv_transfer.memory.staging import StagedBlocks, Staging

log = logging.getLogger(__name__)


class StagingEvents(Protocol):
    """Whoever the exports belong to."""

    def staging_ended(self, export: Export) -> None:
        """Nothing is being copied from its blocks any more."""
        ...

    def staging_failed(self, export: Export) -> None: ...


class ExportStaging:
    """`tasks` is the group that copies run in."""

    def __init__(self, staging: Staging, tasks: asyncio.TaskGroup, events: StagingEvents) -> None:
        self._staging = staging
        self._tasks = tasks
        self._events = events
        self.num_blocks_staged = 0

    def stage_rest(self, export: Export) -> None:
        """Whatever is final and not staged yet, if it is its turn. Where room is scarce it is for readers that are there."""
        may_stage = self._staging.eager or export.attached
        if may_stage and export.staging is None and not export.ended and export.unstaged(1):
            export.staging = self._tasks.create_task(self._stage(export), name="kv-stage")
            export.staging.add_done_callback(lambda _: self._ended(export))

    def staged(self, export: Export, staged: StagedBlocks) -> None:
        """The next of its blocks are staged."""
        export.stage(staged)
        self.num_blocks_staged += len(staged.wire_ids)

    def restart(self, export: Export, first_block: int) -> None:
        """Scarce wire blocks are for another reader now, that lacks the blocks from here on."""
        if not self._staging.eager:
            self._staging.unstage(export.restart(first_block))

    def take_back(self, export: Export, num_blocks: int) -> None:
        """The reader has this many leading blocks."""
        if not self._staging.eager:
            self._staging.unstage(export.take_back(num_blocks))

    def stop(self, export: Export) -> None:
        """Nobody is left to read what is staged of it, where that is scarce."""
        if self._staging.eager:
            return
        if export.staging is not None:
            export.staging.cancel()
        self.take_back(export, export.num_staged)

    def free(self, export: Export) -> None:
        """It has ended, and nothing reads its blocks."""
        self._staging.unstage(export.take_back(export.num_staged))

    def _ended(self, export: Export) -> None:
        """Also if it was cancelled before it had begun. A reader that came while it ended gets one of its own."""
        export.staging = None
        self._events.staging_ended(export)
        self.stage_rest(export)

    async def _stage(self, export: Export) -> None:
        """Raises nothing: the group that it runs in is everybody's."""
        try:
            while not export.ended and (block_ids := export.unstaged(self._staging.max_blocks)):
                staged = await self._staging.stage(block_ids)
                if export.ended:
                    self._staging.unstage(staged.wire_ids)
                else:
                    self.staged(export, staged)
        except Exception:
            log.exception("%s: cannot export KV blocks", export.ticket.request_id)
            if not export.ended:
                self._events.staging_failed(export)
