"""ARCPolicy: one queue for blocks wanted once, one for blocks wanted again; ghosts of both say which deserves more room.

After Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache" (FAST 2003): T1, T2, B1, B2 and the target
p are theirs. Ours: a chain goes from its end, and the target moves when a ghost is brought back, not when it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence

from kv_store.policy.chains import HeldBlocks, Pick
from kv_store.policy.ghosts import Ghosts
from kv_store.policy.leaf_queue import LeafQueue
from kv_store.policy.policy import steps_of
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock


class ARCPolicy:
    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._held = HeldBlocks()
        self._once = LeafQueue()
        self._again = LeafQueue()
        self._once_ghosts = Ghosts()
        self._again_ghosts = Ghosts()
        self._target_once = 0.0

    @property
    def num_ghosts(self) -> int:
        """At most the tier's capacity."""
        return len(self._once_ghosts) + len(self._again_ghosts)

    def wanted(self, blocks: Sequence[CachedBlock], num_held: int, now: float) -> Iterator[None]:  # noqa: ARG002
        for step in steps_of(blocks[::-1]):
            for block in step:
                if block.block_hash in self._held:
                    self._once.discard(BlockHash(block.block_hash))
                    self._again.append(BlockHash(block.block_hash))
            yield

    def added(self, blocks: Sequence[CachedBlock], now: float) -> None:  # noqa: ARG002  (the seam's)
        for block in reversed(blocks):
            if not self._held.add(block):
                continue
            block_hash = BlockHash(block.block_hash)
            if block_hash in self._once_ghosts:
                step = max(1.0, len(self._again_ghosts) / len(self._once_ghosts))
                self._target_once = min(self._target_once + step, float(self._capacity))
            elif block_hash in self._again_ghosts:
                step = max(1.0, len(self._once_ghosts) / len(self._again_ghosts))
                self._target_once = max(self._target_once - step, 0.0)
            is_known = self._once_ghosts.discard(block_hash) or self._again_ghosts.discard(block_hash)
            (self._again if is_known else self._once).append(block_hash)
        self._bound_ghosts()

    def removed(self, block_hashes: Sequence[BlockHash]) -> None:
        for block_hash in block_hashes:
            if block_hash not in self._held:
                continue
            ghosts = self._once_ghosts if block_hash in self._once else self._again_ghosts
            ghosts.add(block_hash)
            self._once.discard(block_hash)
            self._again.discard(block_hash)
            freed = self._held.discard(block_hash)
            if freed is not None:
                self._release(freed)
        self._bound_ghosts()

    def victims(self, count: int, now: float, may_evict: Callable[[BlockHash], bool]) -> list[BlockHash]:  # noqa: ARG002
        pick = Pick(self._held, count, may_evict)
        while not pick.is_full:
            favoured = (self._once, self._again) if len(self._once) > self._target_once else (self._again, self._once)
            for queue in favoured:
                block_hash = queue.first(pick)
                if block_hash is not None:
                    break
            else:
                break
            queue.put_aside(block_hash)
            freed = pick.take(block_hash)
            if freed is not None:
                self._release(freed)
        self._once.restore()
        self._again.restore()
        return pick.chosen

    def _release(self, block_hash: BlockHash) -> None:
        self._once.release(block_hash)
        self._again.release(block_hash)

    def _bound_ghosts(self) -> None:
        self._once_ghosts.shrink_to(self._capacity - len(self._once))
        self._again_ghosts.shrink_to(self._capacity - len(self._once_ghosts))
