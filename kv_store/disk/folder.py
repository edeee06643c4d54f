"""DiskFolder: the folder that the user gave the tier. Locked for one process from open to close.

The lock is the kernel's (flock): it ends with the process, however that ends. The folder is made for this user alone if it is
missing; sub-folders always are, and one that belongs to somebody else is refused, for its files would be believed.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kv_store.disk.segment_files import SegmentFiles, is_ours, is_unfinished
from protocol.errors import ConfigError

_LOCK = "lock"
_FOLDER_MODE = 0o700
_LAYOUT = re.compile(r"[0-9a-f]{32}")
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_PID_BYTES = 20
_SETTING = "store.disk_path"
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


@dataclass(frozen=True, slots=True)
class Stranger:
    """A segment of a layout that this process does not serve."""

    folder: str
    name: str
    file_bytes: int
    modified_at: float


@contextlib.contextmanager
def usable(path: Path) -> Iterator[None]:
    """What the system refuses within is a ConfigError: the user chose this folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{_SETTING}: cannot keep KV blocks in {path}: {error.strerror}; choose a folder that this user may write",
            param=_SETTING,
        ) from error


def segments_bytes(path: Path) -> int:
    """Of the segments of all layouts in a folder that may not exist. Nothing else there counts or is looked through: the folder
    may hold whatever its owner likes, for the tier keeps to its own names. What cannot be read is none of ours."""
    num_bytes = 0
    with contextlib.suppress(OSError), os.scandir(path) as folders:
        for folder in folders:
            if _LAYOUT.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError), os.scandir(folder) as files:
                    num_bytes += sum(
                        file.stat(follow_symlinks=False).st_size
                        for file in files
                        if is_ours(file.name) and file.is_file(follow_symlinks=False)
                    )
    return num_bytes


def is_missing(error: Exception) -> bool:
    """Whether it may mean that the whole folder is gone."""
    return isinstance(error, OSError) and error.errno in _MISSING


class DiskFolder:
    """Raises ConfigError, which says how to mend it, where the folder cannot be had for this process alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._resolved = path
        self._fd = self._lock_fd = -1
        try:
            with usable(path):
                path.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
                self._resolved = path.resolve()
                self._fd = os.open(self._resolved, _OPEN_FOLDER)
                self._lock_fd = self._lock()
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        for fd in (self._lock_fd, self._fd):
            if fd >= 0:
                os.close(fd)
        self._lock_fd = self._fd = -1

    def layout(self, fingerprint: str, block_bytes: int) -> SegmentFiles:
        """The sub-folder of one layout, made if it is missing. Raises ConfigError."""
        with usable(self.path / fingerprint):
            with contextlib.suppress(FileExistsError):  # of an earlier life, or not: its owner tells
                os.mkdir(fingerprint, _FOLDER_MODE, dir_fd=self._fd)
            return SegmentFiles(self._open_own(fingerprint), fingerprint, block_bytes)

    def is_gone(self, files: SegmentFiles) -> bool:
        """Whether the folder, or the sub-folder of `files`, was removed or replaced since it was opened: what is in it now is lost
        at the end of this process, if it can be had at all."""
        try:
            sub_folder = os.stat(files.fingerprint, dir_fd=self._fd, follow_symlinks=False)  # of an open folder
            return not (
                os.path.samestat(self._resolved.stat(), os.fstat(self._fd))
                and os.path.samestat(sub_folder, files.status())
            )
        except OSError as error:
            return is_missing(error)

    def strangers(self, served: str) -> deque[Stranger]:
        """Segments of all layouts but `served`, the oldest first. Deletes what other layouts' writers left unfinished. Raises
        OSError where the folder cannot be read."""
        found: list[Stranger] = []
        for folder in sorted(os.listdir(self._fd)):  # noqa: PTH208  # of an open folder
            if folder != served and _LAYOUT.fullmatch(folder):
                try:
                    found += self._strangers_in(folder)
                except OSError:
                    continue  # not ours to use, so not ours to count
        return deque(sorted(found, key=lambda stranger: stranger.modified_at))

    def delete(self, stranger: Stranger) -> None:
        """And its sub-folder, if that is empty now. Raises OSError, but not if it is gone already."""
        fd = self._open_own(stranger.folder)
        try:
            os.unlink(stranger.name, dir_fd=fd)  # relative to an open folder
        except FileNotFoundError:
            return
        finally:
            os.close(fd)
        try:
            os.rmdir(stranger.folder, dir_fd=self._fd)  # relative to an open folder
        except OSError:
            return  # there is more in it

    def _strangers_in(self, folder: str) -> list[Stranger]:
        fd = self._open_own(folder)
        try:
            found = []
            with os.scandir(fd) as entries:
                for entry in entries:
                    if not is_ours(entry.name) or not entry.is_file(follow_symlinks=False):
                        continue
                    if is_unfinished(entry.name):
                        os.unlink(entry.name, dir_fd=fd)  # relative to an open folder
                        continue
                    status = entry.stat(follow_symlinks=False)
                    found.append(Stranger(folder, entry.name, status.st_size, status.st_mtime))
            return found
        finally:
            os.close(fd)

    def _open_own(self, folder: str) -> int:
        """Raises OSError; PermissionError for a folder that others may write."""
        fd = os.open(folder, _OPEN_FOLDER, dir_fd=self._fd)
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            os.close(fd)
            raise PermissionError(errno.EPERM, "others may write it")
        return fd

    def _lock(self) -> int:
        fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(fd, _MAX_PID_BYTES, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise ConfigError(
                f"{self.path} keeps the KV blocks of process {owner}; give every node a folder of its own",
                param=_SETTING,
            ) from error
        except OSError:
            os.close(fd)
            raise
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd
