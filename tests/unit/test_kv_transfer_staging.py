"""Staging: wire blocks for KV blocks, in place."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.checksum import checksums
from kv_transfer.memory.staging import HostStaging, StagedBlocks


@pytest.fixture
async def staging() -> AsyncIterator[HostStaging]:
    arena = HostArena(8, 64)
    for block_id in range(8):
        arena.block(block_id)[:] = bytes([block_id]) * 64
    made = HostStaging(arena)
    yield made
    await made.close()
    arena.close()


async def test_blocks_in_a_host_arena_are_their_own_wire_blocks(staging: HostStaging) -> None:
    staged = await staging.stage([3, 1])
    assert staged == StagedBlocks((3, 1), checksums(staging.arena, [3, 1]))
    staging.unstage(staged.wire_ids)
    assert await staging.reserve([5, 2]) == (5, 2)
    staging.discard([5, 2])


async def test_stagings_end_in_the_order_they_were_asked_for(staging: HostStaging) -> None:
    ended: list[int] = []

    async def stage(block_id: int) -> None:
        await staging.stage([block_id])
        ended.append(block_id)

    await asyncio.gather(*(stage(block_id) for block_id in range(8)))
    assert ended == list(range(8))


async def test_landing_counts_the_leading_blocks_that_are_right(staging: HostStaging) -> None:
    ids = [4, 0, 7]
    sums = checksums(staging.arena, ids)
    assert await staging.land(ids, ids, sums) == 3
    staging.arena.block(0)[5] ^= 1
    assert await staging.land(ids, ids, sums) == 1
    with pytest.raises(ValueError, match="argument 2 is longer"):
        await staging.land(ids, ids, sums[:2])
