"""How to read and write: past the page cache (O_DIRECT) or through it, by a short measurement at start.

O_DIRECT moves bytes between the disk and the slots themselves, costs no second copy and takes no memory from anybody, so it is
taken unless the page cache is a good deal faster even with cold pages. Each way gets its share of the time and
of the bytes: one disk is slow, the next is a tmpfs, and a start must not wait for either.
"""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from kv_store.disk.segment import PAGE_BYTES
from kv_store.disk.segment_files import SegmentFiles, page_aligned, read_all, write_all

PIECE_BYTES = 1 << 20
MAX_PIECES = 4
MEASURE_S = 0.035
"""Of one measurement, at most. There are eight, two of each kind in turn, of which the better counts: 32 MiB and about 0.3 s."""
WORTH_IT = 1.5
"""How many times faster the page cache must be. Measurements as short as these differ by a third by chance."""


@dataclass(frozen=True, slots=True)
class IOChoice:
    direct_reads: bool
    direct_writes: bool
    why: str

    def __str__(self) -> str:
        ways = {True: "O_DIRECT", False: "the page cache"}
        return f"reads by {ways[self.direct_reads]}, writes by {ways[self.direct_writes]}: {self.why}"


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second, to and from the disk itself."""

    write: float
    read: float

    def best(self, other: "Rates") -> "Rates":
        return Rates(max(self.write, other.write), max(self.read, other.read))


def choose(direct: Rates | None, buffered: Rates) -> IOChoice:
    """`direct` is None where the filesystem refuses it."""
    if direct is None:
        return IOChoice(False, False, "this filesystem refuses O_DIRECT")
    figures = ", ".join(
        f"{what} {ours / 1e9:.2f} GB/s by O_DIRECT, {theirs / 1e9:.2f} otherwise"
        for what, ours, theirs in (("read", direct.read, buffered.read), ("write", direct.write, buffered.write))
    )
    return IOChoice(buffered.read < WORTH_IT * direct.read, buffered.write < WORTH_IT * direct.write, figures)


def measure_io(files: SegmentFiles, block_bytes: int) -> IOChoice:
    """Leaves no file. Never raises OSError: a disk that cannot be written is read through the page cache."""
    if block_bytes % PAGE_BYTES:
        return IOChoice(False, False, f"blocks of {block_bytes} bytes are not whole pages")
    try:
        buffered, direct = _measure(files, direct=False), _measure_direct(files)
        buffered = buffered.best(_measure(files, direct=False))
        if direct is not None:
            direct = direct.best(_measure(files, direct=True))
    except OSError as error:
        return IOChoice(False, False, f"nothing could be measured ({error.strerror})")
    return choose(direct, buffered)


def _measure_direct(files: SegmentFiles) -> Rates | None:
    try:
        return _measure(files, direct=True)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return None


def _measure(files: SegmentFiles, direct: bool) -> Rates:
    piece = page_aligned(os.urandom(PAGE_BYTES) * (PIECE_BYTES // PAGE_BYTES))  # little to gain by compressing it
    with files.scratch(direct) as fd:
        start = time.perf_counter()
        num_pieces = _repeat(lambda index: write_all(fd, [piece], index * PIECE_BYTES), MAX_PIECES)
        os.fdatasync(fd)  # otherwise the page cache has only promised
        written = time.perf_counter()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        num_read = _repeat(lambda index: read_all(fd, [piece], index * PIECE_BYTES), num_pieces)
        end = time.perf_counter()
    return Rates(num_pieces * PIECE_BYTES / (written - start), num_read * PIECE_BYTES / (end - begin))


def _repeat(step: Callable[[int], object], at_most: int) -> int:
    """How many steps were taken in MEASURE_S, or until the disk was full: one at least. Raises OSError if not even one was."""
    start = time.perf_counter()
    for index in range(at_most):
        try:
            step(index)
        except OSError:
            if not index:
                raise
            return index
        if time.perf_counter() - start >= MEASURE_S:
            return index + 1
    return at_most
