"""DeviceArena: the KV cache in the memory of a device, as transports that reach it there see it.

It describes memory that the engine allocated, and owns nothing: whoever made it sees to it that the memory stays where it is
until the process ends. Registered once with a transport, it is read and written in place: by CUDA IPC on one host, by
RDMA between hosts.

    | block 0 | block 1 | ... | block num_blocks - 1 | scratch blocks |
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from kv_transfer.memory.arena import HostArena


@dataclass(frozen=True, slots=True)
class DeviceArena:
    """What HostArena says of host memory. `memory` keeps it where it is for as long as anybody holds this; there is no way
    to its bytes from here: only transports have one."""

    memory_kind: ClassVar[Literal["cuda"]] = "cuda"

    num_blocks: int
    num_scratch_blocks: int
    block_bytes: int
    address: int
    device_id: int
    memory: object = field(repr=False)

    @property
    def num_wire_blocks(self) -> int:
        """Blocks that a peer may name: scratch blocks are the last of them."""
        return self.num_blocks + self.num_scratch_blocks

    @property
    def size_bytes(self) -> int:
        """Of all blocks."""
        return self.num_wire_blocks * self.block_bytes


Arena = HostArena | DeviceArena
