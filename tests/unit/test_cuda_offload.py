"""OffloadStream: blocks to host memory and back, in order with the steps around them."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.cuda.device import HostDevice
from engine.cuda.offload_stream import OffloadStream

NUM_BLOCKS, BLOCK_BYTES = 10, 24


def cache() -> torch.Tensor:
    return torch.arange(NUM_BLOCKS * BLOCK_BYTES, dtype=torch.uint8).view(NUM_BLOCKS, BLOCK_BYTES)


@pytest.fixture(params=[False, True], ids=["now", "late"])
def device(request: pytest.FixtureRequest) -> Iterator[HostDevice]:
    return HostDevice(late=request.param)


@given(
    st.permutations(range(NUM_BLOCKS)).flatmap(lambda ids: st.integers(0, NUM_BLOCKS).map(lambda n: ids[:n])),
    st.integers(1, NUM_BLOCKS * BLOCK_BYTES),
    st.booleans(),
)
def test_there_and_back(block_ids: list[int], staging_bytes: int, late: bool) -> None:
    """Whatever the staging buffer holds at a time, bytes come back to where they were, and nothing else changes."""
    memory = cache()
    offload = OffloadStream(memory, HostDevice(late=late), staging_bytes)
    host = offload.host_memory(len(block_ids))
    offload.copy_out(block_ids, host).wait()
    assert torch.equal(host, cache()[block_ids])
    memory[block_ids] = 255
    offload.copy_in(host, block_ids).wait()
    assert torch.equal(memory, cache())


def test_a_copy_comes_behind_the_steps_launched_before_it(device: HostDevice) -> None:
    memory = cache()
    offload = OffloadStream(memory, device)
    host = offload.host_memory(1)
    device.compute.submit(lambda: memory[3].fill_(7))
    handle = offload.copy_out([3], host)
    handle.wait()
    assert handle.done()
    assert host.unique().tolist() == [7]


def test_a_step_may_be_held_until_its_blocks_are_there(device: HostDevice) -> None:
    memory, seen = cache(), torch.zeros(BLOCK_BYTES, dtype=torch.uint8)
    offload = OffloadStream(memory, device)
    host = offload.host_memory(1)
    host.fill_(9)
    offload.copy_in(host, [5]).hold_steps()
    device.compute.submit(lambda: seen.copy_(memory[5])).wait()
    assert seen.unique().tolist() == [9]


def test_copies_follow_one_another(device: HostDevice) -> None:
    memory = cache()
    offload = OffloadStream(memory, device)
    first, second = offload.host_memory(2), offload.host_memory(2)
    offload.copy_out([0, 1], first)
    offload.copy_in(first, [8, 9])
    offload.copy_out([8, 9], second).wait()
    assert torch.equal(second, cache()[:2])


def test_a_late_copy_has_not_happened_before_it_is_done() -> None:
    offload = OffloadStream(cache(), HostDevice(late=True))
    host = offload.host_memory(1)
    handle = offload.copy_out([4], host)
    assert not handle.done()
    assert not host.any()
    handle.wait()
    assert host.any()


def test_what_does_not_fit_is_refused() -> None:
    offload = OffloadStream(cache(), HostDevice())
    with pytest.raises(IndexError, match="block 10 is not in a cache of 10"):
        offload.copy_out([10], offload.host_memory(1))
    with pytest.raises(IndexError, match="block -1"):
        offload.copy_in(offload.host_memory(1), [-1])
    with pytest.raises(ValueError, match="2 blocks take dense uint8"):
        offload.copy_out([1, 2], offload.host_memory(1))
    with pytest.raises(ValueError, match="written twice"):
        offload.copy_in(offload.host_memory(2), [1, 1])
