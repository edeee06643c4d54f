"""BlockPool: the KV blocks of one device. A block is held (reference count above zero) or free; nothing else.

Apart from that a block may be *cached*: its contents have an address in the prefix cache. A free cached block keeps its
contents until somebody needs the room, and can be taken back by `share` until then.

Free blocks stand in two doubly linked lists over preallocated arrays: those worth nothing, used first, and the cached
ones, least recently used first. Every operation is O(1) a block.
"""

from collections.abc import Callable, Sequence


class BlockPool:
    """`on_reuse(block_id)` is called when a free cached block is about to be overwritten: its address must be dropped."""

    def __init__(self, num_blocks: int, on_reuse: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._on_reuse = on_reuse
        self._references = [0] * num_blocks
        self._cached = bytearray(num_blocks)
        self._num_free = num_blocks
        # Two rings with a sentinel each; block i's neighbours are _previous[i] and _next[i] while it is free.
        self._empty, self._lru = num_blocks, num_blocks + 1
        self._next = [*range(1, num_blocks + 1), 0, self._lru]
        self._previous = [self._empty, *range(num_blocks), self._lru]

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_held(self) -> int:
        return self.num_blocks - self._num_free

    @property
    def num_cached(self) -> int:
        """Blocks with an address, held and free. O(num_blocks)."""
        return sum(self._cached)

    def is_free(self, block_id: int) -> bool:
        return self._references[block_id] == 0

    def num_references(self, block_id: int) -> int:
        return self._references[block_id]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks to write into, each held once. The caller has checked num_free.

        In ascending order, and blocks that were released together come back together: neighbours in the list are then
        neighbours in memory, and a transfer moves them as one piece.
        """
        assert count <= self._num_free, f"{count} blocks wanted, {self._num_free} free"
        taken: list[int] = []
        for _ in range(count):
            block_id = self._next[self._empty]
            if block_id == self._empty:
                block_id = self._next[self._lru]
                self._cached[block_id] = False
                self._on_reuse(block_id)
            self._unlink(block_id)
            self._references[block_id] = 1
            taken.append(block_id)
        self._num_free -= count
        taken.sort()
        return taken

    def share(self, block_ids: Sequence[int]) -> None:
        """Hold cached blocks once more, free ones among them."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                assert self._cached[block_id], f"block {block_id} is free and holds nothing"
                self._unlink(block_id)
                self._num_free -= 1
            self._references[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back a sequence's blocks, in the order of its table. Its tail is reused before its head, which more
        other sequences may begin with."""
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, f"block {block_id} is released more often than held"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._num_free += 1
                if self._cached[block_id]:
                    self._link_after(self._previous[self._lru], block_id)
                else:
                    self._link_after(self._empty, block_id)

    def mark_cached(self, block_id: int) -> None:
        """A held block has an address now."""
        assert self._references[block_id] > 0, f"block {block_id} is free"
        self._cached[block_id] = True

    def mark_uncached(self, block_id: int) -> None:
        """A block, held or free, has lost its address."""
        self._cached[block_id] = False
        if self._references[block_id] == 0:
            self._unlink(block_id)
            self._link_after(self._empty, block_id)

    def _unlink(self, block_id: int) -> None:
        before, after = self._previous[block_id], self._next[block_id]
        self._next[before], self._previous[after] = after, before

    def _link_after(self, before: int, block_id: int) -> None:
        after = self._next[before]
        self._previous[block_id], self._next[block_id] = before, after
        self._next[before] = self._previous[after] = block_id
