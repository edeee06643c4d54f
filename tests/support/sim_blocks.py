"""Blocks in a simulation: what must be in each, and when it was not.

Prompt        what is computed, so that anyone can work out its blocks' bytes and its first token
BlockStore    lends the blocks of one arena, last returned first
"""

from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from kv_transfer.memory.arena import HostArena
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.tokens import SampledToken

LAYOUT = KVLayout(
    model="world",
    revision="1",
    dtype="float16",
    num_layers=1,
    num_kv_heads=1,
    head_dim=8,
    block_size=4,
    rope="none",
)
NUM_BLOCKS = 48
NUM_SCRATCH_BLOCKS = 4
FREE = b"\xdb"


@dataclass(frozen=True)
class Prompt:
    """What is to be computed: its blocks' bytes and its first token can be worked out by anyone."""

    request_id: RequestId
    num_tokens: int

    @property
    def num_blocks(self) -> int:
        return LAYOUT.num_blocks_for(self.num_tokens)

    @property
    def first_token(self) -> SampledToken:
        return SampledToken(blake3(self.request_id.encode()).digest()[0])

    def block(self, index: int) -> bytes:
        return blake3(f"{self.request_id}/{index}".encode()).digest(length=LAYOUT.block_bytes)


class BlockStore:
    """Every block is free, or lent to somebody. A free one is overwritten at once, so that whoever still reads it reads
    something else, and must not change until it is lent again."""

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self._free = list(range(arena.num_blocks))
        self._blank = FREE * arena.block_bytes
        arena.memory[: arena.num_blocks * arena.block_bytes] = self._blank * arena.num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_blocks: int) -> tuple[int, ...] | None:
        if num_blocks > len(self._free):
            return None
        return tuple(self._free.pop() for _ in range(num_blocks))

    def give_back(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            assert block_id not in self._free, f"block {block_id} is given back twice"
            self.arena.block(block_id)[:] = self._blank
            self._free.append(block_id)

    def fill(self, block_ids: Sequence[int], prompt: Prompt, first: int = 0) -> None:
        for index, block_id in enumerate(block_ids, first):
            self.arena.block(block_id)[:] = prompt.block(index)

    def written(self) -> list[int]:
        """Free blocks that bytes have landed in."""
        return [block_id for block_id in self._free if self.arena.block(block_id) != self._blank]

    def differing(self, block_ids: Sequence[int], prompt: Prompt) -> list[int]:
        """Blocks of the context that are not what was computed, by index."""
        return [i for i, block_id in enumerate(block_ids) if self.arena.block(block_id) != prompt.block(i)]
