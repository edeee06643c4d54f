"""LeafQueue: blocks in the order in which they are to go, except that none goes before those that continue it.

A block that is continued by a held one is parked when its turn comes, and is first in line again once it is not. So it
is looked at once for each time that it is passed over, however long its conversation stays.
"""

from collections import OrderedDict

from kv_store.policy.chains import Pick
from protocol.ids import BlockHash


class LeafQueue:
    def __init__(self) -> None:
        self._order: OrderedDict[BlockHash, None] = OrderedDict()
        self._parked: set[BlockHash] = set()
        self._aside: list[BlockHash] = []

    def __len__(self) -> int:
        return len(self._order) + len(self._parked)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._order or block_hash in self._parked

    def append(self, block_hash: BlockHash) -> None:
        """To the end of the line, from wherever in it the block was."""
        self._parked.discard(block_hash)
        self._order[block_hash] = None
        self._order.move_to_end(block_hash)

    def discard(self, block_hash: BlockHash) -> None:
        self._parked.discard(block_hash)
        self._order.pop(block_hash, None)

    def release(self, block_hash: BlockHash) -> None:
        """Nothing continues this block any more: if it was passed over for that, it is first in line."""
        if block_hash in self._parked:
            self._parked.remove(block_hash)
            self._to_front(block_hash)

    def first(self, pick: Pick) -> BlockHash | None:
        """The first that may go; those before it that may not are out of line until `restore`."""
        while self._order:
            block_hash = next(iter(self._order))
            if pick.is_continued(block_hash):
                del self._order[block_hash]
                self._parked.add(block_hash)
            elif pick.allows(block_hash):
                return block_hash
            else:
                self.put_aside(block_hash)
        return None

    def put_aside(self, block_hash: BlockHash) -> None:
        del self._order[block_hash]
        self._aside.append(block_hash)

    def restore(self) -> None:
        """Everything that was put aside stands in line again, where it stood."""
        while self._aside:
            self._to_front(self._aside.pop())

    def _to_front(self, block_hash: BlockHash) -> None:
        self._order[block_hash] = None
        self._order.move_to_end(block_hash, last=False)
