"""Promotion: blocks that are on disk come back to host slots, where loads for the device and readers elsewhere find them.

A block is read once, however many wait for it. What has been read is held until all of them have taken hold of it, so nothing
is evicted between a read and its use. The disk keeps its copy. Whoever waits may be cancelled at any time: the read goes on.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from kv_store.demotion import Demoter
from kv_store.disk_worker import DiskWorker
from kv_store.entries import Entry
from kv_store.host_tier import HostTier
from kv_store.tiers import StoredBlock
from protocol.ids import BlockHash


class _Promotion:
    """One read of a few blocks. `entries` are held by it until the last of its waiters has left."""

    def __init__(self) -> None:
        self.done: asyncio.Event = asyncio.Event()
        self.entries: list[Entry] = []
        self.num_waiting = 0


class Promoter:
    """Of one store, on its event loop."""

    def __init__(self, host: HostTier, worker: DiskWorker, demoter: Demoter, batch_blocks: int) -> None:
        self._host = host
        self._worker = worker
        self._demoter = demoter
        self._batch_blocks = batch_blocks
        self._under_way: dict[bytes, _Promotion] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_resting = 0

    async def hold(self, block_hashes: Sequence[BlockHash]) -> list[Entry]:
        """Some leading blocks, at least one, held; none if the first is in no tier, or cannot be read."""
        entries = self._host.hold(block_hashes)
        if entries or not block_hashes:
            return entries
        promotion = self._promotion(block_hashes)
        if promotion is None:
            return []
        promotion.num_waiting += 1
        try:
            await promotion.done.wait()
            return self._host.hold(block_hashes)
        finally:
            promotion.num_waiting -= 1
            self._let_go(promotion)

    async def idle(self) -> None:
        """Waits for what is under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Nothing is promoted within, but for what is under way."""
        self._num_resting += 1
        try:
            yield
        finally:
            self._num_resting -= 1

    def _promotion(self, block_hashes: Sequence[BlockHash]) -> _Promotion | None:
        """The one that brings the first of these, begun now if need be."""
        under_way = self._under_way.get(block_hashes[0])
        if under_way is not None:
            return under_way
        if self._num_resting:
            return None
        run = self._worker.disk.find(block_hashes[: self._batch_blocks])
        run = run[: self._num_new([stored.block.block_hash for stored in run])]
        if not run:
            return None
        entries = self._host.reserve([stored.block for stored in run]).entries
        promotion = _Promotion()
        self._under_way |= {stored.block.block_hash: promotion for stored in run}
        task = asyncio.get_running_loop().create_task(self._read(promotion, run, entries))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return promotion

    def _num_new(self, block_hashes: Sequence[bytes]) -> int:
        """How many leading ones are neither here nor on their way, and not named before."""
        named: set[bytes] = set()
        for index, (block_hash, is_here) in enumerate(
            zip(block_hashes, self._host.are_here(block_hashes), strict=True)
        ):
            if is_here or block_hash in self._under_way or block_hash in named:
                return index
            named.add(block_hash)
        return len(block_hashes)

    async def _read(self, promotion: _Promotion, run: Sequence[StoredBlock], entries: Sequence[Entry]) -> None:
        num_right = 0
        try:
            if entries:
                num_right = await self._worker.read([entry.block for entry in entries], [e.slot for e in entries])
        finally:
            try:
                self._host.abort(entries[num_right:])
                checksum_of = {stored.block.block_hash: stored.checksum for stored in run}
                right = [checksum_of[entry.block.block_hash] for entry in entries[:num_right]]
                promotion.entries = self._host.commit(entries[:num_right], right, held=True)
            finally:
                # Whatever has happened, those who wait hear of the end, and hold nothing that nobody gives back.
                for stored in run:
                    self._under_way.pop(stored.block.block_hash, None)
                promotion.done.set()
                self._let_go(promotion)
            self._demoter.keep_ahead(entry.block for entry in entries)

    def _let_go(self, promotion: _Promotion) -> None:
        if promotion.done.is_set() and not promotion.num_waiting:
            self._host.let_go(promotion.entries)
            promotion.entries = []
