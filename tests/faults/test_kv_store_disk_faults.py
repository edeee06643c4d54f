"""The disk tier, when processes are killed, bytes flip, disks fill up and folders hold what they should not."""

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kv_store.disk.segment import PAGE_BYTES, SegmentIdentity, encode_header, header_bytes
from kv_store.disk.tier import DiskTier
from kv_store.disk.write_pause import FIRST_PAUSE_S
from protocol.ids import BlockHash
from runtime.clock import ManualClock
from tests.support.disk_blocks import (
    FINGERPRINT,
    files_in,
    flip,
    hashes,
    open_tier,
    put,
    served,
    some_blocks,
)
from tests.support.disk_writer import BLOCK_BYTES, NUM_CHAINS, SIZE_BYTES, chain_of, write_until_killed

KILLS = 20
_processes = multiprocessing.get_context("forkserver")


@pytest.mark.failure("disk writer killed")
def test_a_writer_that_is_killed_leaves_whole_segments_only(tmp_path: Path) -> None:
    pick = random.Random(1)
    num_found = 0
    for life in range(KILLS):
        pipe, theirs = _processes.Pipe()
        writer = _processes.Process(target=write_until_killed, args=(theirs, str(tmp_path), life), daemon=True)
        writer.start()
        theirs.close()
        assert pipe.recv() == "open"
        writer.join(pick.uniform(0.0, 0.05))
        writer.kill()
        writer.join()
        writer.close()
        pipe.close()
        with open_tier(tmp_path, BLOCK_BYTES, SIZE_BYTES) as tier:
            for seed in range(NUM_CHAINS):
                blocks = chain_of(seed)
                assert served(tier, blocks) == tier.num_held(hashes(blocks))
            assert all(path.suffix == ".blocks" for path in files_in(tmp_path))
            assert tier.stats().counts.checksum_failures == 0
            assert tier.stats().used_bytes <= SIZE_BYTES
            num_found += tier.stats().scan.num_blocks
    assert num_found > KILLS  # they did write


@pytest.mark.failure("bytes flipped on disk")
def test_a_flipped_byte_costs_its_block(tmp_path: Path) -> None:
    blocks = some_blocks(8)
    with open_tier(tmp_path) as tier:
        put(tier, blocks)
        flip(files_in(tmp_path)[0], header_bytes(8) + 5 * 4096 + 77)
        assert served(tier, blocks) == 5
        assert served(tier, blocks[6:]) == 2
        assert blocks[5].block_hash not in tier
        assert tier.stats().counts.checksum_failures == 1
        assert put(tier, blocks) == 8  # computed again, and kept again
        assert served(tier, blocks) == 8
    with open_tier(tmp_path) as tier:
        assert served(tier, blocks) == 8
        assert tier.stats().counts.checksum_failures == 0


@pytest.mark.failure("bytes flipped on disk")
def test_a_flipped_byte_in_a_header_costs_the_file(tmp_path: Path) -> None:
    with open_tier(tmp_path) as tier:
        put(tier, some_blocks(4))
        put(tier, some_blocks(4, seed=1))
    flip(files_in(tmp_path)[0], 100)
    with open_tier(tmp_path) as tier:
        assert served(tier, some_blocks(4)) == 0
        assert served(tier, some_blocks(4, seed=1)) == 4
        assert tier.stats().scan.num_refused == 1
        assert len(files_in(tmp_path)) == 1


