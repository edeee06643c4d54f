"""Demotion: what the host tier gives up goes to disk first, where there is one.

Room is made in two ways: ahead, so that a few slots are free whenever a load or a put needs them, and on demand, when a
save lacks room. Blocks are found and read as ever until they are on disk. What waits for the disk is bounded in bytes: beyond
that the disk is slower than blocks are evicted, and they are dropped and counted.
"""

import asyncio
from collections.abc import Sequence

from kv_store.disk_worker import DiskWorker
from kv_store.entries import Entry
from kv_store.host_tier import HostTier
from kv_store.tiers import StoredBlock
from protocol.kv_blocks import CachedBlock

AHEAD_SHARE = 1 / 32
"""Of the slots, kept free where there is a disk: what a burst of loads takes before it has to push anything out."""

MAX_BACKLOG_SHARE = 1 / 8
MAX_BACKLOG_BYTES = 512 << 20
"""What may wait for the disk: a second of a fast one, and never more than a share of the tier."""


class DiskLosses:
    """A TierListener that lets admission know of what the last tier gives up."""

    def __init__(self, host: HostTier) -> None:
        self._host = host

    def stored(self, blocks: Sequence[StoredBlock]) -> None:
        pass

    def removed(self, blocks: Sequence[StoredBlock]) -> None:
        self._host.lost_from_disk([stored for stored in blocks if stored.tier == "disk"])


class Demoter:
    """Of one store, on its event loop. Its tasks end by themselves; `idle` waits for them."""

    def __init__(self, host: HostTier, worker: DiskWorker, batch_blocks: int) -> None:
        self._host = host
        self._worker = worker
        self._batch_blocks = batch_blocks
        self._num_ahead = max(1, int(host.num_slots * AHEAD_SHARE))
        share = int(host.num_slots * MAX_BACKLOG_SHARE)
        self._max_backlog = max(batch_blocks, min(share, MAX_BACKLOG_BYTES // host.memory.block_bytes))
        self._num_waiting = 0
        self._ahead: asyncio.Task[None] | None = None

    async def make_room(self, blocks: Sequence[CachedBlock]) -> None:
        """Before these are saved: whatever must go for them goes to disk, as far as the disk keeps up."""
        for count, tenant in self._host.lacking(blocks):
            room = self._max_backlog - self._num_waiting
            await self._demote(self._host.leave(min(count, room), tenant))

    def keep_ahead(self) -> None:
        """Have some slots freed, unless that is under way."""
        if self._ahead is None and self._host.num_free < self._num_ahead:
            self._ahead = asyncio.get_running_loop().create_task(self._free_some())

    async def idle(self) -> None:
        if self._ahead is not None:
            await asyncio.wait((self._ahead,))

    async def _free_some(self) -> None:
        try:
            lacking = self._num_ahead - self._host.num_free
            room = self._max_backlog - self._num_waiting
            await self._demote(self._host.leave(min(lacking, room)))
        finally:
            self._ahead = None

    async def _demote(self, leaving: Sequence[Entry]) -> None:
        """Write what is not on disk yet, then let go of what is. What the disk does not keep stays until its slot is needed."""
        self._num_waiting += len(leaving)
        try:
            for first in range(0, len(leaving), self._batch_blocks):
                await self._write_some(leaving[first : first + self._batch_blocks])
        finally:
            self._num_waiting -= len(leaving)
            self._host.stay(leaving)

    async def _write_some(self, entries: Sequence[Entry]) -> None:
        new = [entry for entry in entries if entry.block.block_hash not in self._worker.disk]
        new.sort(key=lambda entry: entry.block.position)
        if new:
            await self._worker.write(new)
        self._host.take_out([entry for entry in entries if entry.block.block_hash in self._worker.disk])
