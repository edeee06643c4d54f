"""S3FIFOPolicy: newcomers wait in a small queue and enter the main one only if they are wanted again meanwhile.

After Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023): the share of the small queue, the
frequencies up to 3 and the ghosts are theirs. Ours: a chain goes from its end.
"""

from collections.abc import Callable, Iterator, Sequence

from kv_store.policy.chains import HeldBlocks, Pick
from kv_store.policy.ghosts import Ghosts
from kv_store.policy.leaf_queue import LeafQueue
from kv_store.policy.policy import steps_of
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock

SMALL_SHARE = 0.1
MAX_FREQUENCY = 3


class S3FIFOPolicy:
    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._small_capacity = max(1, int(capacity_blocks * SMALL_SHARE))
        self._held = HeldBlocks()
        self._frequency: dict[BlockHash, int] = {}
        self._small = LeafQueue()
        self._main = LeafQueue()
        self._ghosts = Ghosts()

    @property
    def num_ghosts(self) -> int:
        """At most the tier's capacity."""
        return len(self._ghosts)

    def wanted(self, blocks: Sequence[CachedBlock], num_held: int, now: float) -> Iterator[None]:  # noqa: ARG002
        for step in steps_of(blocks):
            for block in step:
                block_hash = BlockHash(block.block_hash)
                if block_hash in self._held:
                    self._frequency[block_hash] = min(self._frequency[block_hash] + 1, MAX_FREQUENCY)
            yield

    def added(self, blocks: Sequence[CachedBlock], now: float) -> None:  # noqa: ARG002  (the seam's)
        for block in reversed(blocks):
            if not self._held.add(block):
                continue
            block_hash = BlockHash(block.block_hash)
            self._frequency[block_hash] = 0
            (self._main if self._ghosts.discard(block_hash) else self._small).append(block_hash)

    def removed(self, block_hashes: Sequence[BlockHash]) -> None:
        for block_hash in block_hashes:
            if block_hash not in self._held:
                continue
            del self._frequency[block_hash]
            if block_hash in self._small:
                self._ghosts.add(block_hash)
            self._small.discard(block_hash)
            self._main.discard(block_hash)
            freed = self._held.discard(block_hash)
            if freed is not None:
                self._release(freed)
        self._ghosts.shrink_to(self._capacity)

    def victims(self, count: int, now: float, may_evict: Callable[[BlockHash], bool]) -> list[BlockHash]:  # noqa: ARG002
        pick = Pick(self._held, count, may_evict)
        while not pick.is_full:
            small_first = len(self._small) > self._small_capacity
            if not (self._step(pick, from_small=small_first) or self._step(pick, from_small=not small_first)):
                break
        self._small.restore()
        self._main.restore()
        return pick.chosen

    def _step(self, pick: Pick, *, from_small: bool) -> bool:
        """Take or move on the first block of a queue; False if none of it may go."""
        queue = self._small if from_small else self._main
        block_hash = queue.first(pick)
        if block_hash is None:
            return False
        frequency = self._frequency[block_hash]
        if frequency > (1 if from_small else 0):
            # Wanted meanwhile: another round in the main queue. Each round costs a block one of at most three wants.
            self._frequency[block_hash] = 0 if from_small else frequency - 1
            queue.discard(block_hash)
            self._main.append(block_hash)
            return True
        queue.put_aside(block_hash)
        freed = pick.take(block_hash)
        if freed is not None:
            self._release(freed)
        return True

    def _release(self, block_hash: BlockHash) -> None:
        self._small.release(block_hash)
        self._main.release(block_hash)
