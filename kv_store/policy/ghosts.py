"""Ghosts: a bounded set of addresses that a tier has given up, the oldest forgotten first."""

from collections import OrderedDict

from protocol.ids import BlockHash


class Ghosts:
    def __init__(self) -> None:
        self._addresses: OrderedDict[BlockHash, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._addresses)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._addresses

    def add(self, block_hash: BlockHash) -> None:
        self._addresses[block_hash] = None
        self._addresses.move_to_end(block_hash)

    def discard(self, block_hash: BlockHash) -> bool:
        """Whether it was there."""
        if block_hash not in self._addresses:
            return False
        del self._addresses[block_hash]
        return True

    def shrink_to(self, limit: int) -> None:
        while len(self._addresses) > max(limit, 0):
            self._addresses.popitem(last=False)
