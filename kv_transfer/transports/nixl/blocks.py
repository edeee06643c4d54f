"""NixlBlocks: an arena as NIXL sees it. One region to register, one descriptor per block, in both processes the same.

Scratch blocks follow the others and count like them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Memory = Literal["DRAM", "VRAM"]
"""In NIXL's words: of the host, of a GPU."""

Rows = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class NixlBlocks:
    """`num_blocks` blocks of `block_bytes` bytes, contiguous from `address`. `device_id`: which GPU; 0 for the host."""

    memory: Memory
    device_id: int
    address: int
    block_bytes: int
    num_blocks: int

    @property
    def region(self) -> tuple[int, int, int, str]:
        """What register_memory takes: address, bytes, device, no name."""
        return (self.address, self.num_blocks * self.block_bytes, self.device_id, "")

    def rows(self) -> Rows:
        """What prep_xfer_dlist takes: address, bytes and device of every block. uint64 [num_blocks, 3]"""
        rows = np.empty((self.num_blocks, 3), np.uint64)
        rows[:, 0] = np.uint64(self.address) + np.arange(self.num_blocks, dtype=np.uint64) * np.uint64(self.block_bytes)
        rows[:, 1] = self.block_bytes
        rows[:, 2] = self.device_id
        return rows
