"""The disk tier, when its folder goes away beneath it, its calls meet a bug, or its filesystem does not answer."""

import errno
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_store.disk.segment import SegmentIdentity, encode_header
from kv_store.disk.segment_files import SegmentFiles
from kv_store.disk.tier import DiskTier
from kv_store.disk.write_pause import FIRST_PAUSE_S
from kv_store.tiers import StoredBlock
from protocol.errors import ConfigError
from runtime.clock import ManualClock
from tests.support.disk_blocks import FINGERPRINT, files_in, hashes, open_tier, put, served, some_blocks

Loss = Callable[[Path], object]


def _removed(folder: Path) -> None:
    shutil.rmtree(folder)


def _layout_removed(folder: Path) -> None:
    shutil.rmtree(folder / FINGERPRINT)


def _made_anew(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder / FINGERPRINT).mkdir(parents=True, mode=0o700)


LOSSES = [_removed, _layout_removed, _made_anew]


@pytest.mark.failure("folder removed")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_folder_that_is_removed_is_forgotten_and_opened_anew(
    tmp_path: Path, loss: Loss, caplog: pytest.LogCaptureFixture
) -> None:
    clock, gone = ManualClock(), list[StoredBlock]()
    folder = tmp_path / "kv"
    tier = DiskTier(folder, FINGERPRINT, 4096, 1 << 24, removed=gone.extend, clock=clock)
    kept = [*some_blocks(4), *some_blocks(4, seed=1)]
    put(tier, kept)
    loss(folder)
    assert put(tier, some_blocks(4, seed=2)) == 0
    assert {stored.block.block_hash for stored in gone} == {block.block_hash for block in kept}
    stats = tier.stats()
    assert (stats.num_blocks, stats.used_bytes, stats.num_files, stats.tenants) == (0, 0, 0, {})
    assert list(stats.write_failures.values()) == [1]
    assert stats.paused_s == FIRST_PAUSE_S
    assert served(tier, kept) == put(tier, kept) == 0
    assert sum("is gone" in record.message for record in caplog.records) == 1
    clock.advance(FIRST_PAUSE_S)
    assert put(tier, kept) == served(tier, kept) == 8
    assert tier.stats().paused_s == 0
    assert tier.stats().counts.blocks_written == 16
    with pytest.raises(ConfigError, match="keeps the KV blocks of process"):
        DiskTier(folder, FINGERPRINT, 4096, 1 << 24)
    tier.close()
    with open_tier(folder) as again:
        assert served(again, kept) == 8


@pytest.mark.failure("folder removed")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_read_that_meets_it_forgets_everything(tmp_path: Path, loss: Loss) -> None:
    gone: list[StoredBlock] = []
    tier = DiskTier(tmp_path / "kv", FINGERPRINT, 4096, 1 << 24, removed=gone.extend)
    put(tier, some_blocks(4))
    put(tier, some_blocks(4, seed=1))
    loss(tmp_path / "kv")
    assert served(tier, some_blocks(4)) == 0
    assert len(gone) == 8
    assert tier.num_held(hashes(some_blocks(4, seed=1))) == tier.stats().used_bytes == 0
    assert sum(tier.stats().read_failures.values()) == 1
    tier.forget(hashes(some_blocks(4)))
    tier.clear()
    assert put(tier, some_blocks(4)) == served(tier, some_blocks(4)) == 4
    tier.close()


@pytest.mark.failure("folder removed")
def test_a_folder_that_cannot_be_opened_anew_is_tried_again(tmp_path: Path) -> None:
    clock = ManualClock()
    tier = DiskTier(tmp_path / "kv", FINGERPRINT, 4096, 1 << 24, clock=clock)
    put(tier, some_blocks(4))
    _removed(tmp_path / "kv")
    (tmp_path / "kv").write_text("somebody else's")
    for pause_s in (FIRST_PAUSE_S, 2 * FIRST_PAUSE_S):
        assert put(tier, some_blocks(4)) == served(tier, some_blocks(4)) == 0
        assert tier.stats().paused_s == pause_s
        clock.advance(pause_s)
    (tmp_path / "kv").unlink()
    assert put(tier, some_blocks(4)) == served(tier, some_blocks(4)) == 4
    tier.close()


@pytest.mark.failure("folder removed")
def test_what_a_folder_that_took_its_place_has_is_served(tmp_path: Path) -> None:
    with open_tier(tmp_path / "other") as other:
        put(other, some_blocks(4, seed=7))
    tier = DiskTier(tmp_path / "kv", FINGERPRINT, 4096, 1 << 24)
    put(tier, some_blocks(4))
    (tmp_path / "kv").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "kv")
    files_in(tmp_path / "old")[0].unlink()
    assert served(tier, some_blocks(4)) == 0
    assert put(tier, some_blocks(4, seed=1)) == 4
    assert served(tier, [*some_blocks(4, seed=7), *some_blocks(4, seed=1)]) == 8
    tier.close()


@pytest.mark.failure("foreign files in the folder")
@pytest.mark.parametrize("number", [1 << 48, 1 << 63, (1 << 64) - 1])
def test_a_number_near_the_end_of_all_numbers_is_refused(tmp_path: Path, number: int) -> None:
    with open_tier(tmp_path) as tier:
        put(tier, some_blocks(2))
    foreign = tmp_path / FINGERPRINT / f"{number:016x}.blocks"
    header = encode_header(SegmentIdentity(number, FINGERPRINT, 4096), some_blocks(1, seed=1), [1])
    foreign.write_bytes(header + bytes(4096))
    foreign.chmod(0o600)
    with open_tier(tmp_path) as tier:
        assert tier.stats().scan.num_refused == 1
        assert not foreign.exists()
        assert put(tier, some_blocks(2, seed=2)) == 2
        assert served(tier, [*some_blocks(2), *some_blocks(2, seed=2)]) == 4


@pytest.mark.failure("a bug in the disk tier")
@pytest.mark.parametrize("call", ["write", "read", "rewrite_header"])
def test_a_bug_is_a_miss_with_a_traceback_and_a_pause(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise struct.error("a bug")

    clock = ManualClock()
    tier = DiskTier(tmp_path, FINGERPRINT, 4096, 1 << 24, clock=clock)
    put(tier, some_blocks(4))
    with monkeypatch.context() as patch:
        patch.setattr(SegmentFiles, call, fail)
        if call == "read":
            assert served(tier, some_blocks(4)) == tier.num_held(hashes(some_blocks(4))) == 0
        elif call == "write":
            assert put(tier, some_blocks(4, seed=1)) == put(tier, some_blocks(4, seed=1)) == 0
        else:
            tier.forget(hashes(some_blocks(1)))
            assert not files_in(tmp_path)  # what cannot be told goes as a whole
    stats = tier.stats()
    assert {**stats.read_failures, **stats.write_failures} == {"error": 1}
    assert stats.paused_s == (0 if call == "read" else FIRST_PAUSE_S)
    assert sum(record.exc_info is not None for record in caplog.records) == 1
    clock.advance(FIRST_PAUSE_S)
    assert put(tier, some_blocks(4, seed=1)) == served(tier, some_blocks(4, seed=1)) == 4
    tier.close()


@pytest.mark.failure("a mount that hangs")
def test_questions_ask_no_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise AssertionError("on a mount that hangs, the event loop would wait here")

    with open_tier(tmp_path, size_bytes=1 << 60) as tier:
        put(tier, some_blocks(2))
        at_first = tier.stats().capacity_bytes
        with monkeypatch.context() as patch:
            for call in ("fstatvfs", "statvfs", "stat", "fstat", "lstat", "open", "listdir"):
                patch.setattr(os, call, hang)
            stats = tier.stats()
            assert tier.num_held(hashes(some_blocks(2))) == len(tier.stored()) == 2
        assert 0 < stats.capacity_bytes == at_first < 1 << 60
        monkeypatch.setattr(SegmentFiles, "free_bytes", lambda _files: 1 << 20)
        put(tier, some_blocks(1, seed=1))
        assert tier.stats().capacity_bytes == (1 << 20) + stats.used_bytes  # as that write found it
        monkeypatch.setattr(SegmentFiles, "free_bytes", _refuse)
        assert put(tier, some_blocks(1, seed=2)) == 0
        assert tier.stats().capacity_bytes == (1 << 20) + stats.used_bytes


def _refuse(*_: object) -> int:
    raise OSError(errno.EIO, "broken")
