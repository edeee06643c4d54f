"""DiskWorker: the threads on which a store talks to its disk, one that reads and one that writes, so that no request waits
behind a demotion. A disk that raises is one that has kept or read nothing."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

from kv_store.entries import Entry
from kv_store.finish import finish
from kv_store.host_tier import HostTier
from kv_store.observer import Move
from kv_store.tier_events import TierEvents
from kv_store.tiers import BlockDisk, StoredBlock
from protocol.checksum import checksum
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock


class DiskWorker:
    """Between one host tier and one disk. `close` waits for what is under way and closes the disk."""

    def __init__(self, disk: BlockDisk, host: HostTier, events: TierEvents) -> None:
        self.disk = disk
        self._host = host
        self._events = events
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="headrace-kv-disk-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="headrace-kv-disk-write")

    async def write(self, entries: Sequence[Entry]) -> None:
        """Held or leaving blocks, to disk, as far as it keeps them. What has changed in memory is dropped."""

        def write() -> int:
            right = [entry for entry in entries if checksum(self._host.memory.block(entry.slot)) == entry.checksum]
            damaged.extend(entry for entry in entries if entry not in right)
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

    async def forget(self, block_hashes: Sequence[BlockHash]) -> None:
        """Wherever they are by then: after whatever is being written."""
        await finish(asyncio.get_running_loop().run_in_executor(self._writer, self.disk.forget, block_hashes))

    def close(self) -> None:
        self._reader.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        self.disk.close()

    def _kept(self, blocks: Sequence[CachedBlock]) -> list[StoredBlock]:
        return [stored for block in blocks for stored in self.disk.find([BlockHash(block.block_hash)])]

    async def _run(self, thread: Executor, move: Move, work: Callable[[], int]) -> int:
        def timed() -> tuple[int, float]:
            begin = time.perf_counter()
            count = work()
            return count, time.perf_counter() - begin

        try:
            count, seconds = await finish(asyncio.get_running_loop().run_in_executor(thread, timed))
        except Exception as error:  # noqa: BLE001  # whatever a disk raises, its blocks are misses and the node goes on
            self._host.failed(move, error)
            return 0
        self._host.moved(move, count, seconds)
        return count
