"""HeldBlocks: what a policy knows of the blocks in its tier, and which of them others continue. Pick: one choice of victims.

A block may go when no block that continues it is held: so conversations are given up from their ends, and what stays of
them is a prefix, which is all that a later request can use.
"""

from collections.abc import Callable

from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock


class HeldBlocks:
    """Lives as long as its policy. Children of a parent are counted whether it is held or not: blocks come in any order.

    What a block says of itself may be a lie: it was put by another node, or read from a file. It continues its parent only
    where that one stands at the place before its own. So nothing continues itself, round whatever corners, and of
    all that is held something can always go.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, CachedBlock] = {}
        self._num_children: dict[_Place, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._blocks

    def add(self, block: CachedBlock) -> bool:
        """False if it was held already."""
        if block.block_hash in self._blocks:
            return False
        self._blocks[block.block_hash] = block
        before = _place_before(block)
        self._num_children[before] = self._num_children.get(before, 0) + 1
        return True

    def discard(self, block_hash: BlockHash) -> BlockHash | None:
        """The held block that it continued, if nothing held continues that one any more: it may go next."""
        block = self._blocks.pop(block_hash, None)
        if block is None:
            return None
        before = _place_before(block)
        left = self._num_children[before] - 1
        if left:
            self._num_children[before] = left
            return None
        del self._num_children[before]
        return self._held_parent(block)

    def position(self, block_hash: BlockHash) -> int:
        return self._blocks[block_hash].position

    def parent(self, block_hash: BlockHash) -> BlockHash | None:
        """The held block that it continues."""
        return self._held_parent(self._blocks[block_hash])

    def num_children(self, block_hash: BlockHash) -> int:
        block = self._blocks.get(block_hash)
        return 0 if block is None else self._num_children.get((block_hash, block.position), 0)

    def _held_parent(self, block: CachedBlock) -> BlockHash | None:
        parent = self._blocks.get(block.parent)
        return BlockHash(block.parent) if parent is not None and parent.position == block.position - 1 else None


_Place = tuple[bytes, int]
"""A block's address and its position."""


def _place_before(block: CachedBlock) -> _Place:
    return block.parent, block.position - 1


class Pick:
    """One call of EvictionPolicy.victims: what it has chosen so far. The chosen count as gone here, and nowhere else."""

    def __init__(self, held: HeldBlocks, count: int, may_evict: Callable[[BlockHash], bool]) -> None:
        self.chosen: list[BlockHash] = []
        self._held = held
        self._count = count
        self._may_evict = may_evict
        self._taken: set[BlockHash] = set()
        self._gone: dict[BlockHash, int] = {}

    @property
    def is_full(self) -> bool:
        return len(self.chosen) >= self._count

    def is_continued(self, block_hash: BlockHash) -> bool:
        """Whether a block that continues this one stays."""
        return self._held.num_children(block_hash) > self._gone.get(block_hash, 0)

    def has(self, block_hash: BlockHash) -> bool:
        return block_hash in self._taken

    def allows(self, block_hash: BlockHash) -> bool:
        return self._may_evict(block_hash)

    def take(self, block_hash: BlockHash) -> BlockHash | None:
        """The block that it continues, if that one could go next."""
        self.chosen.append(block_hash)
        self._taken.add(block_hash)
        parent = self._held.parent(block_hash)
        if parent is None:
            return None
        self._gone[parent] = self._gone.get(parent, 0) + 1
        return None if self.is_continued(parent) else parent
