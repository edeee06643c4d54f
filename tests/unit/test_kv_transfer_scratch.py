"""Scratch blocks: samples that probes recognise, landing blocks that are kept back while bytes may still land."""

import asyncio
from pathlib import Path

import pytest

from kv_transfer.meeting.local_limits import memory_copy_rate, rdma_rate
from kv_transfer.meeting.scratch import Scratch, sample, sample_ids
from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.device_arena import DeviceArena
from kv_transfer.transport import TransferAbandoned

NUM_BLOCKS = 4
NUM_SCRATCH = 8
BLOCK_BYTES = 100


@pytest.fixture
def arena() -> HostArena:
    return HostArena(NUM_BLOCKS, BLOCK_BYTES, NUM_SCRATCH)


def test_samples_are_told_by_seed_and_number() -> None:
    assert sample(b"seed", 0, BLOCK_BYTES) == sample(b"seed", 0, BLOCK_BYTES)
    distinct = {sample(seed, index, BLOCK_BYTES) for seed in (b"one", b"two") for index in range(3)}
    assert len(distinct) == 6
    assert {len(each) for each in distinct} == {BLOCK_BYTES}
    assert list(sample_ids(NUM_BLOCKS, NUM_SCRATCH)) == [4, 5, 6, 7]
    assert list(sample_ids(NUM_BLOCKS, 1)) == []


async def test_what_lands_is_recognised(arena: HostArena) -> None:
    scratch = Scratch(arena)
    async with scratch.landing(8) as landing:
        assert landing == (8, 9)
        assert not await scratch.holds(landing, scratch.seed)
        for source, target in zip(scratch.samples, landing, strict=False):
            arena.block(target)[:] = arena.block(source)
        assert await scratch.holds(landing, scratch.seed)
        assert not await scratch.holds(landing[::-1], scratch.seed)
        assert not await scratch.holds(landing, b"another life")
        assert await scratch.holds(landing, b"")
    async with scratch.landing(8) as landing:
        assert all(bytes(arena.block(block_id)) == bytes(BLOCK_BYTES) for block_id in landing)


async def test_blocks_of_an_abandoned_probe_are_kept_back_until_it_settles(arena: HostArena) -> None:
    scratch = Scratch(arena)
    settled = [asyncio.Event() for _ in range(3)]
    taken = []
    for event in settled:
        with pytest.raises(TransferAbandoned):
            async with scratch.landing(8) as landing:
                taken.append(landing)
                raise TransferAbandoned("hung", event)
    assert [len(landing) for landing in taken] == [2, 1, 1]
    assert scratch.num_kept_back == 4
    async with scratch.landing(8) as landing:
        assert landing == ()
    settled[0].set()
    assert scratch.num_kept_back == 2
    async with scratch.landing(8) as landing:
        assert set(landing) <= set(taken[0])
    with pytest.raises(ValueError, match="failed"):
        async with scratch.landing(8):
            raise ValueError("failed")
    assert scratch.num_kept_back == 2


async def test_probes_take_turns(arena: HostArena) -> None:
    scratch = Scratch(arena)
    running = 0

    async def probe() -> None:
        nonlocal running
        async with scratch.landing(1):
            running += 1
            assert running == 1
            await asyncio.sleep(0)
            running -= 1

    await asyncio.gather(*(probe() for _ in range(8)))


async def test_scratch_blocks_on_a_device_are_only_timed() -> None:
    device = DeviceArena(NUM_BLOCKS, NUM_SCRATCH, BLOCK_BYTES, address=4096, device_id=0, memory=None)
    scratch = Scratch(device)
    assert scratch.seed == b""
    async with scratch.landing(1) as landing:
        assert landing == (8,)
        assert await scratch.holds(landing, b"seed")


def test_limits_of_this_machine(tmp_path: Path) -> None:
    assert memory_copy_rate() > 0
    assert rdma_rate(tmp_path) == 0
    for name, text in (("mlx5_0", "100 Gb/sec (4X EDR)\n"), ("mlx5_1", "nonsense"), ("mlx5_2", "400 Gb/sec (4X NDR)")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "rate").write_text(text)
    assert rdma_rate(tmp_path) == 50e9
