"""SlotCopier: blocks to a store's slots and back, wherever they lie, with nothing under way when a call ends."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.cuda.device import HostDevice
from engine.cuda.device_blocks import DeviceBlocks
from engine.cuda.slot_copier import SlotCopier

NUM_BLOCKS, NUM_SLOTS, BLOCK_BYTES = 10, 14, 24


def cache() -> torch.Tensor:
    return torch.arange(NUM_BLOCKS * BLOCK_BYTES, dtype=torch.uint8).view(NUM_BLOCKS, BLOCK_BYTES)


def make(memory: torch.Tensor, device: HostDevice) -> tuple[SlotCopier, torch.Tensor]:
    slots = torch.zeros((NUM_SLOTS, BLOCK_BYTES), dtype=torch.uint8)
    return DeviceBlocks(memory, 2, device).slot_copier(slots), slots


@given(
    st.permutations(range(NUM_BLOCKS)),
    st.permutations(range(NUM_SLOTS)),
    st.integers(0, NUM_BLOCKS),
    st.booleans(),
    st.booleans(),
)
def test_there_and_back(block_ids: list[int], places: list[int], count: int, in_runs: bool, late: bool) -> None:
    """In runs of slots or scattered; nothing else changes."""
    memory, block_ids = cache(), block_ids[:count]
    slots = sorted(places[:count]) if in_runs else places[:count]
    copier, host = make(memory, HostDevice(late=late))
    copier.copy_out(block_ids, slots)
    assert torch.equal(host[slots], cache()[block_ids])
    assert not host[[slot for slot in range(NUM_SLOTS) if slot not in slots]].any()
    memory[block_ids] = 255
    copier.copy_in(slots, block_ids)
    assert torch.equal(memory, cache())


def test_copies_do_not_wait_for_the_steps_under_way() -> None:
    memory, device = cache(), HostDevice(late=True)
    copier, host = make(memory, device)
    step = device.compute.submit(lambda: memory[0].fill_(7))
    copier.copy_out([0], [3])
    assert not step.done()
    assert torch.equal(host[3], cache()[0])


def test_what_does_not_fit_is_refused_and_nothing_is_under_way() -> None:
    device = HostDevice(late=True)
    copier, host = make(cache(), device)
    with pytest.raises(IndexError, match="14 slots"):
        copier.copy_out([1], [14])
    with pytest.raises(IndexError, match="14 slots"):
        copier.copy_in([-1], [1])
    for block_ids, slots in (([1, 2], [3]), ([1, 2], [3, 3])):
        with pytest.raises(ValueError, match="written twice"):
            copier.copy_out(block_ids, slots)
    with pytest.raises(ValueError, match="written twice"):
        copier.copy_in([3, 4], [1, 1])
    with pytest.raises(IndexError, match="block 10 is not"):
        copier.copy_out([1, 10], [3, 5])
    before = host.clone()
    device.copies.submit(lambda: None).wait()
    assert torch.equal(host, before), "the copy of the first block has ended, not just begun"


def test_a_copy_that_fails_is_heard_of_when_the_others_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    device, memory = HostDevice(late=True), cache()
    copier, host = make(memory, device)
    monkeypatch.setattr(device, "upload", failing_once(device))
    with pytest.raises(RuntimeError, match="the bus is gone"):
        copier.copy_out([1, 2, 3], [0, 2, 4])
    assert torch.equal(host[[2, 4]], cache()[[2, 3]])


def failing_once(device: HostDevice) -> object:
    upload, failed = device.upload, threading.Event()

    def fail_once(values: torch.Tensor) -> torch.Tensor:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("the bus is gone")
        return upload(values)

    return fail_once
