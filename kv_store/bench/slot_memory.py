"""SlotMemory: blocks of memory as a host tier has them, page-aligned and all there, for measurements."""

import mmap
import os

PATTERN_BYTES = 1 << 20


class SlotMemory:
    """A BlockMemory of `num_blocks` blocks of `block_bytes`, filled with bytes that no disk compresses. `memory` is all of it.
    It goes with its last view."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        size = num_blocks * block_bytes
        self.memory = memoryview(mmap.mmap(-1, size))
        pattern = os.urandom(min(PATTERN_BYTES, size))
        for start in range(0, size, len(pattern)):
            self.memory[start : start + len(pattern)] = pattern[: size - start]

    def block(self, block_id: int) -> memoryview:
        """One block's bytes. Raises IndexError outside of the region."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} of {self.num_blocks}")
        return self.memory[block_id * self.block_bytes : (block_id + 1) * self.block_bytes]

    def blocks(self) -> list[memoryview]:
        return [self.block(block_id) for block_id in range(self.num_blocks)]
