"""DeviceStaging: KV blocks in device memory, which transports cannot reach, and wire blocks in pinned host memory.

    owner     device --gather--> wire blocks, announced           kept until unstage
    reader    wire blocks, read into --scatter--> device          given back when the copy has ended

Copies run on a stream of the device's own beside the steps. Checksums are taken of the blocks on the device, before they
leave it and after they have come: they prove the way over the bus as well.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.staging import StagedBlocks
from kv_transfer.memory.staging_pool import Side, StagingPool
from protocol.checksum import num_right


class BlockCopier(Protocol):
    """Copies between a device's KV blocks and the wire blocks of one arena.

    Both calls block until the copy has ended, and return the checksums (protocol.transfer.Checksum) of the KV blocks as they
    lie on the device. A gather and a scatter may be under way at once, each on a thread of its own.
    """

    def gather(self, block_ids: Sequence[int], wire_ids: Sequence[int]) -> tuple[int, ...]: ...

    def scatter(self, wire_ids: Sequence[int], block_ids: Sequence[int]) -> tuple[int, ...]: ...


class DeviceStaging:
    """See kv_transfer.memory.staging.Staging. `copier` copies to and from `arena`, which belongs to this alone.

    Who waits for room waits behind those of its side who came before, however few blocks it wants: nobody starves.
    """

    def __init__(self, copier: BlockCopier, arena: HostArena) -> None:
        self._copier = copier
        self._arena = arena
        self._pool = StagingPool(arena.num_blocks)
        self._turns: dict[Side, asyncio.Lock] = {"owner": asyncio.Lock(), "reader": asyncio.Lock()}
        self._room = asyncio.Event()
        self._gatherer = ThreadPoolExecutor(1, thread_name_prefix="kv-gather")  # one: it keeps the order of calls
        self._scatterer = ThreadPoolExecutor(1, thread_name_prefix="kv-scatter")

    @property
    def arena(self) -> HostArena:
        return self._arena

    @property
    def max_blocks(self) -> int:
        return self._pool.max_blocks

    @property
    def eager(self) -> bool:
        return False

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    def stage_at_once(self, block_ids: Sequence[int]) -> StagedBlocks | None:  # noqa: ARG002  # there is a bus to cross
        return None

    async def stage(self, block_ids: Sequence[int]) -> StagedBlocks:
        ids = tuple(block_ids)
        async with self._turns["owner"]:
            wire_ids = await self._wait_for_room("owner", len(ids))
            copying = asyncio.get_running_loop().run_in_executor(self._gatherer, self._copier.gather, ids, wire_ids)
        try:
            return StagedBlocks(wire_ids, await _to_its_end(copying))
        except BaseException:
            self._give_back("owner", wire_ids)
            raise

    def unstage(self, wire_ids: Sequence[int]) -> None:
        self._give_back("owner", wire_ids)

    async def reserve(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        async with self._turns["reader"]:
            return await self._wait_for_room("reader", len(block_ids))

    async def land(self, wire_ids: Sequence[int], block_ids: Sequence[int], checksums: Sequence[int]) -> int:
        loop = asyncio.get_running_loop()
        copying = loop.run_in_executor(self._scatterer, self._copier.scatter, tuple(wire_ids), tuple(block_ids))
        try:
            return num_right(checksums, await _to_its_end(copying))
        finally:
            self._give_back("reader", wire_ids)

    def discard(self, wire_ids: Sequence[int]) -> None:
        self._give_back("reader", wire_ids)

    async def close(self) -> None:
        for executor in (self._gatherer, self._scatterer):
            await asyncio.to_thread(executor.shutdown)

    async def _wait_for_room(self, side: Side, count: int) -> tuple[int, ...]:
        while (wire_ids := self._pool.take(side, count)) is None:
            self._room.clear()
            await self._room.wait()
        return wire_ids

    def _give_back(self, side: Side, wire_ids: Sequence[int]) -> None:
        self._pool.give_back(side, wire_ids)
        self._room.set()


async def _to_its_end(copying: asyncio.Future[tuple[int, ...]]) -> tuple[int, ...]:
    """The outcome of a copy. A cancel is obeyed only when the copy has ended: a matter of milliseconds, and until then the
    blocks are its own."""
    cancelled = False
    while not copying.done():
        try:
            await asyncio.wait({copying})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        copying.exception()  # nobody is left to be told
        raise asyncio.CancelledError
    return copying.result()
