"""PrefixCache: address of a full KV block -> the block that holds it. An index: it neither holds nor frees blocks.

An address enters when its block has been computed (or verified after a transfer) and leaves when the pool reuses the
block. Two sequences may compute the same block; the first stays, the second is an ordinary block without an address.
"""

from collections.abc import Sequence
from itertools import compress, repeat

from engine.kv_event_log import KVEventLog
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, Tenant


class PrefixCache:
    def __init__(self, log: KVEventLog) -> None:
        self._log = log
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._origin_of: dict[int, tuple[BlockHash, int, Tenant]] = {}
        """Parent, position and tenant of each block with an address; of others, what they were last."""

    def __len__(self) -> int:
        return len(self._block_of)

    def match(self, block_hashes: Sequence[BlockHash], max_blocks: int) -> list[int]:
        """Blocks that hold the longest known prefix of a chain of addresses, `max_blocks` at most."""
        found: list[int] = []
        for block_hash in block_hashes[:max_blocks]:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def insert(
        self, parent: BlockHash, block_hashes: Sequence[BlockHash], block_ids: Sequence[int], first: int, tenant: Tenant
    ) -> Sequence[int]:
        """These blocks hold these addresses: positions `first`, `first + 1`, ... of a chain, which continue `parent`.
        Returns the blocks that have entered the index."""
        parents: Sequence[BlockHash] = (parent, *block_hashes[:-1])
        positions: Sequence[int] = range(first, first + len(block_hashes))
        if not self._block_of.keys().isdisjoint(block_hashes):
            new = [block_hash not in self._block_of for block_hash in block_hashes]
            parents, positions = tuple(compress(parents, new)), tuple(compress(positions, new))
            block_hashes, block_ids = tuple(compress(block_hashes, new)), tuple(compress(block_ids, new))
        self._block_of.update(zip(block_hashes, block_ids, strict=True))
        self._hash_of.update(zip(block_ids, block_hashes, strict=True))
        self._origin_of.update(zip(block_ids, zip(parents, positions, repeat(tenant)), strict=False))
        self._log.stored(block_hashes)
        return block_ids

    def describe(self, block_id: int) -> CachedBlock | None:
        """What a block holds; None if it has no address."""
        block_hash = self._hash_of.get(block_id)
        return None if block_hash is None else CachedBlock(block_hash, *self._origin_of[block_id])

    def forget(self, block_id: int) -> None:
        """The block is about to be overwritten."""
        block_hash = self._hash_of.pop(block_id)
        del self._block_of[block_hash]
        self._log.removed([block_hash])

    def clear(self) -> list[int]:
        """Forget everything. Returns the blocks that had an address."""
        blocks = list(self._hash_of)
        self._block_of.clear()
        self._hash_of.clear()
        self._log.cleared()
        return blocks
