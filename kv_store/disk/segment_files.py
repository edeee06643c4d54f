"""SegmentFiles: the segments of one layout as files of one sub-folder. Blocking; thread-safe, for it keeps no state but an
open folder.

A segment is written under a temporary name and renamed when it is whole, so a process that is killed leaves a whole segment
or a temporary file. It is not synced to the disk: after a loss of power a file may be whole by name and size and hold
anything, which the checksums of header and blocks find out. Syncing would cost more than the blocks are worth.

Every name is opened relative to the open folder and never through a link.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import re
import stat
from collections.abc import Iterator, Sequence

import numpy as np

from kv_store.disk.segment import (
    MAX_HEADER_BYTES,
    MAX_SEGMENTS,
    PAGE_BYTES,
    Segment,
    SegmentIdentity,
    decode_header,
    encode_header,
    header_bytes,
)
from protocol.errors import MalformedMessage
from protocol.kv_blocks import CachedBlock

_OURS = re.compile(r"([0-9a-f]{16})\.(blocks|writing)")
_SCRATCH = f"{'f' * 16}.writing"
_FILE_MODE = 0o600
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # without the last, opening a pipe of our name would wait for ever
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


def is_ours(name: str) -> bool:
    """Whether a file has a name that only this tier gives."""
    return _OURS.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    return name.endswith(".writing")


class SegmentFiles:
    """Takes over `fd`, the open sub-folder; `close` closes it."""

    def __init__(self, fd: int, fingerprint: str, block_bytes: int) -> None:
        self._fd = fd
        self.fingerprint = fingerprint
        self.block_bytes = block_bytes

    def close(self) -> None:
        os.close(self._fd)

    def status(self) -> os.stat_result:
        """Of the open sub-folder. Raises OSError."""
        return os.fstat(self._fd)

    def names(self) -> list[str]:
        """All that have our names."""
        return sorted(name for name in os.listdir(self._fd) if is_ours(name))  # noqa: PTH208  # of an open folder

    def load(self, name: str, now: float, wall_now: float) -> Segment:
        """What the header of a finished segment says.

        Raises MalformedMessage for what is not a segment of this layout that we wrote, OSError where it cannot be read.
        """
        number = int(name[:16], 16)
        if number >= MAX_SEGMENTS:
            raise MalformedMessage("no writer of ours comes to that number")
        fd = os.open(name, os.O_RDONLY | _OPEN, dir_fd=self._fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise MalformedMessage("it is no file")
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise MalformedMessage("others may write it")
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # only the header is read: no read-ahead
            start = os.pread(fd, MAX_HEADER_BYTES, 0)
        finally:
            os.close(fd)
        blocks, checksums = decode_header(start, status.st_size, self._identity(number))
        used_at = now - max(
            0.0, wall_now - int(status.st_mtime)
        )  # of one chain, segments are a little apart: not for whole seconds
        return Segment(number, blocks, checksums, status.st_size, used_at, used_at)

    def write(
        self,
        number: int,
        blocks: Sequence[CachedBlock],
        checksums: Sequence[int],
        data: Sequence[memoryview],
        direct: bool,
    ) -> None:
        """A new segment, whole when it returns. Raises OSError, and leaves nothing behind."""
        header = encode_header(self._identity(number), blocks, checksums)
        direct = direct and all(_is_aligned(view) for view in data)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN | (os.O_DIRECT if direct else 0)
        temporary = f"{number:016x}.writing"
        fd = os.open(temporary, flags, _FILE_MODE, dir_fd=self._fd)
        try:
            try:
                write_all(fd, [page_aligned(header), *data], 0)
            finally:
                os.close(fd)
            os.rename(temporary, _name(number), src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            self._remove(temporary)
            raise

    def read(
        self, number: int, first: int, num_blocks: int, into: Sequence[memoryview], direct: bool, mark: bool
    ) -> int:
        """Blocks `first`, `first + 1`, ... of a segment of `num_blocks`, one into each view: how many bytes the file had for
        them. `mark`: note in the file's time that it was used. Raises OSError; FileNotFoundError if it is gone."""
        direct = direct and all(_is_aligned(view) for view in into)
        flags = os.O_RDONLY | _OPEN | (os.O_DIRECT if direct else 0)
        fd = os.open(_name(number), flags, dir_fd=self._fd)
        try:
            num_bytes = read_all(fd, into, header_bytes(num_blocks) + first * self.block_bytes)
            if mark:
                with contextlib.suppress(OSError):  # it serves the next start, not this read
                    os.utime(fd)
        finally:
            os.close(fd)
        return num_bytes

    def rewrite_header(self, segment: Segment) -> None:
        """So that what was forgotten stays forgotten after a restart. A process that is killed in the middle leaves a damaged
        header, and loses the segment. Raises OSError."""
        header = encode_header(self._identity(segment.number), segment.blocks, segment.checksums)
        fd = os.open(_name(segment.number), os.O_WRONLY | _OPEN, dir_fd=self._fd)
        try:
            write_all(fd, [memoryview(header)], 0)
        finally:
            os.close(fd)

    def delete(self, number: int) -> None:
        """Readers that have it open read on. Raises OSError, but not if it is gone already."""
        self.delete_name(_name(number))

    def delete_name(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._fd)  # relative to an open folder
        except FileNotFoundError:
            return

    def free_bytes(self) -> int:
        """What the filesystem would still let this process write."""
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize

    @contextlib.contextmanager
    def scratch(self, direct: bool) -> Iterator[int]:
        """A file to measure with, open for reading and writing, without a name and gone at the end. Raises OSError, also where
        `direct` is more than the filesystem can do."""
        fd = os.open(_SCRATCH, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, _FILE_MODE, dir_fd=self._fd)
        try:
            self.delete_name(_SCRATCH)
            if direct:
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
            yield fd
        finally:
            os.close(fd)

    def _identity(self, number: int) -> SegmentIdentity:
        return SegmentIdentity(number, self.fingerprint, self.block_bytes)

    def _remove(self, temporary: str) -> None:
        try:
            os.unlink(temporary, dir_fd=self._fd)  # relative to an open folder
        except OSError:
            return  # the next start deletes it


def is_out_of_files(error: Exception) -> bool:
    """This process may open no more files: nothing is wrong with the file."""
    return isinstance(error, OSError) and error.errno in _OUT_OF_FILES


def page_aligned(data: bytes) -> memoryview:
    """A copy of these bytes where O_DIRECT takes them from. The memory goes with its last view."""
    pages = mmap.mmap(-1, len(data))
    pages[:] = data
    return memoryview(pages)


def write_all(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Raises OSError; what was written before that stays written."""
    pending = list(views)
    while pending:
        num_bytes = os.pwritev(fd, pending, offset)
        if not num_bytes:
            raise OSError(errno.EIO, "nothing was written")
        offset += num_bytes
        pending = _rest(pending, num_bytes)


def read_all(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """How many bytes there were, up to what the views hold. Raises OSError."""
    pending, start = list(views), offset
    while pending and (num_bytes := os.preadv(fd, pending, offset)):
        offset += num_bytes
        pending = _rest(pending, num_bytes)
    return offset - start


def _rest(views: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """The views without their first `num_bytes` bytes."""
    for index, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[index + 1 :]]
        num_bytes -= len(view)
    return []


def _is_aligned(view: memoryview) -> bool:
    """As O_DIRECT wants memory."""
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address % PAGE_BYTES == 0


def _name(number: int) -> str:
    return f"{number:016x}.blocks"
