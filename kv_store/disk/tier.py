"""DiskTier: KV blocks in files of several, for as long as there is room, across restarts.

    tier = DiskTier(path, fingerprint, block_bytes, size_bytes)     locks the folder, finds what earlier lives left, measures
    tier.write(blocks, data, checksums)                             host slots to new files
    tier.read(block_hashes, into)                                   files to host slots, every block verified
    tier.close()

Blocking and thread-safe: reads run beside each other and beside one write. Files are made, changed and deleted under one lock,
the books are looked at under another, which nobody holds while a file is touched; so the questions (`num_held`, `in`, `find`)
take microseconds at any time. A read that meets an eviction finds the file open or gone, and gone is a miss.

No call raises for what a disk can do: what cannot be written is not kept, what cannot be read or is damaged is forgotten, and
both are counted. After a failed write the tier writes nothing for a while (WritePause), and is read all the same. A folder that
is removed or replaced meanwhile takes all blocks with it, and is opened anew by a later write. A bug here is like a
disk that fails, but for the traceback in the log.
"""

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from kv_store.disk.books import DiskBooks, Run
from kv_store.disk.folder import DiskFolder, usable
from kv_store.disk.io_choice import measure_io
from kv_store.disk.keeper import FOLDER_GONE, SegmentKeeper
from kv_store.disk.scan import scan
from kv_store.disk.segment import MAX_SEGMENT_BLOCKS, MAX_SEGMENT_BYTES, segment_bytes
from kv_store.disk.segment_files import is_out_of_files
from kv_store.disk.stats import DiskStats
from kv_store.disk.write_pause import WritePause, cause_of
from kv_store.quotas import Quotas
from kv_store.tiers import StoredBlock
from protocol.checksum import checksum
from protocol.errors import ConfigError
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, Tenant
from runtime.clock import Clock, MonotonicClock

log = logging.getLogger(__name__)

READ_PIECE_BYTES = 8 << 20
"""Read at once, then verified while it is still in the processor's cache, before more is read."""
MIN_SEGMENTS = 16
"""That fit in the tier: what is evicted at once is a sixteenth of it at most."""
MIN_FILES_OF_TENANT = 4
"""Into which a tenant's blocks go that has as much as it may have."""
MARK_EVERY_S = 60.0
"""How often a file that is read gets a new time, by which the next start knows for how long it has not been used."""

FOLDER_REFUSED = "the folder cannot be opened anew"
"""As a cause of failures."""

NO_QUOTAS = Quotas()

Removed = Callable[[Sequence[StoredBlock]], None]


