"""LRUPolicy: the block that was wanted the longest ago goes first; of one request's blocks, the last."""

from collections.abc import Callable, Iterator, Sequence

from kv_store.policy.chains import HeldBlocks, Pick
from kv_store.policy.leaf_queue import LeafQueue
from kv_store.policy.policy import steps_of
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock


class LRUPolicy:
    def __init__(self) -> None:
        self._held = HeldBlocks()
        self._queue = LeafQueue()

    def __len__(self) -> int:
        """Blocks in the tier."""
        return len(self._held)

    def wanted(self, blocks: Sequence[CachedBlock], num_held: int, now: float) -> Iterator[None]:  # noqa: ARG002
        for step in steps_of(blocks[::-1]):
            for block in step:
                if block.block_hash in self._held:
                    self._queue.append(BlockHash(block.block_hash))
            yield

    def added(self, blocks: Sequence[CachedBlock], now: float) -> None:  # noqa: ARG002  (the seam's)
        for block in reversed(blocks):
            if self._held.add(block):
                self._queue.append(BlockHash(block.block_hash))

    def removed(self, block_hashes: Sequence[BlockHash]) -> None:
        for block_hash in block_hashes:
            self._queue.discard(block_hash)
            freed = self._held.discard(block_hash)
            if freed is not None:
                self._queue.release(freed)

    def victims(self, count: int, now: float, may_evict: Callable[[BlockHash], bool]) -> list[BlockHash]:  # noqa: ARG002
        pick = Pick(self._held, count, may_evict)
        while not pick.is_full and (block_hash := self._queue.first(pick)) is not None:
            self._queue.put_aside(block_hash)
            freed = pick.take(block_hash)
            if freed is not None:
                self._queue.release(freed)
        self._queue.restore()
        return pick.chosen
