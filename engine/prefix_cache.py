"""PrefixCache: address of a full KV block -> the block that holds it. An index: it neither holds nor frees blocks.

An address enters when its block has been computed (or verified after a transfer) and leaves when the pool reuses the
block. Two sequences may compute the same block; the first stays, the second is an ordinary block without an address.
"""

from collections.abc import Sequence

from engine.kv_event_log import KVEventLog
from protocol.ids import BlockHash


class PrefixCache:
    def __init__(self, log: KVEventLog) -> None:
        self._log = log
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

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

    def insert(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> list[int]:
        """These blocks hold these addresses. Returns the blocks that have entered the index."""
        entered: list[int] = []
        for block_hash, block_id in zip(block_hashes, block_ids, strict=True):
            if block_hash not in self._block_of:
                self._block_of[block_hash] = block_id
                self._hash_of[block_id] = block_hash
                entered.append(block_id)
        self._log.stored([self._hash_of[block_id] for block_id in entered])
        return entered

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
