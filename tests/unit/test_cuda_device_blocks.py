"""DeviceBlocks: what leaves a device and what comes to it, with checksums of the device's own blocks, beside the steps."""

import threading

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engine.cuda.device import HostDevice
from engine.cuda.device_blocks import DeviceBlocks, WireCopier

NUM_BLOCKS, NUM_WIRE_BLOCKS, BLOCK_BYTES = 12, 8, 256
IDS = st.permutations(range(NUM_BLOCKS)).flatmap(lambda ids: st.integers(0, NUM_WIRE_BLOCKS).map(lambda n: ids[:n]))


def cache() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (NUM_BLOCKS, BLOCK_BYTES), generator=generator).to(torch.uint8)


def sums_of(blocks: torch.Tensor) -> tuple[int, ...]:
    return tuple(xxhash.xxh3_64_intdigest(block.numpy()) & (1 << 63) - 1 for block in blocks)


def make(memory: torch.Tensor, *, late: bool) -> tuple[DeviceBlocks, WireCopier, torch.Tensor]:
    blocks = DeviceBlocks(memory, 2, HostDevice(late=late))
    wire = torch.zeros((NUM_WIRE_BLOCKS, BLOCK_BYTES), dtype=torch.uint8)
    return blocks, blocks.copier(wire), wire


@given(IDS, st.permutations(range(NUM_WIRE_BLOCKS)), st.booleans())
def test_there_and_back(block_ids: list[int], places: list[int], late: bool) -> None:
    """Wherever the wire blocks lie, in runs or scattered."""
    memory, wire_ids = cache(), places[: len(block_ids)]
    _, copier, wire = make(memory, late=late)
    assert copier.gather(block_ids, wire_ids) == sums_of(cache()[block_ids])
    assert torch.equal(wire[wire_ids], cache()[block_ids])
    memory[block_ids] = 255
    assert copier.scatter(wire_ids, block_ids) == sums_of(cache()[block_ids])
    assert torch.equal(memory, cache())


def test_what_the_device_offers() -> None:
    memory = cache()
    blocks, _, _ = make(memory, late=True)
    assert (blocks.num_blocks, blocks.num_scratch_blocks, blocks.block_bytes) == (10, 2, BLOCK_BYTES)
    assert blocks.memory is memory
    assert blocks.sums([11, 0]) == sums_of(memory[[11, 0]])
    assert blocks.sums([]) == ()
    for ids in ([12], [-1]):
        with pytest.raises(IndexError, match="not all of"):
            blocks.sums(ids)


def test_copies_do_not_wait_for_the_steps_under_way() -> None:
    memory, device = cache(), HostDevice(late=True)
    copier = DeviceBlocks(memory, 0, device).copier(torch.zeros((NUM_WIRE_BLOCKS, BLOCK_BYTES), dtype=torch.uint8))
    step = device.compute.submit(lambda: memory[0].fill_(7))
    copier.gather([3], [0])
    copier.scatter([0], [4])
    assert not step.done()
    step.wait()
    assert torch.equal(memory[4], cache()[3])


def test_steps_and_copies_of_several_threads_at_once() -> None:
    """A late device's work is done by whoever waits first; everybody else still sees it done."""
    memory, device = torch.zeros((NUM_BLOCKS, BLOCK_BYTES), dtype=torch.uint8), HostDevice(late=True)
    wire = torch.zeros((NUM_WIRE_BLOCKS, BLOCK_BYTES), dtype=torch.uint8)
    copier = DeviceBlocks(memory, 0, device).copier(wire)
    wrong: list[str] = []

    def steps() -> None:
        for number in range(200):
            device.compute.submit(lambda number=number: memory[0].fill_(number)).wait()  # type: ignore[misc]
            if not bool((memory[0] == number).all()):
                wrong.append(f"step {number} was not done when its wait returned")

    def copies(mine: int) -> None:
        for number in range(100):
            wire[mine].fill_(number)
            copier.scatter([mine], [mine + 1])
            copier.gather([mine + 1], [mine + 4])
            if not bool((wire[mine + 4] == number).all()):
                wrong.append(f"copy {number} was not done when it returned")

    threads = [threading.Thread(target=steps), *(threading.Thread(target=copies, args=(i,)) for i in range(2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_run_of_wire_blocks_crosses_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    _, copier, _ = make(cache(), late=False)
    copy_out = copier._offload.copy_out
    monkeypatch.setattr(
        copier._offload, "copy_out", lambda ids, host, **more: (pieces.append(len(ids)), copy_out(ids, host, **more))[1]
    )
    copier.gather([9, 4, 0, 5, 6], [1, 2, 3, 6, 7])
    assert pieces == [3, 2]