@pytest.mark.failure("file cut short")
@pytest.mark.parametrize("cut", [1, 4096, 2 * 4096 + 5])
def test_a_file_that_is_cut_while_the_tier_is_open_serves_what_is_left(tmp_path: Path, cut: int) -> None:
    blocks = some_blocks(4)
    with open_tier(tmp_path) as tier:
        put(tier, blocks)
        (path,) = files_in(tmp_path)
        os.truncate(path, path.stat().st_size - cut)
        num_whole = 4 - -(-cut // 4096)
        assert served(tier, blocks) <= num_whole
        assert served(tier, blocks) <= num_whole
        assert put(tier, blocks) == 4
        assert served(tier, blocks) == 4


@pytest.mark.failure("file deleted by others")
def test_a_file_that_somebody_deleted_is_a_miss(tmp_path: Path) -> None:
    with open_tier(tmp_path) as tier:
        put(tier, some_blocks(4))
        files_in(tmp_path)[0].unlink()
        assert served(tier, some_blocks(4)) == 0
        assert tier.stats().num_blocks == 0
        assert put(tier, some_blocks(4)) == served(tier, some_blocks(4)) == 4


@pytest.mark.failure("file comes back")
def test_of_a_block_in_two_files_the_later_counts(tmp_path: Path) -> None:
    blocks = some_blocks(4)
    with open_tier(tmp_path) as tier:
        put(tier, blocks)
        (old,) = files_in(tmp_path)
        before = old.read_bytes()
        tier.forget(hashes(blocks))
        put(tier, blocks[:3])
    old.write_bytes(before)
    old.chmod(0o600)
    with open_tier(tmp_path) as tier:
        assert {stored.place // 256 for stored in tier.find(hashes(blocks[:3]))} == {1}
        assert served(tier, blocks) == 4
        tier.forget(hashes(blocks[:3]))
    with open_tier(tmp_path) as tier:
        assert [stored.block for stored in tier.stored()] == blocks[3:]  # neither copy is back


Foreign = Callable[[Path, Path], None]
"""Puts something at the first path; the second is a whole segment."""


def _garbage(at: Path, _segment: Path) -> None:
    at.write_bytes(random.Random(3).randbytes(50_000))


def _gigabyte_of_zeros(at: Path, _segment: Path) -> None:
    at.touch()
    os.truncate(at, 1 << 30)


def _huge_claim(at: Path, _segment: Path) -> None:
    at.write_bytes(encode_header(SegmentIdentity(99, FINGERPRINT, 1 << 40), some_blocks(4), [1] * 4))


def _empty(at: Path, _segment: Path) -> None:
    at.touch()


def _link(at: Path, segment: Path) -> None:
    at.symlink_to(segment)


def _link_to_a_secret(at: Path, segment: Path) -> None:
    secret = segment.parent.parent.parent / "secret"
    secret.write_bytes(segment.read_bytes())
    at.symlink_to(secret)


def _pipe(at: Path, _segment: Path) -> None:
    os.mkfifo(at)


def _copy(at: Path, segment: Path) -> None:
    at.write_bytes(segment.read_bytes())


def _half(at: Path, segment: Path) -> None:
    at.write_bytes(segment.read_bytes()[: PAGE_BYTES + 100])


def _written_by_all(at: Path, segment: Path) -> None:
    segment.rename(at)
    at.chmod(0o666)


@pytest.mark.failure("foreign files in the folder")
@pytest.mark.parametrize(
    "foreign",
    [
        *(_garbage, _gigabyte_of_zeros, _huge_claim, _empty, _link, _link_to_a_secret),
        *(_pipe, _copy, _half, _written_by_all),
    ],
)
def test_what_has_our_name_and_is_not_ours_is_refused_and_deleted(tmp_path: Path, foreign: Foreign) -> None:
    with open_tier(tmp_path / "kv") as tier:
        put(tier, some_blocks(4))
        put(tier, some_blocks(4, seed=1))
    first, second = files_in(tmp_path / "kv")
    at = first.with_name(f"{99:016x}.blocks")
    foreign(at, second)
    with open_tier(tmp_path / "kv") as tier:
        assert tier.stats().scan.num_refused == 1
        assert served(tier, some_blocks(4)) == 4
        assert served(tier, some_blocks(4, seed=1)) == 4 * second.exists()
        assert not at.is_symlink()
        assert not at.exists()
    assert not list(tmp_path.glob("secret")) or (tmp_path / "secret").stat().st_size > 0


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    with open_tier(tmp_path):
        pass
    ours = tmp_path / FINGERPRINT
    for name in ("notes.txt", "0.blocks", f"{1:016X}.blocks".replace("1", "A")):
        (ours / name).write_text("mine")
    (ours / f"{3:016x}.blocks").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / f"{1:016x}.writing").write_text("mine")
    with open_tier(tmp_path) as tier:
        tier.clear()
    assert len(list(ours.iterdir())) == 4
    assert list((tmp_path / "photos").iterdir())


@pytest.mark.failure("links in place of folders")
def test_a_link_in_place_of_a_folder_or_lock_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (elsewhere / f"{0:016x}.blocks").write_text("mine")
    root = tmp_path / "kv"
    root.mkdir()
    (root / FINGERPRINT).symlink_to(elsewhere)
    with pytest.raises(Exception, match="cannot keep KV blocks"), open_tier(root):
        pass
    (root / FINGERPRINT).unlink()
    (root / ("e" * 32)).symlink_to(elsewhere)
    with open_tier(root) as tier:
        tier.clear()
    assert len(list(elsewhere.iterdir())) == 2
    (root / "lock").unlink()
    (root / "lock").symlink_to(elsewhere / "precious")
    with pytest.raises(Exception, match="cannot keep KV blocks"), open_tier(root):
        pass
    assert (elsewhere / "precious").read_text() == "mine"


class _Refusal:
    """os.pwritev, which fails as it is told to, after it has written a part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: int | None = None
        self._pwritev = os.pwritev
        monkeypatch.setattr(os, "pwritev", self)

    def __call__(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        if self.error is None:
            return self._pwritev(fd, views, offset)
        if offset == 0:
            return self._pwritev(fd, views[:1], offset)
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.failure("disk full")
@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_is_left_in_peace_and_read(
    tmp_path: Path, cause: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    tier = DiskTier(tmp_path, FINGERPRINT, 4096, 1 << 24, clock=clock)
    put(tier, some_blocks(4))
    refusal = _Refusal(monkeypatch)
    refusal.error = cause
    assert put(tier, some_blocks(4, seed=1)) == 0
    assert len(files_in(tmp_path)) == 1
    assert served(tier, some_blocks(4)) == 4
    assert tier.stats().paused_s == FIRST_PAUSE_S
    refusal.error = None
    assert put(tier, some_blocks(4, seed=1)) == 0  # it rests
    assert put(tier, some_blocks(4)) == 4  # and knows what it has
    refusal.error = cause
    clock.advance(FIRST_PAUSE_S)
    assert put(tier, some_blocks(4, seed=1)) == 0
    refusal.error = None
    clock.advance(FIRST_PAUSE_S)
    assert put(tier, some_blocks(4, seed=1)) == 0  # for twice as long
    clock.advance(FIRST_PAUSE_S)
    assert put(tier, some_blocks(4, seed=1)) == 4
    stats = tier.stats()
    assert list(stats.write_failures.values()) == [2]
    assert stats.counts.blocks_refused == 16
    assert sum("rests" in record.message for record in caplog.records) == 1
    assert served(tier, some_blocks(4, seed=1)) == 4
    tier.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 2 MiB of its own, or skip: mounting is for root."""
    at = tmp_path / "disk"
    at.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("cannot mount a filesystem here")
    options = ("-t", "tmpfs", "-o", "size=2M,mode=700")
    if subprocess.run([mount, *options, "none", str(at)], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a filesystem here")
    try:
        yield at
    finally:
        subprocess.run([umount, str(at)], check=True)


@pytest.mark.failure("disk full")
def test_a_full_disk_makes_room_of_our_own(small_disk: Path) -> None:
    with open_tier(small_disk / "kv", 64 << 10, size_bytes=1 << 30) as tier:
        assert tier.stats().capacity_bytes <= 2 << 20
        for seed in range(30):
            assert put(tier, some_blocks(3, seed=seed)) == served(tier, some_blocks(3, seed=seed)) == 3
        assert not tier.stats().write_failures
        assert tier.stats().num_blocks > 12
        free = os.statvfs(small_disk).f_bavail * 4096
        with (small_disk / "others").open("wb") as others, contextlib.suppress(OSError):
            others.write(bytes(free))
        assert put(tier, some_blocks(3, seed=99)) == 3
        assert put(tier, some_blocks(100, seed=100)) == 0
        assert next(iter(tier.stats().write_failures)).startswith("ENOSPC")
        assert all(path.suffix == ".blocks" for path in files_in(small_disk / "kv"))


@pytest.mark.failure("disk full")
def test_files_that_may_not_grow(tmp_path: Path) -> None:
    with open_tier(tmp_path) as tier:
        put(tier, some_blocks(2))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 4096, limits[1]))
        try:
            assert put(tier, some_blocks(8, seed=1)) == 0
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert next(iter(tier.stats().write_failures)).startswith("EFBIG")
        assert len(files_in(tmp_path)) == 1
        assert served(tier, some_blocks(2)) == 2


