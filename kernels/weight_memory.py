"""Memory for packed weights: many of them in one region of huge pages.

A decode step streams every weight once. A layer's are of about a megabyte: allocated one by one they lie on pages of
4 KiB, whose address translation halves the speed. A region lives as long as any tensor in it.
"""

import contextlib
import mmap

import torch

_REGION_BYTES = 128 << 20  # only what is written takes memory
_ALIGNMENT = 4096


class WeightMemory:
    """Not thread-safe: models are loaded one at a time."""

    def __init__(self) -> None:
        self._region = torch.empty(0, dtype=torch.uint8)  # what is left of the newest one

    def take(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised uint8 [num_bytes], from the beginning of a page."""
        rounded = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if rounded > self._region.numel():
            self._region = _new_region(max(rounded, _REGION_BYTES))
        taken, self._region = self._region[:num_bytes], self._region[rounded:]
        return taken


def _new_region(num_bytes: int) -> torch.Tensor:
    region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages: the same memory, slower
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


weight_memory = WeightMemory()
"""Of this process: weights of all models may share a region."""
