"""OffloadStream: KV blocks to host memory and back, on a stream of their own, while steps compute.

A copy is queued and watched through its CopyHandle; nobody waits unless they ask to. Blocks are collected into one staging
buffer on the device and cross the bus in large pieces: a call for every block would cost the engine's thread more than the
copy costs the device. The staging buffer is the stream's own, and copies follow one another, so it is never shared.

What the caller owes: until a handle is done, host memory and blocks belong to the copy. A block that is being copied out may
be read by steps meanwhile, and is not written; one that is being copied in is not touched.
"""

from collections.abc import Sequence

import torch

from engine.cuda.device import Completion, Device, Work, nothing
from kernels.block_copy import gather_blocks, scatter_blocks

STAGING_BYTES = 64 << 20
"""Of device memory: large enough to keep the bus busy for a millisecond."""


class CopyHandle:
    """One copy under way."""

    def __init__(self, completion: Completion, device: Device) -> None:
        self._completion = completion
        self._device = device

    def done(self) -> bool:
        """Whether it has ended. Never waits."""
        return self._completion.done()

    def wait(self) -> None:
        """Until it has ended. Raises what the device raised."""
        self._completion.wait()

    def hold_steps(self) -> None:
        """Steps launched from now on begin after it, without the host waiting: for blocks that the next step reads."""
        self._device.compute.submit(nothing, after=(self._completion,))


class OffloadStream:
    """`kv_memory` is the cache as bytes: uint8 [num_blocks, block_bytes], on the device.

    Methods may be called from any one thread at a time. They raise ValueError for host memory of another shape, IndexError
    for blocks that are not in the cache; nothing is copied then.
    """

    def __init__(self, kv_memory: torch.Tensor, device: Device, staging_bytes: int = STAGING_BYTES) -> None:
        assert kv_memory.dtype == torch.uint8
        self._kv_memory = kv_memory
        self._device = device
        num_blocks, block_bytes = kv_memory.shape
        self._staged_blocks = max(1, min(num_blocks, staging_bytes // block_bytes))
        with torch.inference_mode():
            self._staging = torch.empty(
                (self._staged_blocks, block_bytes), dtype=torch.uint8, device=device.torch_device
            )

    def host_memory(self, num_blocks: int) -> torch.Tensor:
        """Pinned memory for so many blocks: uint8 [num_blocks, block_bytes]."""
        return self._device.pinned((num_blocks, self._kv_memory.shape[1]), torch.uint8)

    def copy_out(self, block_ids: Sequence[int], host: torch.Tensor, *, after_steps: bool = True) -> CopyHandle:
        """The blocks, as the steps launched before this call leave them, to `host`: uint8 [len(block_ids), block_bytes],
        pinned, and written in the order of `block_ids`. Without `after_steps`, as they are: for blocks that no step under
        way writes to, whose copy then need not wait for one."""
        index = self._index(block_ids, host)

        def work() -> None:
            places = self._device.upload(index)
            for start in range(0, len(index), self._staged_blocks):
                ids = places[start : start + self._staged_blocks]
                staged = self._staging[: len(ids)]
                gather_blocks(self._kv_memory, ids, staged)
                host[start : start + len(ids)].copy_(staged, non_blocking=True)

        return self._submit(work, after_steps)

    def copy_in(self, host: torch.Tensor, block_ids: Sequence[int], *, after_steps: bool = True) -> CopyHandle:
        """`host`, as `copy_out` left it, into these blocks, all distinct, after the steps launched before this call or,
        without `after_steps`, beside them: for blocks that none of them knows. The blocks may be used once the handle is
        done, or by steps launched after `hold_steps`."""
        index = self._index(block_ids, host)
        if len(set(block_ids)) != len(block_ids):
            raise ValueError("a block is to be written twice")

        def work() -> None:
            places = self._device.upload(index)
            for start in range(0, len(index), self._staged_blocks):
                ids = places[start : start + self._staged_blocks]
                staged = self._staging[: len(ids)]
                staged.copy_(host[start : start + len(ids)], non_blocking=True)
                scatter_blocks(staged, self._kv_memory, ids)

        return self._submit(work, after_steps)

    def _submit(self, work: Work, after_steps: bool) -> CopyHandle:
        """Behind all copies before it, and perhaps behind the steps launched so far."""
        after = (self._device.compute.submit(nothing),) if after_steps else ()
        return CopyHandle(self._device.copies.submit(work, after), self._device)

    def _index(self, block_ids: Sequence[int], host: torch.Tensor) -> torch.Tensor:
        num_blocks, block_bytes = self._kv_memory.shape
        if host.dtype != torch.uint8 or host.shape != (len(block_ids), block_bytes) or not host.is_contiguous():
            raise ValueError(
                f"{len(block_ids)} blocks take dense uint8 host memory of [{len(block_ids)}, {block_bytes}],"
                f" not {host.dtype} {tuple(host.shape)}"
            )
        outside = next((block_id for block_id in block_ids if not 0 <= block_id < num_blocks), None)
        if outside is not None:
            raise IndexError(f"block {outside} is not in a cache of {num_blocks} blocks")
        return torch.tensor(block_ids, dtype=torch.int64)
