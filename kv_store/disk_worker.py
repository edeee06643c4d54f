"""DiskWorker: the threads on which a store talks to its disk, one that reads and one that writes, so that no request waits
behind a demotion. A disk that raises is one that has kept or read nothing, and one that hangs is left behind at the end."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from kv_store.daemon_thread import DaemonThread
from kv_store.entries import Entry
from kv_store.finish import end, finish
from kv_store.host_tier import HostTier
from kv_store.observer import Move
from kv_store.tier_events import TierEvents
from kv_store.tiers import BlockDisk, StoredBlock
from protocol.checksum import checksum
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, Tenant

FORGET_BLOCKS = 512
"""At once: who asks the disk a question waits no longer than for these."""


class DiskWorker:
    """Between one host tier and one disk. `close` waits for what is under way and closes the disk."""

    def __init__(self, disk: BlockDisk, host: HostTier, events: TierEvents) -> None:
        self.disk = disk
        self._host = host
        self._events = events
        self._reader = DaemonThread("headrace-kv-disk-read")
        self._writer = DaemonThread("headrace-kv-disk-write")

    async def write(self, entries: Sequence[Entry]) -> None:
        """Held blocks that it does not have, to disk, as far as it keeps them. What has changed in memory is dropped."""

        def write() -> int:
            right: list[Entry] = []
            for entry in entries:
                if entry.block.block_hash not in self.disk:
                    is_right = checksum(self._host.memory.block(entry.slot)) == entry.checksum
                    (right if is_right else damaged).append(entry)
            blocks = [entry.block for entry in right]
            data = [self._host.memory.block(entry.slot) for entry in right]
            count = self.disk.write(blocks, data, [entry.checksum for entry in right])
            self._events.stored(self._kept(blocks))
            return count

        damaged: list[Entry] = []
        await self._run(self._writer, "demote", write)
        for entry in damaged:
            self._host.drop_damaged(entry)

    async def read(self, blocks: Sequence[CachedBlock], slots: Sequence[int]) -> int:
        """Blocks of the disk into slots; how many leading ones are right."""
        hashes = [BlockHash(block.block_hash) for block in blocks]
        into = [self._host.memory.block(slot) for slot in slots]
        return await self._run(self._reader, "promote", lambda: self.disk.read(hashes, into))

    async def clear(self, tenant: Tenant | None) -> int:
        """Forget all blocks, or one tenant's, those included that are being written when this is called. How many."""

        def work() -> int:
            blocks = [stored.block for stored in self.disk.stored()]
            hashes = [BlockHash(block.block_hash) for block in blocks if tenant is None or block.tenant == tenant]
            for first in range(0, len(hashes), FORGET_BLOCKS):
                self.disk.forget(hashes[first : first + FORGET_BLOCKS])
            return len(hashes)

        return await finish(asyncio.get_running_loop().run_in_executor(self._writer, work))

    async def capacity_blocks(self) -> int:
        """Of the whole disk tier."""

        def work() -> int:
            return self.disk.stats().capacity_bytes // self._host.memory.block_bytes

        return await finish(asyncio.get_running_loop().run_in_executor(self._writer, work))

    async def close(self) -> None:
        """Once."""
        await end(self._reader)
        await end(self._writer, self.disk.close)

    def abandon(self) -> int:
        """Waits for nothing, and leaves the disk open; how many jobs were given up."""
        return self._reader.abandon() + self._writer.abandon()

    def _kept(self, blocks: Sequence[CachedBlock]) -> list[StoredBlock]:
        return [stored for block in blocks for stored in self.disk.find([BlockHash(block.block_hash)])]

    async def _run(self, thread: Executor, move: Move, work: Callable[[], int]) -> int:
        begin = time.perf_counter()  # who reads next will wait for its turn as well

        def timed() -> tuple[int, float]:
            count = work()
            return count, time.perf_counter() - begin

        try:
            count, seconds = await finish(asyncio.get_running_loop().run_in_executor(thread, timed))
        except Exception as error:  # noqa: BLE001  # whatever a disk raises, its blocks are misses and the node goes on
            self._host.failed(move, error)
            return 0
        self._host.moved(move, count, seconds)
        return count
