"""DeviceArena: the KV cache in the memory of a device, as transports that reach it there see it.

It describes memory that the engine allocated, and owns nothing: whoever made it sees to it that the memory stays where it is
until the process ends. Registered once with a transport, it is read and written in place: by CUDA IPC on one host, by
RDMA between hosts.

    | block 0 | block 1 | ... | block num_blocks - 1 | scratch blocks |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch

from kv_transfer.arena import HostArena
from kv_transfer.device_staging import BlockCopier


class DeviceBlocks(Protocol):
    """What an engine whose KV cache is in device memory offers to those who move its blocks.

    Block ids up to `num_blocks` are KV blocks; `num_scratch_blocks` more hold nothing of anybody's.
    """

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_scratch_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def address(self) -> int:
        """Of block 0, on the device."""
        ...

    @property
    def device_id(self) -> int: ...

    def sums(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        """Checksums of blocks as they lie on the device. Blocking, from any thread."""
        ...

    def copier(self, wire_memory: torch.Tensor) -> BlockCopier:
        """Copies to and from this host memory, which is pinned from now on: uint8 [num_wire_blocks, block_bytes]."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceArena:
    """What HostArena says of host memory. There is no way to its bytes from here: only transports have one."""

    num_blocks: int
    num_scratch_blocks: int
    block_bytes: int
    address: int
    device_id: int
    memory_kind: ClassVar[Literal["cuda"]] = "cuda"

    @classmethod
    def of(cls, blocks: DeviceBlocks) -> "DeviceArena":
        return cls(blocks.num_blocks, blocks.num_scratch_blocks, blocks.block_bytes, blocks.address, blocks.device_id)

    @property
    def num_wire_blocks(self) -> int:
        """Blocks that a peer may name: scratch blocks are the last of them."""
        return self.num_blocks + self.num_scratch_blocks

    @property
    def size_bytes(self) -> int:
        """Of all blocks."""
        return self.num_wire_blocks * self.block_bytes


Arena = HostArena | DeviceArena
