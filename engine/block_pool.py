"""BlockPool: the KV blocks of one device. A block is held (reference count above zero) or free; nothing else.

Apart from that a block may be *cached*: its contents have an address in the prefix cache. A free cached block keeps its
contents until room is needed, and can be taken back by `share` until then.

Blocks that are handed out together lie together as far as they can, because a transfer moves neighbours as one piece. So
free blocks that hold nothing are kept as runs (engine.free_runs) and used first. Cached ones stand in a doubly linked list
over preallocated arrays, least recently used first; when their room is needed, a few more than needed lose their contents, so
that there are runs to choose from. What that costs is the end of the list: a cache smaller by EVICTED_AHEAD at most.

Whoever saves what is about to be forgotten surveys that list from its cold end, each block once while it stands there:

    reused next  [ surveyed, ... | not yet, ... ]  reused last
                                 ▲              ▲
                  released as `cold`            released

Every operation is O(1) a block.
"""

from collections.abc import Callable, Sequence

from engine.free_runs import FreeRuns

EVICTED_AHEAD = 1 / 32
"""Of all blocks. Measured by benchmarks/bench_block_pool.py."""


class BlockPool:
    """`on_reuse(block_id)` is called when a free cached block loses its contents: its address must be dropped."""

    def __init__(self, num_blocks: int, on_reuse: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self.on_reuse = on_reuse
        self._references = [0] * num_blocks
        self._cached = bytearray(num_blocks)
        self._num_free = num_blocks
        self._empty = FreeRuns(num_blocks)
        self._evicted_ahead = int(num_blocks * EVICTED_AHEAD)
        # A ring with a sentinel; block i's neighbours are _previous[i] and _next[i] while it is free and cached.
        self._lru = num_blocks
        self._next = [0] * num_blocks + [self._lru]
        self._previous = [0] * num_blocks + [self._lru]
        self._surveyed = bytearray(num_blocks)
        self._num_surveyed = 0
        self._frontier = self._lru
        """The coldest block that has not been surveyed; the sentinel if there is none."""

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_held(self) -> int:
        return self.num_blocks - self._num_free

    @property
    def num_empty(self) -> int:
        """Free blocks that hold nothing: they are used first."""
        return len(self._empty)

    @property
    def num_surveyed(self) -> int:
        """Free cached blocks that `survey` has returned: they are used next."""
        return self._num_surveyed

    @property
    def num_cached(self) -> int:
        """Blocks with an address, held and free. O(num_blocks)."""
        return sum(self._cached)

    def num_forgotten_by(self, count: int) -> int:
        """Cached blocks that lose their contents when `count` are allocated."""
        if count <= len(self._empty):
            return 0
        return min(count - len(self._empty) + self._evicted_ahead, self._num_free - len(self._empty))

    def is_free(self, block_id: int) -> bool:
        return self._references[block_id] == 0

    def is_surveyed(self, block_id: int) -> bool:
        return bool(self._surveyed[block_id])

    def num_references(self, block_id: int) -> int:
        return self._references[block_id]

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` blocks to write into, each held once, in ascending order and as few runs; where it can be, those that
        follow block `after`. The caller has checked num_free."""
        assert count <= self._num_free, f"{count} blocks wanted, {self._num_free} free"
        if count > len(self._empty):
            self._evict(count - len(self._empty))
        taken = self._empty.take(count, after)
        for block_id in taken:
            self._references[block_id] = 1
        self._num_free -= count
        return taken

    def share(self, block_ids: Sequence[int]) -> None:
        """Hold cached blocks once more, free ones among them."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                assert self._cached[block_id], f"block {block_id} is free and holds nothing"
                self._unlink(block_id)
                self._num_free -= 1
            self._references[block_id] += 1

    def release(self, block_ids: Sequence[int], *, cold: bool = False) -> None:
        """Give back a sequence's blocks, in the order of its table. Its tail is reused before its head, which more
        other sequences may begin with. `cold`: they were about to be reused when `survey` returned them, and are so again,
        after those that came back like this before."""
        empty: list[int] = []
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, f"block {block_id} is released more often than held"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._num_free += 1
                if not self._cached[block_id]:
                    empty.append(block_id)
                elif cold:
                    self._link_before(block_id, self._frontier)
                    self._mark_surveyed(block_id)
                else:
                    self._link_before(block_id, self._lru)
                    if self._frontier == self._lru:
                        self._frontier = block_id
        self._empty.add(empty)

    def survey(self, count: int) -> list[int]:
        """The next free cached blocks that will be reused, coldest first, `count` at most; none twice, unless it was held
        meanwhile. They stay where they are."""
        found: list[int] = []
        block_id = self._frontier
        while len(found) < count and block_id != self._lru:
            found.append(block_id)
            self._mark_surveyed(block_id)
            block_id = self._next[block_id]
        self._frontier = block_id
        return found

    def mark_cached(self, block_id: int) -> None:
        """A held block has an address now."""
        assert self._references[block_id] > 0, f"block {block_id} is free"
        self._cached[block_id] = True

    def mark_uncached(self, block_id: int) -> None:
        """A block, held or free, has lost its address."""
        self._cached[block_id] = False
        if self._references[block_id] == 0:
            self._unlink(block_id)
            self._empty.add((block_id,))

    def _evict(self, count: int) -> None:
        """Make `count` cached blocks worth nothing, and some more if there are."""
        evicted: list[int] = []
        while len(evicted) < count + self._evicted_ahead and (block_id := self._next[self._lru]) != self._lru:
            self._cached[block_id] = False
            self.on_reuse(block_id)
            self._unlink(block_id)
            evicted.append(block_id)
        self._empty.add(evicted)

    def _unlink(self, block_id: int) -> None:
        before, after = self._previous[block_id], self._next[block_id]
        self._next[before], self._previous[after] = after, before
        if self._surveyed[block_id]:
            self._surveyed[block_id] = False
            self._num_surveyed -= 1
        elif self._frontier == block_id:
            self._frontier = after

    def _link_before(self, block_id: int, after: int) -> None:
        before = self._previous[after]
        self._previous[block_id], self._next[block_id] = before, after
        self._next[before] = self._previous[after] = block_id

    def _mark_surveyed(self, block_id: int) -> None:
        self._surveyed[block_id] = True
        self._num_surveyed += 1