@pytest.mark.failure("disk cannot be read")
def test_what_cannot_be_read_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    with open_tier(tmp_path) as tier:
        put(tier, some_blocks(4))
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            assert served(tier, some_blocks(4)) == 0
        assert tier.num_held(hashes(some_blocks(4))) == 0
        assert list(tier.stats().read_failures) == ["EIO (Input/output error)"]
        assert put(tier, some_blocks(4)) == served(tier, some_blocks(4)) == 4


@pytest.mark.failure("out of file descriptors")
@pytest.mark.keeps_files("it opens all that it may, and closes them")
def test_a_process_that_may_open_no_more_files_misses_and_forgets_nothing(tmp_path: Path) -> None:
    with open_tier(tmp_path) as tier:
        put(tier, some_blocks(4))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, limits[1]))
        opened = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    opened.append(os.dup(0))
            assert served(tier, some_blocks(4)) == 0
        finally:
            for fd in opened:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert served(tier, some_blocks(4)) == 4


@pytest.mark.failure("folder becomes unusable")
def test_headers_that_cannot_be_rewritten_cost_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = some_blocks(4)
    refusal = _Refusal(monkeypatch)
    with open_tier(tmp_path) as tier:
        put(tier, blocks)
        refusal.error = errno.EIO
        monkeypatch.setattr(refusal, "_pwritev", _raise)
        tier.forget([BlockHash(blocks[1].block_hash)])
        assert tier.stats().num_blocks == 0
        assert not files_in(tmp_path)


def _raise(*_: object) -> int:
    raise OSError(errno.EIO, "broken")
