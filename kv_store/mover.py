"""Mover: one thread that copies blocks between a device and host slots, and checks them on the way.

Jobs are batches, done one after the other. Loads come first, because somebody waits for their tokens: of saves and puts one
batch at a time is at the thread, and the others wait for it here, so a load never has more than one of them before it.
Whoever awaits a batch is answered, or hears of its own cancel, when nothing moves any more. Started with its store and
closed by it.

Times are from when a batch's turn came: those of loads include what was before them, as the next load will find it too.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from kv_store.daemon_thread import DaemonThread
from kv_store.finish import end, finish
from kv_store.tiers import BlockCopier, BlockMemory
from protocol.checksum import checksum, num_right

T = TypeVar("T")

PIECE_BYTES = 8 << 20
"""Copied at once and checked while still in the processor's cache, or the other way round."""


class Mover:
    """`copier` None: of a store without a device, which only computes checksums."""

    def __init__(self, memory: BlockMemory, copier: BlockCopier | None) -> None:
        self._memory = memory
        self._copier = copier
        self._piece = max(1, PIECE_BYTES // memory.block_bytes)
        self._thread = DaemonThread("headrace-kv-mover")
        self.turn = asyncio.Lock()
        """Of whoever is about to save: taken before its slots are, so none is given up before its bytes can come."""

    async def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> tuple[list[int], float]:
        """From the device into slots. Checksums of what is there now, and how long it took. Raises whatever the copier does.
        The caller has the turn."""

        def copy() -> list[int]:
            assert self._copier is not None, "a store without a device has nothing to save"
            found: list[int] = []
            for piece in self._pieces(len(slots)):
                self._copier.copy_out(block_ids[piece], slots[piece])
                found += self._checksums(slots[piece])
            return found

        return await self._run(copy)

    async def load(self, slots: Sequence[int], checksums: Sequence[int], block_ids: Sequence[int]) -> tuple[int, float]:
        """From slots to the device, up to the first slot whose bytes are not what they were. How many, and how long it took.
        Raises whatever the copier does."""

        def copy() -> int:
            assert self._copier is not None, "a store without a device has nowhere to load to"
            count = 0
            for piece in self._pieces(len(slots)):
                right = num_right(checksums[piece], self._checksums(slots[piece]))
                if right:
                    self._copier.copy_in(slots[count : count + right], block_ids[count : count + right])
                count += right
                if count < piece.stop:
                    break
            return count

        return await self._run(copy)

    async def checksums(self, slots: Sequence[int]) -> list[int]:
        async with self.turn:
            found, _ = await self._run(lambda: self._checksums(slots))
        return found

    async def close(self) -> None:
        """Waits for what is under way."""
        await end(self._thread)

    def abandon(self) -> int:
        """Waits for nothing; how many batches were given up."""
        return self._thread.abandon()

    def _pieces(self, count: int) -> list[slice]:
        return [slice(first, min(first + self._piece, count)) for first in range(0, count, self._piece)]

    def _checksums(self, slots: Sequence[int]) -> list[int]:
        return [checksum(self._memory.block(slot)) for slot in slots]

    async def _run(self, work: Callable[[], T]) -> tuple[T, float]:
        begin = time.perf_counter()

        def timed() -> tuple[T, float]:
            result = work()
            return result, time.perf_counter() - begin

        return await finish(asyncio.get_running_loop().run_in_executor(self._thread, timed))
