"""BlockTables: which blocks hold which sequence. Pool and prefix cache behind the four things a scheduler wants:
reserve a context, grow by a token, index what is computed, release; and pins, for blocks that others read.
"""

from collections.abc import Sequence as BlockIds
from functools import partial
from typing import Protocol

from engine.block_pool import BlockPool
from engine.kv_event_log import KVEventLog
from engine.prefix_cache import PrefixCache
from engine.sequence import Sequence
from protocol.block_hash import hash_blocks, root_hash
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock
from protocol.kv_layout import KVLayout


class CacheWatcher(Protocol):
    """Hears what enters the prefix cache, and what falls out of it before BlockPool.survey has come to it. May put
    off an admission that would make something fall out, and hold blocks until it is asked again."""

    def entered(self, block_ids: BlockIds[int]) -> None: ...

    def overlooked(self, block: CachedBlock) -> None: ...

    def puts_off(self, sequence: Sequence, num_blocks: int) -> bool: ...


class BlockTables:
    """Without `enable_prefix_cache` nothing is hashed, indexed or hit."""

    def __init__(self, layout: KVLayout, num_blocks: int, log: KVEventLog, *, enable_prefix_cache: bool) -> None:
        self._layout = layout
        self.block_size = layout.block_size
        self._enabled = enable_prefix_cache
        self._prefix_cache = PrefixCache(log)
        self.pool = BlockPool(num_blocks, on_reuse=self._prefix_cache.forget)
        self._watcher: CacheWatcher | None = None

    def watch(self, watcher: CacheWatcher) -> None:
        """From now on. Before any block is in use."""
        assert not len(self._prefix_cache), "the watcher has missed what is there"
        self._watcher = watcher
        self.pool.on_reuse = partial(self._forget, watcher)

    def reserve(self, sequence: Sequence, keep_free: int) -> bool:
        """Blocks for all tokens of the sequence, those of the prefix cache first. False, and nothing has changed, if
        fewer than `keep_free` blocks would stay free, or the watcher puts it off.

        At least one token is left to compute, since its logits are wanted, unless the sequence gets its first token
        from elsewhere. Costs a look-up per cached block.
        """
        num_tokens = len(sequence.token_ids)
        hit: list[int] = []
        if self._enabled:
            self._hash(sequence)
            computable = num_tokens if sequence.computes_nothing else num_tokens - 1
            hit = self._prefix_cache.match(sequence.block_hashes, computable // self.block_size)
        num_new = self._layout.num_blocks_for(num_tokens) - len(hit)
        if num_new + sum(map(self.pool.is_free, hit)) + keep_free > self.pool.num_free:
            return False
        if self._watcher is not None and self._watcher.puts_off(sequence, num_new):
            return False
        self.pool.share(hit)
        sequence.block_ids = hit + self.pool.allocate(num_new, after=hit[-1] if hit else None)
        sequence.num_computed = len(hit) * self.block_size
        sequence.num_indexed_blocks = len(hit)
        return True

    def grow(self, sequence: Sequence, num_tokens: int, keep_free: int = 0) -> bool:
        """Make sure there is a place for `num_tokens` tokens. False, and nothing has changed, if that takes blocks and
        fewer than `keep_free` would stay free."""
        if len(sequence.block_ids) * self.block_size >= num_tokens:
            return True
        num_new = self._layout.num_blocks_for(num_tokens) - len(sequence.block_ids)
        if self.pool.num_free < num_new + keep_free:
            return False
        sequence.block_ids += self.pool.allocate(num_new, after=sequence.block_ids[-1])
        return True

    def index(self, sequence: Sequence) -> None:
        """Offer the full blocks that have been computed since the last call to the prefix cache."""
        start, end = sequence.num_indexed_blocks, sequence.num_computed // self.block_size
        if not self._enabled or start >= end:
            return
        self._hash(sequence)
        parent = sequence.block_hashes[start - 1] if start else sequence.root_hash
        assert parent is not None, "a full block without a root"
        hashes, block_ids = sequence.block_hashes[start:end], sequence.block_ids[start:end]
        entered = self._prefix_cache.insert(parent, hashes, block_ids, start, sequence.tenant)
        for block_id in entered:
            self.pool.mark_cached(block_id)
        sequence.num_indexed_blocks = end
        if self._watcher is not None:
            self._watcher.entered(entered)

    def release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []

    def pin(self, block_hashes: tuple[BlockHash, ...]) -> tuple[int, ...]:
        """Hold the blocks of the longest cached prefix of this chain, until `unpin`."""
        block_ids = tuple(self._prefix_cache.match(block_hashes, len(block_hashes)))
        self.pool.share(block_ids)
        return block_ids

    def unpin(self, block_ids: tuple[int, ...]) -> None:
        self.pool.release(block_ids)

    def describe(self, block_id: int) -> CachedBlock | None:
        """What a block holds; None if nobody finds it."""
        return self._prefix_cache.describe(block_id)

    def clear_prefix_cache(self) -> None:
        for block_id in self._prefix_cache.clear():
            self.pool.mark_uncached(block_id)

    def _hash(self, sequence: Sequence) -> None:
        """Addresses of the full blocks that have none yet: each token is hashed once."""
        hashes = sequence.block_hashes
        start, end = len(hashes) * self.block_size, len(sequence.token_ids) // self.block_size * self.block_size
        if start < end:
            if sequence.root_hash is None:
                sequence.root_hash = root_hash(self._layout.identity, sequence.request.cache_salt)
            parent = hashes[-1] if hashes else sequence.root_hash
            hashes += hash_blocks(sequence.token_ids[start:end], self.block_size, parent)

    def _forget(self, watcher: CacheWatcher, block_id: int) -> None:
        """A free block is about to be handed out."""
        if not self.pool.is_surveyed(block_id) and (block := self.describe(block_id)) is not None:
            watcher.overlooked(block)
        self._prefix_cache.forget(block_id)
