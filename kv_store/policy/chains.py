"""HeldBlocks: what a policy knows of the blocks in its tier, and which of them others continue. Pick: one choice of victims.

A block may go when no block that continues it is held: so conversations are given up from their ends, and what stays of
them is a prefix, which is all that a later request can use.
"""

from collections.abc import Callable, Iterator

from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock


class HeldBlocks:
    """Lives as long as its policy. A parent is counted whether it is held or not: blocks come in any order."""

    def __init__(self) -> None:
        self._parents: dict[BlockHash, BlockHash] = {}
        self._num_children: dict[BlockHash, int] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._parents

    def __iter__(self) -> Iterator[BlockHash]:
        return iter(self._parents)

    def add(self, block: CachedBlock) -> bool:
        """False if it was held already."""
        block_hash, parent = BlockHash(block.block_hash), BlockHash(block.parent)
        if block_hash in self._parents:
            return False
        self._parents[block_hash] = parent
        self._num_children[parent] = self._num_children.get(parent, 0) + 1
        return True

    def discard(self, block_hash: BlockHash) -> BlockHash | None:
        """The block that it continued, if nothing held continues that one any more: it may go next."""
        parent = self._parents.pop(block_hash, None)
        if parent is None:
            return None
        left = self._num_children[parent] - 1
        if left:
            self._num_children[parent] = left
            return None
        del self._num_children[parent]
        return parent

    def parent(self, block_hash: BlockHash) -> BlockHash:
        return self._parents[block_hash]

    def num_children(self, block_hash: BlockHash) -> int:
        return self._num_children.get(block_hash, 0)


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
        self._gone[parent] = self._gone.get(parent, 0) + 1
        return None if self.is_continued(parent) else parent
