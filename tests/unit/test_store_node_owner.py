"""A store's owner, told by a reader that a block came damaged: it looks, and believes its own checksums."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from store_parts import PlainMemory, TailsFirst, blocks_of, bytes_of, hashes_of

from kv_store.settings import StoreSettings
from kv_store.store import KVStore
from protocol.ids import PinId
from protocol.kv_blocks import CachedBlock
from store_node.store_owner import StoreOwner

PIN = PinId("loan")
BLOCKS = blocks_of("a", 8)


class Slab(PlainMemory):
    """Counts what is read of it."""

    num_read = 0

    def block(self, block_id: int) -> memoryview:
        self.num_read += 1
        return super().block(block_id)


@asynccontextmanager
async def lent() -> AsyncIterator[tuple[StoreOwner, KVStore, Slab, Sequence[int]]]:
    """All of BLOCKS, kept and lent; their slots."""
    slab = Slab(12)

    async def fetch(blocks: Sequence[CachedBlock], slots: Sequence[int]) -> int:
        for block, slot in zip(blocks, slots, strict=True):
            slab.block(slot)[:] = bytes_of(block)
        return len(slots)

    async with (
        KVStore(slab, 12, TailsFirst(), StoreSettings(16, load="always"), copier=None) as store,
        StoreOwner(store) as owner,
    ):
        assert await store.receive(BLOCKS, fetch) == len(BLOCKS)
        answered: asyncio.Future[Sequence[int]] = asyncio.get_running_loop().create_future()
        owner.on_pinned = lambda _, slots: answered.set_result(slots)
        owner.pin(PIN, tuple(hashes_of(BLOCKS)))
        slots = await answered
        slab.num_read = 0
        yield owner, store, slab, slots
        assert store.stats().tiers[0].held == 0


async def released(owner: StoreOwner, index: int) -> None:
    """As a lender does it when a reader names a block."""
    owner.inspect(PIN, index)
    owner.unpin(PIN)
    tasks = [task for task in asyncio.all_tasks() if task.get_name() == f"kv-inspect:{PIN}"]
    await asyncio.gather(*tasks)


async def test_what_has_changed_is_forgotten_with_what_else_of_the_loan_has() -> None:
    async with lent() as (owner, store, slab, slots):
        for index in (2, 5):
            slab.block(slots[index])[0] ^= 1
        await released(owner, 2)
        assert [places.host for places in store.locate(hashes_of(BLOCKS))] == [i not in (2, 5) for i in range(8)]
        assert store.stats().tiers[0].checksum_failures == 2


@pytest.mark.parametrize("index", [0, 7, 8, 1 << 24])
async def test_a_reader_that_lies_takes_nothing_away_and_costs_one_block(index: int) -> None:
    async with lent() as (owner, store, slab, _):
        await released(owner, index)
        assert store.match(hashes_of(BLOCKS)).total == len(BLOCKS)
        assert store.stats().tiers[0].checksum_failures == 0
        assert slab.num_read == (index < len(BLOCKS))


async def test_several_who_say_so_count_once() -> None:
    async with lent() as (owner, store, slab, slots):
        slab.block(slots[2])[0] ^= 1
        owner.inspect(PIN, 2)
        owner.inspect(PIN, 2)
        await released(owner, 2)
        assert store.stats().tiers[0].checksum_failures == 1
        assert store.match(hashes_of(BLOCKS)).total == 2


async def test_a_loan_that_nobody_knows_is_no_error() -> None:
    async with lent() as (owner, store, _, _):
        owner.unpin(PIN)
        await released(owner, 0)
        assert store.stats().tiers[0].checksum_failures == 0
