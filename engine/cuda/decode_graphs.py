"""DecodeGraphs: captured decode steps, one for each padded number of rows.

A decode step of a given number of rows is always the same operations on the same tensors, so the host need not launch them
one by one: a captured step costs one launch instead of several hundred. A step of n rows takes the smallest size that
holds them; the rest is padding, which costs little.
"""

import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

from engine.cuda.device import Device, Replay

_SMALL_SIZES = (1, 2, 4)
_STRIDE = 8
"""Matrix products pad their rows to more than this, so that finer steps would gain nothing."""


def padded_sizes(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, 32 and so on, the last being `max_rows` itself."""
    sizes = {*_SMALL_SIZES, *range(_STRIDE, max_rows, _STRIDE), max_rows}
    return tuple(sorted(size for size in sizes if size <= max_rows))


class DecodeGraphs:
    """`step(size)` is the decode step of that many rows. Until `capture`, it is done operation by operation."""

    def __init__(self, max_rows: int, step: Callable[[int], None]) -> None:
        self.sizes = padded_sizes(max_rows)
        self._step = step
        self._replays: dict[int, Replay] = {}

    def padded(self, num_rows: int) -> int:
        """The smallest size that holds them. `num_rows` is at most max_rows."""
        return self.sizes[bisect_left(self.sizes, num_rows)]

    def replay(self, size: int) -> Replay:
        """What does the step of this size. Its result is called by work."""
        return self._replays.get(size) or partial(self._step, size)

    def capture(self, device: Device, progress: Callable[[str], None], *, largest_only: bool = False) -> None:
        """Run every size, then capture it, the largest first: the others fit in the memory that it leaves. The columns of
        the batch hold padding alone, and nothing is in flight."""
        started_at = time.perf_counter()
        sizes = self.sizes[-1:] if largest_only else self.sizes[::-1]
        for count, size in enumerate(sizes, start=1):
            work = partial(self._step, size)
            device.compute.submit(work).wait()  # what is compiled or initialised on first use must not be captured
            self._replays[size] = device.capture(work)
            if count * 4 // len(sizes) != (count - 1) * 4 // len(sizes):
                progress(f"captured {count} of {len(sizes)} decode sizes in {time.perf_counter() - started_at:.1f} s")
