"""Mover: one thread that copies blocks between a device and host slots, and checks them on the way.

Jobs are batches, done one after the other in the order of being asked. Whoever awaits one is answered, or hears of its
own cancel, when nothing moves any more. Started with its store and closed by it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kv_store.finish import finish
from kv_store.tiers import BlockCopier, BlockMemory
from protocol.checksum import checksum, num_right

T = TypeVar("T")


class Mover:
    """`copier` None: of a store without a device, which only computes checksums."""

    def __init__(self, memory: BlockMemory, copier: BlockCopier | None) -> None:
        self._memory = memory
        self._copier = copier
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-kv-mover")

    async def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> tuple[list[int], float]:
        """From the device into slots. Checksums of what is there now, and how long it took. Raises whatever the copier does."""

        def copy() -> list[int]:
            assert self._copier is not None, "a store without a device has nothing to save"
            self._copier.copy_out(block_ids, slots)
            return self._checksums(slots)

        return await self._run(copy)

    async def load(self, slots: Sequence[int], checksums: Sequence[int], block_ids: Sequence[int]) -> tuple[int, float]:
        """From slots to the device, up to the first slot whose bytes are not what they were. How many, and how long it took.
        Raises whatever the copier does."""

        def copy() -> int:
            assert self._copier is not None, "a store without a device has nowhere to load to"
            count = num_right(checksums, self._checksums(slots))
            if count:
                self._copier.copy_in(slots[:count], block_ids[:count])
            return count

        return await self._run(copy)

    async def checksums(self, slots: Sequence[int]) -> list[int]:
        found, _ = await self._run(lambda: self._checksums(slots))
        return found

    def close(self) -> None:
        """Waits for what is under way."""
        self._thread.shutdown(wait=True)

    def _checksums(self, slots: Sequence[int]) -> list[int]:
        return [checksum(self._memory.block(slot)) for slot in slots]

    async def _run(self, work: Callable[[], T]) -> tuple[T, float]:
        def timed() -> tuple[T, float]:
            begin = time.perf_counter()
            result = work()
            return result, time.perf_counter() - begin

        return await finish(asyncio.get_running_loop().run_in_executor(self._thread, timed))
