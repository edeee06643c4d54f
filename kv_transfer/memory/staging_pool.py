"""StagingPool: which wire blocks of a staging arena are free. Pure.

Two sides take blocks, the owner's and the reader's; neither can take the last quarter from the other. So a node that
lends and reads at once always ends its reads, whatever its own readers keep, and they the other way round.
"""

from collections.abc import Iterable
from typing import Literal

Side = Literal["owner", "reader"]
MIN_BLOCKS = 4


class StagingPool:
    """Raises ValueError for fewer than MIN_BLOCKS blocks. free + taken = all, always."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < MIN_BLOCKS:
            raise ValueError(f"{num_blocks} staging blocks are too few: two sides need {MIN_BLOCKS} to share")
        self.max_blocks = num_blocks // 4
        """What a side always gets in the end, however many blocks the other keeps."""
        self._limit = num_blocks - self.max_blocks
        self._free = [True] * num_blocks
        self._taken: dict[Side, set[int]] = {"owner": set(), "reader": set()}

    @property
    def num_free(self) -> int:
        return sum(self._free)

    def num_taken(self, side: Side) -> int:
        return len(self._taken[side])

    def take(self, side: Side, count: int) -> tuple[int, ...] | None:
        """So many blocks, in ascending order and consecutive where that is possible: they then move as one piece. None
        where there is no room now. Raises ValueError for more than `max_blocks`."""
        if count > self.max_blocks:
            raise ValueError(f"{count} staging blocks at once, of {self.max_blocks}")
        taken = self._taken[side]
        if len(taken) + count > self._limit or self.num_free < count:
            return None
        first = self._first_of_run(count)
        free = (block_id for block_id, is_free in enumerate(self._free) if is_free)
        ids = tuple(range(first, first + count)) if first is not None else tuple(next(free) for _ in range(count))
        for block_id in ids:
            self._free[block_id] = False
        taken.update(ids)
        return ids

    def give_back(self, side: Side, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            assert block_id in self._taken[side], f"staging block {block_id} is not the {side}'s"
            self._taken[side].remove(block_id)
            self._free[block_id] = True

    def _first_of_run(self, count: int) -> int | None:
        """Where the shortest run of free blocks that is long enough begins."""
        best: tuple[int, int] | None = None
        length = 0
        for block_id, is_free in enumerate((*self._free, False)):
            if is_free:
                length += 1
                continue
            if length >= count and (best is None or length < best[0]):
                best = (length, block_id - length)
            length = 0
        return None if best is None else best[1]
