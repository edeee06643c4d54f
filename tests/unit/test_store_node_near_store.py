"""A node's own store as what is near."""

import asyncio
import threading
from collections.abc import Sequence

from store_parts import PlainMemory, TailsFirst, blocks_of, hashes_of

from kv_store.host_copier import HostCopier
from kv_store.settings import StoreSettings
from kv_store.store import KVStore
from kv_transfer.lending.borrowing import BorrowContext, Borrowing, Prefix
from protocol.ids import RequestId, WorkerId
from store_node.near_store import NearStore
from tests.support.kv_owner import LAYOUT

NUM_BLOCKS = 12


class Halting(HostCopier):
    """Copies in `num_batches` batches, and no more before `may_go`."""

    def __init__(self, device: PlainMemory, host: PlainMemory, num_batches: int) -> None:
        super().__init__(device, host)
        self._num_left = num_batches
        self.halted = threading.Event()
        self.may_go = threading.Event()

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        if not self._num_left:
            self.halted.set()
            assert self.may_go.wait(5)
        self._num_left -= 1
        super().copy_in(slots, block_ids)


async def unknown(*_: object) -> None:
    """No link has been measured."""


async def test_what_a_load_has_brought_counts_when_it_is_given_up() -> None:
    device, host = PlainMemory(64), PlainMemory(16)
    copier = Halting(device, host, 2)
    settings = StoreSettings(block_size=LAYOUT.block_size, load="always")
    async with KVStore(host, 16, TailsFirst(), settings, copier=copier) as store:
        blocks, into = blocks_of("a", NUM_BLOCKS), tuple(range(40, 40 + NUM_BLOCKS))
        device.fill(range(NUM_BLOCKS), blocks)
        assert await store.save(blocks, range(NUM_BLOCKS)) == NUM_BLOCKS
        context = BorrowContext(
            importer=None,  # type: ignore[arg-type]  # nobody is asked
            reader=WorkerId("d0"),
            layout=LAYOUT,
            stall_timeout_s=1.0,
            policy="always",
            estimate_seconds=unknown,
            compute_tokens_per_s=lambda: None,
            near=NearStore(store),
        )
        borrowing = Borrowing(context, Prefix(RequestId("r"), tuple(hashes_of(blocks)), into, 0))
        running = asyncio.create_task(borrowing.run((), 5.0))
        while not copier.halted.is_set():
            await asyncio.sleep(0.005)
        running.cancel()
        copier.may_go.set()
        await asyncio.wait([running])
        assert borrowing.num_valid_blocks == 8, "two batches of a quarter of the slots"
        assert device.right(into[:8], blocks[:8])
