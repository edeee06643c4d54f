"""DeviceBlocks: the KV cache of a device, for those who move its blocks between processes while steps compute.

Whoever moves a block out has been told that it is final, and whoever moves one in that it is reserved for it: no step under
way writes to either (engine.events says when). So nothing here waits for a step.
"""

import threading
from collections.abc import Callable, Sequence

import torch

from engine.cuda.device import Completion, Device
from engine.cuda.offload_stream import OffloadStream
from engine.cuda.slot_copier import SlotCopier, consecutive_runs
from kernels.block_checksum import block_checksums

_LOW_63_BITS = (1 << 63) - 1


class DeviceBlocks:
    """`memory` is the cache as bytes, uint8 [num_blocks + num_scratch_blocks, block_bytes]: blocks of the engine's first, then
    some that hold nothing of anybody's. It stays where it is until the process ends. Any thread."""

    def __init__(self, memory: torch.Tensor, num_scratch_blocks: int, device: Device) -> None:
        self.memory = memory
        self._device = device
        self.num_scratch_blocks = num_scratch_blocks
        self.num_blocks = memory.shape[0] - num_scratch_blocks
        self.block_bytes = memory.shape[1]
        self._submitting = threading.Lock()

    def sums(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        """Checksums (protocol.transfer.Checksum) of blocks as they lie on the device. Blocking. Raises IndexError for a
        block that is not there."""
        with self._submitting:
            found, completion = self._submit_sums(block_ids)
        return _collect(found, completion)

    def copier(self, wire_memory: torch.Tensor) -> "WireCopier":
        """Copies to and from this host memory, which is pinned from now on: uint8 [num_wire_blocks, block_bytes]. It must
        outlive the process's last copy. Raises RuntimeError where it cannot be pinned."""
        self._device.pin(wire_memory)
        offload = OffloadStream(self.memory, self._device)
        return WireCopier(wire_memory, offload, self._submitting, self._submit_sums)

    def slot_copier(self, slots: torch.Tensor) -> SlotCopier:
        """Copies to and from the slots of a store, host memory that is pinned from now on: uint8 [num_slots, block_bytes].
        It must outlive the process's last copy. Raises RuntimeError where it cannot be pinned."""
        self._device.pin(slots)
        return SlotCopier(slots, OffloadStream(self.memory, self._device), self._submitting)

    def _submit_sums(self, block_ids: Sequence[int]) -> tuple[torch.Tensor, Completion]:
        """Behind all copies before it."""
        num_blocks = self.memory.shape[0]
        if not all(0 <= block_id < num_blocks for block_id in block_ids):
            raise IndexError(f"not all of {block_ids} are in a cache of {num_blocks} blocks")
        index = torch.tensor(block_ids, dtype=torch.int64)
        found = self._device.pinned((len(block_ids),), torch.int64)

        def work() -> None:
            found.copy_(block_checksums(self.memory, self._device.upload(index)), non_blocking=True)

        return found, self._device.copies.submit(work)


class WireCopier:
    """Copies between a device's KV blocks and wire blocks of pinned host memory. Made by DeviceBlocks.copier. Any thread.

    Both calls block until the copy has ended, and return the checksums of the KV blocks as they lie on the device.
    """

    def __init__(
        self,
        wire_memory: torch.Tensor,
        offload: OffloadStream,
        submitting: threading.Lock,
        submit_sums: Callable[[Sequence[int]], tuple[torch.Tensor, Completion]],
    ) -> None:
        self._wire_memory = wire_memory
        self._offload = offload
        self._submitting = submitting
        self._submit_sums = submit_sums

    def gather(self, block_ids: Sequence[int], wire_ids: Sequence[int]) -> tuple[int, ...]:
        """KV blocks to wire blocks."""
        with self._submitting:
            for start, end in consecutive_runs(wire_ids):
                self._offload.copy_out(block_ids[start:end], self._wire(wire_ids[start:end]), after_steps=False)
            found, completion = self._submit_sums(block_ids)
        return _collect(found, completion)

    def scatter(self, wire_ids: Sequence[int], block_ids: Sequence[int]) -> tuple[int, ...]:
        """Wire blocks to KV blocks, all distinct."""
        with self._submitting:
            for start, end in consecutive_runs(wire_ids):
                self._offload.copy_in(self._wire(wire_ids[start:end]), block_ids[start:end], after_steps=False)
            found, completion = self._submit_sums(block_ids)
        return _collect(found, completion)

    def _wire(self, consecutive_ids: Sequence[int]) -> torch.Tensor:
        return self._wire_memory[consecutive_ids[0] : consecutive_ids[-1] + 1]


def _collect(found: torch.Tensor, completion: Completion) -> tuple[int, ...]:
    completion.wait()
    return tuple(digest & _LOW_63_BITS for digest in found.tolist())
