"""SegmentKeeper: makes, changes and deletes the segments of a tier, within its size and what the disk has room for.

One thread at a time, the one that holds the tier's lock for writing. The books it shares with the threads that read, so it
takes their lock around each change of them, and never while it touches a file. A thread that reads may find that the folder is
gone: then the books are empty at once, and the keeper is of no more use.
"""

import errno
import itertools
import logging
import os
import threading
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence

from kv_store.disk.books import DiskBooks
from kv_store.disk.eviction import least_valuable
from kv_store.disk.folder import DiskFolder, is_missing
from kv_store.disk.segment import Segment, segment_bytes
from kv_store.disk.segment_files import SegmentFiles
from kv_store.disk.write_pause import WritePause, cause_of
from kv_store.quotas import Quotas
from protocol.kv_blocks import CachedBlock, Tenant
from runtime.clock import Clock

log = logging.getLogger(__name__)

FOLDER_GONE = "the folder is gone"
"""As a cause of failures."""
FILES_PER_VICTIM = 256
"""One is chosen in advance for each."""


class SegmentKeeper:
    """`lock` guards `books`; `size_bytes` is of all files in the folder, `quotas` of the blocks that fit there."""

    def __init__(
        self,
        folder: DiskFolder,
        files: SegmentFiles,
        books: DiskBooks,
        lock: threading.Condition,
        size_bytes: int,
        quotas: Quotas,
        pause: WritePause,
        clock: Clock,
    ) -> None:
        self._folder = folder
        self._files = files
        self._books = books
        self._lock = lock
        self._size_bytes = size_bytes
        self._quotas = quotas
        self._clock = clock
        self._pause = pause
        self._victims: list[tuple[Segment, float]] = []
        self._numbers = itertools.count(max(books.segments, default=-1) + 1)
        self._strangers = folder.strangers(files.fingerprint)
        self._stranger_bytes = sum(stranger.file_bytes for stranger in self._strangers)
        self.is_gone = False
        """Whether the folder was removed or replaced. Its files are to be closed then, and the folder opened anew."""
        self.capacity_bytes = 0
        """What the tier may grow to, and the disk had room for when something was last written: whoever asks must not wait for a
        disk that hangs. What the tier has, if the disk did not tell."""

    @property
    def used_bytes(self) -> int:
        return self._books.used_bytes + self.stranger_bytes

    @property
    def stranger_bytes(self) -> int:
        return 0 if self.is_gone else self._stranger_bytes

    @property
    def failures(self) -> Mapping[str, int]:
        """Of writes, by cause."""
        return Counter(self._pause.failures)

    @property
    def paused_s(self) -> float:
        return self._pause.remaining_s(self._clock.now())

    def limit(self, tenant: Tenant) -> int:
        """Blocks that it may have here."""
        return self._quotas.limit(tenant, self._size_bytes // self._files.block_bytes)

    def fit(self) -> None:
        """Evict what is more than the tier may have."""
        self.capacity_bytes = min(self._size_bytes, self.used_bytes)
        try:
            self._look_for_room()
            self._make_room(0)
        except OSError as error:
            self.failed(error)

    def write(
        self,
        blocks: Sequence[CachedBlock],
        data: Sequence[memoryview],
        checksums: Sequence[int],
        direct: bool,
        now: float,
    ) -> bool:
        """One more segment of blocks of one tenant, no more than its limit; unless the disk refuses, or has refused a short
        while ago."""
        if self.paused_s:
            return False
        number = next(self._numbers)
        size = segment_bytes(len(blocks), self._files.block_bytes)
        try:
            self._make_room_within(Tenant(blocks[0].tenant), len(blocks))
            self._make_room(size)
            self._files.write(number, blocks, checksums, data, direct)
        except OSError as error:
            self.failed(error)
            return False
        self._pause.succeeded()
        with self._lock:
            if self.is_gone:  # a reader has found out since
                return False
            self._books.add(Segment(number, list(blocks), array("Q", checksums), size, now, now))
            self._books.counts.blocks_written += len(blocks)
            self._books.counts.bytes_written += size
        return True

    def settle(self) -> None:
        """Tell files which of their blocks are dead, and delete those with nothing else."""
        with self._lock:
            stale = self._books.take_stale()
        for segment in stale:
            if self.is_gone:
                return
            try:
                if segment.num_live:
                    self._files.rewrite_header(segment)
                else:
                    self._drop(segment)
            except Exception as error:  # noqa: BLE001  # whatever it is, what was forgotten must not come back
                self._unsettled(segment, error)

    def clear(self) -> None:
        """All files, those of other layouts as well. What cannot be deleted is not served any more, in this life."""
        while self._strangers:
            self._evict_stranger()
        for segment in list(self._books.segments.values()):
            try:
                self._drop(segment)
            except OSError as error:
                self.failed(error)
                with self._lock:
                    self._books.remove(segment)

    def _make_room_within(self, tenant: Tenant, num_blocks: int) -> None:
        """A tenant that would have more than its limit gives up its own. Raises OSError."""
        excess = self._books.tenants[tenant] + num_blocks - self.limit(tenant)
        while excess > 0:
            own = (
                segment for segment in self._books.segments.values() if segment.tenant == tenant and segment.num_live
            )
            victims = least_valuable(own, self._clock.now())
            if not victims:
                return
            excess -= victims[0].num_live
            self._evict_segment(victims[0])

    def _make_room(self, num_bytes: int) -> None:
        """Evict until so many fit: into the tier, and on the disk, which others fill as well. For the disk's sake no more than
        twice of it goes: some filesystems give room back late. Raises OSError."""
        freed = 0
        while self.used_bytes + num_bytes > self._size_bytes:
            freed += self._evict()
        while freed < 2 * num_bytes and self._look_for_room() < num_bytes and (evicted := self._evict()):
            freed += evicted

    def _look_for_room(self) -> int:
        """Bytes that are free on the disk. Raises OSError."""
        free_bytes = self._files.free_bytes()
        self.capacity_bytes = min(self._size_bytes, self.used_bytes + free_bytes)
        return free_bytes

    def _evict(self) -> int:
        """The least valuable file, layouts that nobody serves any more first: how many bytes it had; 0 if there is none."""
        if self._strangers:
            return self._evict_stranger()
        segment = self._next_victim()
        if segment is None:
            return 0
        self._evict_segment(segment)
        return segment.file_bytes

    def _next_victim(self) -> Segment | None:
        """Of many files, some are chosen at once, so that a choice does not cost more than the write that it makes room for. One
        that was used since it was chosen stays."""
        segments = self._books.segments
        while self._victims:
            segment, used_at = self._victims.pop()
            if segment.used_at == used_at and segments.get(segment.number) is segment:
                return segment
        count = 1 + len(segments) // FILES_PER_VICTIM
        chosen = least_valuable(segments.values(), self._clock.now(), count)
        self._victims = [(segment, segment.used_at) for segment in reversed(chosen[1:])]
        return chosen[0] if chosen else None

    def _evict_segment(self, segment: Segment) -> None:
        num_live = segment.num_live
        self._drop(segment)
        with self._lock:
            self._books.counts.files_evicted += 1
            self._books.counts.blocks_evicted += num_live

    def _evict_stranger(self) -> int:
        """One that cannot be deleted does not count any more: waiting for it would end all writing."""
        stranger = self._strangers.popleft()
        self._stranger_bytes -= stranger.file_bytes
        try:
            self._folder.delete(stranger)
        except OSError as error:
            log.warning("%s/%s stays in the disk tier's folder: %s", stranger.folder, stranger.name, cause_of(error))
        return stranger.file_bytes

    def _drop(self, segment: Segment) -> None:
        """The file, then the books. Raises OSError, and has changed nothing then."""
        segment.being_deleted = True
        try:
            self._files.delete(segment.number)
        except Exception:
            segment.being_deleted = False
            raise
        with self._lock:
            self._books.remove(segment)

    def _unsettled(self, segment: Segment, error: Exception) -> None:
        """A file that cannot be told goes as a whole."""
        if self.lost(error) or not isinstance(error, OSError):
            self.failed(error)
        if self.is_gone:
            return
        log.warning("dropping segment %x of the disk tier, it cannot be changed: %s", segment.number, cause_of(error))
        try:
            self._drop(segment)
        except OSError as last:
            self.failed(last)

    def failed(self, error: Exception) -> None:
        """Nothing is written for a while. An error that is no OSError is a bug: told with its traceback."""
        cause = FOLDER_GONE if self.lost(error) else cause_of(error)
        with self._lock:
            is_new = self._pause.failed(cause, self._clock.now())
        if is_new and cause != FOLDER_GONE:
            log.warning(
                "the disk tier cannot write and rests for %.0f s: %s",
                *(self.paused_s, cause),
                exc_info=None if isinstance(error, OSError) else error,
            )

    def has_folder(self) -> bool:
        """Looks, where it is not known to be gone: what is held already is not written, so no write would meet it."""
        if not self.is_gone and self._folder.is_gone(self._files):
            self.failed(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
        return not self.is_gone

    def lost(self, error: Exception) -> bool:
        """Whether the error comes of a folder that is gone: then nothing is held any more. From any thread that keeps the tier
        open, without its locks."""
        if not is_missing(error) or not self._folder.is_gone(self._files):
            return False
        with self._lock:
            is_new, self.is_gone = not self.is_gone, True
            num_blocks = self._books.num_blocks
            self._books.remove_all()
        if is_new:
            log.warning(
                "%s is gone: the disk tier forgets its %d blocks, and opens it anew when it writes again",
                *(self._folder.path, num_blocks),
            )
        return True
