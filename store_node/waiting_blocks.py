"""WaitingBlocks: blocks in the order of their coming, and by what they continue, so that a chain leaves together."""

from collections import OrderedDict
from collections.abc import Iterable

from protocol.kv_blocks import CachedBlock


class WaitingBlocks:
    """Pure. Adding costs as much as a look-up, taking as much as there is taken, however many wait."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, CachedBlock] = OrderedDict()
        self._children: dict[bytes, dict[bytes, None]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, blocks: Iterable[CachedBlock]) -> None:
        for block in blocks:
            self._blocks[block.block_hash] = block
            self._children.setdefault(block.parent, {})[block.block_hash] = None

    def take_chain(self, max_blocks: int) -> list[CachedBlock]:
        """The block that waits longest, and those around it that its chain connects, in the chain's order; where it forks,
        along the child that came first. Not to be called while nothing waits."""
        first = self._take(next(iter(self._blocks)))
        before: list[CachedBlock] = []
        parent = first.parent
        while len(before) < max_blocks - 1 and parent in self._blocks:
            before.append(self._take(parent))
            parent = before[-1].parent
        batch = [*reversed(before), first]
        while len(batch) < max_blocks and (children := self._children.get(batch[-1].block_hash)):
            batch.append(self._take(next(iter(children))))
        return batch

    def take_all(self) -> list[CachedBlock]:
        blocks = list(self._blocks.values())
        self._blocks.clear()
        self._children.clear()
        return blocks

    def _take(self, block_hash: bytes) -> CachedBlock:
        block = self._blocks.pop(block_hash)
        siblings = self._children[block.parent]
        del siblings[block_hash]
        if not siblings:
            del self._children[block.parent]
        return block
