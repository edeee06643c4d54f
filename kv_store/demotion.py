"""Demotion: what the host tier is about to give up goes to disk first, where there is one.

    ready ──chosen, held──▶ written ──▶ clean: next to go, found and read as ever ──a slot is needed──▶ gone
                               └──the disk did not keep it──▶ stays as it was

It is done ahead of need, and nobody waits for it: who needs a slot takes that of a clean block, or else that of a block which
is then lost, and counted. One batch at a time is on its way to the disk, so little is bound up in a disk that hangs.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence

from kv_store.disk_worker import DiskWorker
from kv_store.entries import Entry
from kv_store.host_tier import HostTier
from kv_store.tiers import StoredBlock
from protocol.kv_blocks import CachedBlock, Tenant

AHEAD_SHARE = 1 / 8
"""Of the slots, free or clean: what a burst of saves and loads takes before it has to push out what is nowhere else."""

SMALL_AHEAD = 64
"""At least so many in a small tier, but never more than half of it."""

DRAIN_SHARE = 7 / 8
"""Of the disk, filled by a drain: its files have headers, and blocks that are there already are not to be pushed out."""


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
        self._tenants: set[Tenant] = set()
        self._ahead: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def keep_ahead(self, blocks: Iterable[CachedBlock] = ()) -> None:
        """After these were stored: have more blocks made clean, unless that is under way."""
        self._tenants.update(Tenant(block.tenant) for block in blocks)
        if self._ahead is None and self._lacking() is not None:
            self._ahead = self._start(self._write_ahead())

    async def idle(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def drain(self, deadline_s: float) -> None:
        """Write what is not on disk, the most valuable first, for so long. What is being written then is left to be."""
        task = self._start(self._write_all(asyncio.get_running_loop().time() + deadline_s))
        await asyncio.wait((task,), timeout=deadline_s)

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _write_ahead(self) -> None:
        try:
            while (lacking := self._lacking()) is not None:
                count, tenant = lacking
                entries = self._host.leave(min(count, self._batch_blocks), tenant)
                if not await self._make_clean(entries):
                    if tenant is None:
                        return
                    self._tenants.discard(tenant)
        finally:
            self._ahead = None

    def _lacking(self) -> tuple[int, Tenant | None] | None:
        """How many more of a tenant's blocks, or of anybody's, are to be made clean."""
        for tenant in list(self._tenants):
            ahead = _ahead(self._host.quotas.limit(tenant, self._host.num_slots))
            if (count := self._host.short_of(ahead, tenant)) > 0:
                return count, tenant
            self._tenants.discard(tenant)
        count = self._host.short_of(_ahead(self._host.num_slots))
        return (count, None) if count > 0 else None

    async def _make_clean(self, entries: Sequence[Entry]) -> int:
        """How many are clean now. They are held while the disk reads them: their slots are nobody else's until it has."""
        try:
            await self._write_some(entries)
        finally:
            num_clean = self._host.written(entries)
        return num_clean

    async def _write_some(self, entries: Sequence[Entry]) -> None:
        if any(entry.block.block_hash not in self._worker.disk for entry in entries):
            await self._worker.write(sorted(entries, key=lambda entry: entry.block.position))

    async def _write_all(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        hashes = await asyncio.to_thread(self._host.by_value)
        hashes = hashes[: int(await self._worker.capacity_blocks() * DRAIN_SHARE)]
        for first in range(0, len(hashes), self._batch_blocks):
            if loop.time() >= until:
                return
            entries = self._host.hold_each(hashes[first : first + self._batch_blocks])
            try:
                await self._write_some(entries)
            finally:
                self._host.let_go(entries)


def _ahead(num_slots: int) -> int:
    """How many of so many slots are to be free or clean."""
    return max(1, int(num_slots * AHEAD_SHARE), min(num_slots // 2, SMALL_AHEAD))
