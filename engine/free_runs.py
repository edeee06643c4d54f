"""FreeRuns: blocks that hold nothing, as maximal runs of neighbours, so that those handed out together lie together.

A run is entered at both of its ends, so that blocks which come back join their neighbours; and in a list of runs of about
its length, so that one of a wanted length is found. Every operation takes time by the run, not by the block, and not by the
number of runs.
"""

from collections.abc import Iterable
from itertools import pairwise

_EXACT = 16
"""Runs shorter than this have a list for each length; of longer ones eight lists share each doubling."""


class FreeRuns:
    """Of `num_blocks` blocks, all of which hold nothing at first."""

    def __init__(self, num_blocks: int) -> None:
        self._length_from = [0] * (num_blocks + 1)
        """Of the run that begins with this block; 0 if none does."""
        self._length_upto = [0] * (num_blocks + 1)
        """Of the run that ends before this block."""
        self._starts: list[dict[int, None]] = [{} for _ in range(_length_class(num_blocks) + 1)]
        self._filled = 0
        """A bit for each list that is not empty."""
        self._num_blocks = 0
        if num_blocks:
            self._insert(0, num_blocks)

    def __len__(self) -> int:
        """Blocks in all runs."""
        return self._num_blocks

    def add(self, block_ids: Iterable[int]) -> None:
        """These hold nothing any more. In any order, each once."""
        ids = sorted(block_ids)
        if not ids:
            return
        start = ids[0]
        for block_id, following in pairwise(ids):
            if following != block_id + 1:
                self._join(start, block_id + 1 - start)
                start = following
        self._join(start, ids[-1] + 1 - start)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` blocks, in ascending order: those that follow block `after` if they are here, then the shortest run that
        holds the rest, or else the longest ones."""
        assert count <= self._num_blocks, f"{count} blocks wanted, {self._num_blocks} hold nothing"
        taken: list[int] = []
        if after is not None and self._length_from[after + 1]:
            taken += self._cut(after + 1, count)
        while len(taken) < count:
            taken += self._cut(self._choose(count - len(taken)), count - len(taken))
        taken.sort()
        return taken

    def _choose(self, count: int) -> int:
        """Where to cut: the start of a run."""
        fitting = self._filled >> _length_class(count - 1) + 1
        if fitting:
            choice = _length_class(count - 1) + (fitting & -fitting).bit_length()
        else:
            choice = self._filled.bit_length() - 1
        return next(iter(self._starts[choice]))

    def _cut(self, start: int, count: int) -> range:
        """The first blocks of a run, all of it at most."""
        length = self._length_from[start]
        self._remove(start, length)
        if length > count:
            self._insert(start + count, length - count)
        return range(start, start + min(count, length))

    def _join(self, start: int, length: int) -> None:
        """A new run, together with those that it touches."""
        before, behind = self._length_upto[start], self._length_from[start + length]
        if before:
            self._remove(start - before, before)
        if behind:
            self._remove(start + length, behind)
        self._insert(start - before, before + length + behind)

    def _insert(self, start: int, length: int) -> None:
        self._length_from[start] = self._length_upto[start + length] = length
        self._num_blocks += length
        choice = _length_class(length)
        self._starts[choice][start] = None
        self._filled |= 1 << choice

    def _remove(self, start: int, length: int) -> None:
        self._length_from[start] = self._length_upto[start + length] = 0
        self._num_blocks -= length
        choice = _length_class(length)
        starts = self._starts[choice]
        del starts[start]
        if not starts:
            self._filled &= ~(1 << choice)


def _length_class(length: int) -> int:
    """Which list a run of this length is in. Grows with the length: 0, 1, ... 15 | 16-17, 18-19, ... 30-31 | 32-35, ..."""
    if length < _EXACT:
        return length
    shift = length.bit_length() - 4
    return _EXACT + 8 * (shift - 1) + (length >> shift) - 8