def blocks_per_segment(block_bytes: int, size_bytes: int) -> int:
    """In a tier of that size: one at least."""
    room = min(MAX_SEGMENT_BYTES, size_bytes // MIN_SEGMENTS)
    return max(1, min(MAX_SEGMENT_BLOCKS, room // block_bytes))


class DiskTier:
    """`fingerprint`: of the KVLayout; `size_bytes`: of all files, those of other layouts in the same folder included. A tenant that
    has as many blocks as `quotas` lets it gives up its own for new ones.

    `removed` hears of every block that is gone, for whatever reason, before the call that it went by returns; from that
    call's thread, which holds no lock of the tier then. It must neither block nor raise. What one call of `write` keeps and gives
    up again for the rest of it is among them. What is found in a folder that is opened anew is served, and nobody hears of it.

    Raises ConfigError when the folder cannot be had, or not one block fits.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        block_bytes: int,
        size_bytes: int,
        *,
        quotas: Quotas = NO_QUOTAS,
        removed: Removed = lambda _blocks: None,
        clock: Clock | None = None,
    ) -> None:
        if size_bytes < segment_bytes(1, block_bytes):
            raise ConfigError(
                f"a disk tier of {size_bytes} bytes holds no block of {block_bytes}; make store.disk_size larger",
                param="store.disk_size",
            )
        self.block_bytes = block_bytes
        self.segment_blocks = blocks_per_segment(block_bytes, size_bytes)
        """How many blocks one file takes: what is offered in such batches is written best."""
        self._path = path
        self._fingerprint = fingerprint
        self._size_bytes = size_bytes
        self._quotas = quotas
        self._removed = removed
        self._clock = clock or MonotonicClock()
        self._writing = threading.Lock()
        """Held while files are made, changed and deleted; taken before `_lock`, never within it."""
        self._lock = threading.Condition()
        """Guards the books and what says whether the tier is open."""
        self._num_readers = 0
        self._closed = False
        self._books = DiskBooks()
        self._pause = WritePause()
        self._read_failures: Counter[str] = Counter()
        self._open()

    def _open(self) -> None:
        """The folder, with what is in it. Raises ConfigError, and has changed nothing then."""
        books = DiskBooks(self._books.counts)
        with usable(self._path), contextlib.ExitStack() as opened:
            folder = DiskFolder(self._path)
            opened.callback(folder.close)
            files = folder.layout(self._fingerprint, self.block_bytes)
            opened.callback(files.close)
            found = scan(files, books, self._clock.now())
            io = measure_io(files, self.block_bytes)
            keeper = SegmentKeeper(
                folder, files, books, self._lock, self._size_bytes, self._quotas, self._pause, self._clock
            )
            keeper.settle()
            keeper.fit()
            books.take_gone()  # of an earlier life: nobody has heard of them in this one
            with self._lock:
                books.put_back(self._books.take_gone())
                self._files, self._scan, self.io, self._keeper, self._books = files, found, io, keeper, books
            self._open_files = opened.pop_all()
        self._report()

    def _report(self) -> None:
        if self.capacity_bytes < self._size_bytes:
            log.warning(
                "%s has room for %d MiB of KV blocks, not for %d",
                self._path,
                self.capacity_bytes >> 20,
                self._size_bytes >> 20,
            )
        log.info(
            "disk tier in %s: %d blocks in %d files from before, found in %.2f s; %s",
            *(self._path, self._books.num_blocks, len(self._books.segments), self._scan.seconds, self.io),
        )

    def __contains__(self, block_hash: bytes) -> bool:
        with self._lock:
            return block_hash in self._books

    def num_held(self, block_hashes: Sequence[BlockHash]) -> int:
        """How many leading ones."""
        with self._lock:
            return self._books.num_held(block_hashes)

    def find(self, block_hashes: Sequence[BlockHash]) -> list[StoredBlock]:
        """The leading ones, with what is known of them."""
        with self._lock:
            held = block_hashes[: self._books.num_held(block_hashes)]
            return [stored for block_hash in held if (stored := self._books.find(block_hash)) is not None]

    def stored(self) -> list[StoredBlock]:
        """All blocks."""
        with self._lock:
            segments = list(self._books.segments.values())
        found: list[StoredBlock] = []
        for segment in segments:  # the lock is free between two of them, for those who ask meanwhile
            with self._lock:
                found += self._books.stored(segment)
        return found

    def read(self, block_hashes: Sequence[BlockHash], into: Sequence[memoryview]) -> int:
        """How many leading blocks are now in the memory of `into`, one of `block_bytes` in each, and are what was written.
        What the rest of `into` holds means nothing."""
        if len(block_hashes) != len(into) or any(len(view) != self.block_bytes for view in into):
            raise ValueError(f"{len(block_hashes)} blocks need as many views of {self.block_bytes} bytes")
        now = self._clock.now()  # one time for a whole chain, so that its tail does not seem newer than its head
        num_read = 0
        with self._kept_open() as is_open, self._surviving():
            if not is_open:
                return 0
            with self._lock:
                runs = self._books.runs(block_hashes, max(1, READ_PIECE_BYTES // self.block_bytes))
            for run in runs:
                num_valid = self._read_run(run, into[num_read : num_read + run.count], now)
                num_read += num_valid
                if num_valid < run.count:
                    break
        with self._lock:
            self._books.counts.blocks_read += num_read
            self._books.counts.bytes_read += num_read * self.block_bytes
        self._tell()
        return num_read

    def write(self, blocks: Sequence[CachedBlock], data: Sequence[memoryview], checksums: Sequence[int]) -> int:
        """How many of these blocks the tier holds now, those included that it had before. `data[i]` are the bytes of `blocks[i]`,
        which must not change meanwhile, `checksums[i]` their checksum. Blocks of one call lie side by side, in their order."""
        if not len(blocks) == len(data) == len(checksums) or any(len(view) != self.block_bytes for view in data):
            raise ValueError(f"{len(blocks)} blocks need as many checksums and views of {self.block_bytes} bytes")
        with self._writing, self._surviving():
            if self._is_writable():
                now = self._clock.now()
                self._keeper.settle()
                for indices in self._batches(blocks):
                    if not self._keeper.write(
                        [blocks[index] for index in indices],
                        [data[index] for index in indices],
                        [checksums[index] for index in indices],
                        self.io.direct_writes,
                        now,
                    ):
                        break
        with self._lock:
            num_held = sum(block.block_hash in self._books for block in blocks)
            self._books.counts.blocks_refused += len(blocks) - num_held
        self._tell()
        return num_held

    def forget(self, block_hashes: Sequence[BlockHash]) -> None:
        """These are not served any more, after a restart either. Their room comes back when the whole file goes."""
        with self._writing, self._surviving():
            with self._lock:
                for block_hash in block_hashes:
                    self._books.forget(block_hash)
            if not self._closed:
                self._keeper.settle()
        self._tell()

    def clear(self) -> None:
        """Nothing is served any more, and all files go, those of other layouts as well."""
        with self._writing, self._surviving():
            if self._is_writable():
                self._keeper.clear()
        self._tell()

    def close(self) -> None:
        """Waits for calls that are under way; later ones find nothing and keep nothing. The files stay."""
        with self._writing:
            with self._lock:
                if self._closed:
                    return
                self._closed = True
                self._lock.wait_for(lambda: not self._num_readers)
            with self._surviving():
                self._keeper.settle()
            self._open_files.close()
        self._tell()

    @property
    def capacity_bytes(self) -> int:
        """What the tier may grow to, and the disk had room for when something was last written."""
        return self._keeper.capacity_bytes

    def stats(self) -> DiskStats:
        """From memory: it waits for no disk."""
        with self._lock:
            segments = self._books.segments.values()
            return DiskStats(
                capacity_bytes=self._keeper.capacity_bytes,
                used_bytes=self._keeper.used_bytes,
                stranger_bytes=self._keeper.stranger_bytes,
                num_files=len(segments),
                num_blocks=self._books.num_blocks,
                dead_blocks=sum(len(segment.blocks) for segment in segments) - self._books.num_blocks,
                tenants=dict(self._books.tenants),
                counts=replace(self._books.counts),
                read_failures=dict(self._read_failures),
                write_failures=self._keeper.failures,
                paused_s=self._keeper.paused_s,
                scan=self._scan,
                io=str(self.io),
            )

    @contextlib.contextmanager
    def _kept_open(self) -> Iterator[bool]:
        """Whether the tier is open and has its folder: if so, it stays open within."""
        with self._lock:
            is_open = not self._closed and not self._keeper.is_gone
            self._num_readers += is_open
        try:
            yield is_open
        finally:
            with self._lock:
                self._num_readers -= is_open
                self._lock.notify_all()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """What goes wrong within, and is no disk's doing, makes the tier rest and nothing worse: its thread serves others too."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # a bug, told with its traceback
            self._keeper.failed(error)

    def _is_writable(self) -> bool:
        """Whether there is a folder to write to. One that is gone is opened anew, but not while the tier rests."""
        if self._closed:
            return False
        if self._keeper.is_gone and not self._keeper.paused_s:
            self._open_anew()
        return self._keeper.has_folder()

    def _open_anew(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: not self._num_readers)  # no more come: there is nothing to read
        self._open_files.close()  # first, for a lock that is still there is ours
        try:
            self._open()
        except ConfigError as error:
            with self._lock:
                is_new = self._pause.failed(FOLDER_REFUSED, self._clock.now())
            if is_new:
                log.warning("the disk tier has lost its folder and tries again later: %s", error.message)

    def _read_run(self, run: Run, into: Sequence[memoryview], now: float) -> int:
        """How many leading ones arrived and are right. The first that is not is forgotten."""
        segment = run.segment
        mark = now - segment.marked_at >= MARK_EVERY_S
        try:
            num_bytes = self._files.read(
                segment.number, run.first, len(segment.blocks), into, self.io.direct_reads, mark
            )
        except Exception as error:  # noqa: BLE001  # a bug is a miss like a disk that fails
            self._read_failed(run, error)
            return 0
        segment.used_at = now
        if mark:
            segment.marked_at = now
        num_blocks = num_bytes // self.block_bytes
        for index, (view, expected) in enumerate(zip(into[:num_blocks], run.checksums, strict=False)):
            if checksum(view) != expected:
                self._damaged(Run(segment, run.first + index, 1))
                return index
        if num_blocks < run.count:
            self._damaged(Run(segment, run.first + num_blocks, run.count - num_blocks))
        return num_blocks

    def _damaged(self, run: Run) -> None:
        with self._lock:
            num_forgotten = self._books.forget_run(run)
            self._books.counts.checksum_failures += num_forgotten
        if num_forgotten:
            log.warning("dropping %d damaged blocks of segment %x of the disk tier", num_forgotten, run.segment.number)

    def _read_failed(self, run: Run, error: Exception) -> None:
        """Blocks that are evicted meanwhile are no failure."""
        is_lost = self._keeper.lost(error)
        cause = FOLDER_GONE if is_lost else cause_of(error)
        with self._lock:
            if run.segment.being_deleted and not is_lost:
                return
            if not is_lost and not is_out_of_files(error) and not self._books.forget_run(run):
                return
            self._read_failures[cause] += 1
            is_new = self._read_failures[cause] == 1
        if is_new and not is_lost:
            log.warning(
                "the disk tier cannot read segment %x: %s",
                *(run.segment.number, cause),
                exc_info=None if isinstance(error, OSError) else error,
            )

    def _batches(self, blocks: Sequence[CachedBlock]) -> Iterator[list[int]]:
        """What goes into one file each, of blocks that are not held: those of one tenant, in their order, the first of them where
        it may not have all. A tenant with a small limit gets small files, to give up a few blocks at a time."""
        with self._lock:
            lacking = {
                block.block_hash: index for index, block in enumerate(blocks) if block.block_hash not in self._books
            }
        by_tenant: dict[str, list[int]] = {}
        for index in lacking.values():
            by_tenant.setdefault(blocks[index].tenant, []).append(index)
        for tenant, indices in by_tenant.items():
            limit = self._keeper.limit(Tenant(tenant))
            step = max(1, min(self.segment_blocks, limit // MIN_FILES_OF_TENANT))
            for start in range(0, min(limit, len(indices)), step):
                yield indices[start : min(start + step, limit)]

    def _tell(self) -> None:
        with self._lock:
            gone = self._books.take_gone()
        if gone:
            self._removed(gone)
