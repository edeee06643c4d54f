"""DiskTier on a real folder: what was written is served, byte for byte, across restarts and beside others."""

import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kv_store.disk.folder import segments_bytes
from kv_store.disk.keeper import FILES_PER_VICTIM
from kv_store.disk.segment import segment_bytes
from kv_store.disk.tier import DiskTier
from kv_store.quotas import Quotas
from kv_store.tiers import StoredBlock
from protocol.errors import ConfigError
from protocol.kv_blocks import Tenant
from runtime.clock import ManualClock
from tests.support.disk_blocks import (
    FINGERPRINT,
    Slots,
    content,
    files_in,
    hashes,
    open_tier,
    put,
    served,
    slots_of,
    some_blocks,
)

OTHER = "f" * 32
BLOCK_BYTES = [4096, 12288, 1000, 1]
"""Whole pages, and not."""


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_what_is_written_is_served_after_a_restart_too(tmp_path: Path, block_bytes: int) -> None:
    blocks = some_blocks(300)
    with open_tier(tmp_path / "kv", block_bytes) as tier:
        assert put(tier, blocks) == 300
        assert served(tier, blocks) == 300
        before = tier.stored()
    with open_tier(tmp_path / "kv", block_bytes) as tier:
        assert tier.stats().scan.num_blocks == 300
        assert sorted(tier.stored(), key=lambda stored: stored.place) == sorted(before, key=lambda stored: stored.place)
        assert tier.num_held(hashes(blocks)) == served(tier, blocks) == 300
        assert [stored.block for stored in tier.find(hashes(blocks))] == blocks
        assert put(tier, some_blocks(2, seed=1)) == 2
        assert served(tier, [*blocks[5:9], *some_blocks(2, seed=1), *blocks[:3][::-1]]) == 9


def test_memory_that_is_not_aligned_will_do(tmp_path: Path) -> None:
    blocks = some_blocks(3)
    with open_tier(tmp_path) as tier:
        data = [memoryview(b"x" + content(block.block_hash, 4096))[1:] for block in blocks]
        assert tier.write(blocks, data, [stored.checksum for stored in _checksummed(tmp_path / "other", 3)]) == 3
        into = [memoryview(bytearray(4097))[1:] for _ in blocks]
        assert tier.read(hashes(blocks), into) == 3
        assert [bytes(view) for view in into] == [bytes(view) for view in data]


def _checksummed(path: Path, count: int) -> list[StoredBlock]:
    with open_tier(path) as tier:
        put(tier, some_blocks(count))
        return tier.find(hashes(some_blocks(count)))


def test_what_is_held_is_not_written_again(tmp_path: Path) -> None:
    blocks = some_blocks(10)
    with open_tier(tmp_path) as tier:
        put(tier, blocks[:6])
        assert put(tier, [*blocks, *blocks[2:]]) == 18
        assert tier.stats().counts.blocks_written == 10
        assert tier.stats().used_bytes == segment_bytes(6, 4096) + segment_bytes(4, 4096)
        assert served(tier, blocks) == 10


def test_a_read_ends_at_the_first_block_that_is_missing(tmp_path: Path) -> None:
    blocks = some_blocks(10)
    with open_tier(tmp_path) as tier:
        put(tier, [*blocks[:4], *blocks[5:]])
        assert tier.num_held(hashes(blocks)) == served(tier, blocks) == len(tier.find(hashes(blocks))) == 4
        assert blocks[5].block_hash in tier
        assert blocks[4].block_hash not in tier


def test_what_is_forgotten_stays_forgotten(tmp_path: Path) -> None:
    blocks = some_blocks(8)
    gone: list[StoredBlock] = []
    tier = DiskTier(tmp_path, FINGERPRINT, 4096, 1 << 20, removed=gone.extend)
    put(tier, blocks[:4])
    put(tier, blocks[4:])
    tier.forget([*hashes(blocks[2:8]), *hashes(some_blocks(1, seed=5))])
    assert [stored.block for stored in gone] == blocks[2:8]
    assert len(files_in(tmp_path)) == 1  # the other file had nothing left
    assert tier.stats().dead_blocks == 2
    tier.close()
    with open_tier(tmp_path) as again:
        assert served(again, blocks) == 2
        assert again.stats().num_blocks == 2
        assert put(again, blocks) == 8
        assert served(again, blocks) == 8


def test_clear_leaves_nothing(tmp_path: Path) -> None:
    with open_tier(tmp_path, fingerprint=OTHER) as tier:
        put(tier, some_blocks(5))
    gone: list[StoredBlock] = []
    tier = DiskTier(tmp_path, FINGERPRINT, 4096, 64 << 20, removed=gone.extend)
    put(tier, some_blocks(5))
    tier.clear()
    assert len(gone) == 5
    assert tier.stats().used_bytes == tier.stats().num_blocks == served(tier, some_blocks(5)) == 0
    assert put(tier, some_blocks(5)) == 5
    tier.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [FINGERPRINT, "lock"]


def test_the_least_recently_used_file_goes_and_its_owner_is_told(tmp_path: Path) -> None:
    clock = ManualClock()
    gone: list[StoredBlock] = []
    size = 4 * segment_bytes(1, 4000)
    tier = DiskTier(tmp_path, FINGERPRINT, 4000, size, removed=gone.extend, clock=clock)
    assert tier.segment_blocks == 1
    for seed in range(20):
        clock.advance(10.0)
        assert put(tier, some_blocks(1, seed=seed)) == 1
        assert served(tier, some_blocks(1)) == 1  # the first is used all the time
        assert tier.stats().used_bytes <= size
    stats = tier.stats()
    assert stats.counts.blocks_evicted == len(gone) == 20 - stats.num_blocks > 0
    assert [stored.block for stored in gone] == [some_blocks(1, seed=seed)[0] for seed in range(1, 1 + len(gone))]
    assert len(files_in(tmp_path)) == stats.num_files
    tier.close()


def test_a_file_that_is_used_after_it_was_chosen_to_go_stays(tmp_path: Path) -> None:
    clock = ManualClock()
    num_files = 3 * FILES_PER_VICTIM
    tier = DiskTier(tmp_path, FINGERPRINT, 4000, num_files * segment_bytes(1, 4000), clock=clock)
    for seed in range(num_files + 1):  # the last one chooses four to go, and needs one
        clock.advance(1.0)
        put(tier, some_blocks(1, seed=seed))
    assert served(tier, some_blocks(1, seed=1)) == 1
    for seed in range(num_files + 1, num_files + 5):
        put(tier, some_blocks(1, seed=seed))
    assert [served(tier, some_blocks(1, seed=seed)) for seed in range(8)] == [0, 1, 0, 0, 0, 0, 1, 1]
    tier.close()


def test_what_was_read_lately_is_known_after_a_restart(tmp_path: Path) -> None:
    with open_tier(tmp_path, 1000) as tier:
        put(tier, some_blocks(1))
        put(tier, some_blocks(1, seed=1))
    for index, path in enumerate(files_in(tmp_path)):
        os.utime(path, (1000.0, 1000.0 + 5000 * (1 - index)))
    clock = ManualClock(start=100.0)
    tier = DiskTier(tmp_path, FINGERPRINT, 1000, 2 * segment_bytes(1, 1000), clock=clock)
    put(tier, some_blocks(1, seed=2))
    assert served(tier, some_blocks(1)) == 1
    assert served(tier, some_blocks(1, seed=1)) == 0
    tier.close()
    assert files_in(tmp_path)[0].stat().st_mtime > 6000.0  # reading it has left a mark


def test_a_smaller_tier_gives_up_what_is_too_much(tmp_path: Path) -> None:
    with open_tier(tmp_path, 1000) as tier:
        for seed in range(10):
            put(tier, some_blocks(1, seed=seed))
    with open_tier(tmp_path, 1000, size_bytes=3 * segment_bytes(1, 1000)) as tier:
        assert tier.stats().num_blocks == len(files_in(tmp_path)) == 3


def test_two_layouts_side_by_side_never_mix(tmp_path: Path) -> None:
    blocks = some_blocks(6)
    with open_tier(tmp_path, 1000) as tier:
        put(tier, blocks)
    with open_tier(tmp_path, 2000, fingerprint=OTHER) as tier:
        assert served(tier, blocks) == 0
        assert tier.stats().stranger_bytes == segment_bytes(6, 1000)
        put(tier, blocks[:3])
        assert served(tier, blocks) == 3
    with open_tier(tmp_path, 1000) as tier:
        assert served(tier, blocks) == 6


def test_layouts_that_nobody_serves_go_first(tmp_path: Path) -> None:
    with open_tier(tmp_path, 1000, fingerprint=OTHER) as tier:
        put(tier, some_blocks(1))
        put(tier, some_blocks(1, seed=1))
    os.utime(files_in(tmp_path, OTHER)[1], (0, 0))
    (tmp_path / OTHER / f"{5:016x}.writing").write_bytes(b"unfinished")
    with open_tier(tmp_path, 1000, size_bytes=4 * segment_bytes(1, 1000)) as tier:
        assert len(files_in(tmp_path, OTHER)) == 2
        for seed in range(3):
            put(tier, some_blocks(1, seed=seed))
        assert [path.name for path in files_in(tmp_path, OTHER)] == [f"{0:016x}.blocks"]  # the older one went
        put(tier, some_blocks(1, seed=3))
        assert not (tmp_path / OTHER).exists()
        assert tier.stats().num_blocks == 4
        assert tier.stats().stranger_bytes == 0


def test_tenants_do_not_share_files(tmp_path: Path) -> None:
    mine, yours = some_blocks(4, seed=1, tenant=Tenant("mine")), some_blocks(4, seed=2, tenant=Tenant("yours"))
    mixed = [block for pair in zip(mine, yours, strict=True) for block in pair]
    with open_tier(tmp_path) as tier:
        assert put(tier, mixed) == 8
        assert tier.stats().tenants == {"mine": 4, "yours": 4}
        assert tier.stats().num_files == 2
        assert served(tier, mixed) == 8
        tier.forget(hashes(mine))
        assert len(files_in(tmp_path)) == 1
    with open_tier(tmp_path) as tier:
        assert tier.stats().tenants == {"yours": 4}


def test_a_tenant_over_its_quota_gives_up_its_own(tmp_path: Path) -> None:
    quotas = Quotas(blocks_by_tenant={Tenant("greedy"): 8})
    tier = DiskTier(tmp_path, FINGERPRINT, 1000, 1 << 20, quotas=quotas)
    put(tier, some_blocks(20))
    first = some_blocks(6, seed=1, tenant=Tenant("greedy"))
    assert put(tier, first) == 6
    more = some_blocks(30, seed=2, tenant=Tenant("greedy"))
    assert put(tier, more) == served(tier, more) == 8
    assert served(tier, first) == 0
    assert tier.stats().counts.blocks_refused == 22
    assert put(tier, first[:2]) == 2  # in the place of the chain's tail
    assert tier.stats().tenants == {"none": 20, "greedy": 8}
    assert served(tier, more) == 6
    assert served(tier, some_blocks(20)) == 20
    tier.close()


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    with open_tier(tmp_path), pytest.raises(ConfigError, match=rf"{tmp_path}.*{os.getpid()}") as failed:
        DiskTier(tmp_path, OTHER, 4096, 1 << 20)
    assert failed.value.param == "store.disk_path"
    with open_tier(tmp_path):
        pass


def test_folder_and_files_are_for_this_user_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with open_tier(tmp_path / "a" / "kv") as tier:
            put(tier, some_blocks(2))
    finally:
        os.umask(old)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "a/kv", *(tmp_path / "a/kv").rglob("*")]}
    assert len(modes) == 4
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items())


def test_a_folder_that_cannot_be_had_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match="cannot keep KV blocks"):
            DiskTier(path, FINGERPRINT, 4096, 1 << 20)
    with pytest.raises(ConfigError, match="holds no block") as failed:
        DiskTier(tmp_path / "kv", FINGERPRINT, 4096, 4096)
    assert failed.value.param == "store.disk_size"


def test_more_than_the_disk_has_is_cut_to_what_it_has(tmp_path: Path) -> None:
    with open_tier(tmp_path, size_bytes=1 << 60) as tier:
        assert 0 < tier.stats().capacity_bytes < 1 << 60


def test_what_a_tier_has_on_disk_is_its_segments_alone(tmp_path: Path) -> None:
    """Whatever else lies there: the folder may be anybody's home."""
    assert segments_bytes(tmp_path / "missing") == 0
    for fingerprint in (FINGERPRINT, OTHER):
        with open_tier(tmp_path, fingerprint=fingerprint) as tier:
            put(tier, some_blocks(3))
    (tmp_path / "film").write_bytes(bytes(100_000))
    (tmp_path / "deep" / FINGERPRINT).mkdir(parents=True)
    (tmp_path / "deep" / FINGERPRINT / f"{7:016x}.blocks").write_bytes(bytes(100_000))
    (tmp_path / FINGERPRINT / "notes").write_bytes(bytes(100_000))
    (tmp_path / ("e" * 32)).symlink_to(tmp_path / FINGERPRINT)
    (tmp_path / FINGERPRINT / f"{7:016x}.blocks").symlink_to(tmp_path / "film")
    (tmp_path / FINGERPRINT / f"{8:016x}.blocks").mkdir()
    assert segments_bytes(tmp_path) == 2 * segment_bytes(3, 4096)
    assert segments_bytes(tmp_path / "film") == 0


def test_views_of_another_size_are_refused(tmp_path: Path) -> None:
    with open_tier(tmp_path) as tier:
        blocks = some_blocks(2)
        with pytest.raises(ValueError, match="views of 4096"):
            tier.read(hashes(blocks), Slots(2, 2048).views)
        with pytest.raises(ValueError, match="as many"):
            tier.write(blocks, slots_of(blocks, 4096).views, [1])


def test_a_closed_tier_finds_and_keeps_nothing(tmp_path: Path) -> None:
    with open_tier(tmp_path) as tier:
        put(tier, some_blocks(2))
        tier.close()
        assert served(tier, some_blocks(2)) == 0
        assert put(tier, some_blocks(2, seed=1)) == 0
        tier.forget(hashes(some_blocks(1)))
        tier.clear()
        assert tier.stats().capacity_bytes == 64 << 20


def test_reads_beside_writes_and_evictions_get_right_bytes_or_none(tmp_path: Path) -> None:
    gone: list[Sequence[StoredBlock]] = []
    size = 16 * 4 * segment_bytes(1, 8192)
    tier = DiskTier(tmp_path, FINGERPRINT, 8192, size, removed=gone.append)
    wrong: list[AssertionError] = []
    done = threading.Event()

    def read_all_the_time() -> None:
        try:
            while not done.is_set():
                for seed in range(40):
                    served(tier, some_blocks(4, seed=seed))
        except AssertionError as error:
            wrong.append(error)

    readers = [threading.Thread(target=read_all_the_time) for _ in range(2)]
    for reader in readers:
        reader.start()
    for seed in range(120):
        assert put(tier, some_blocks(4, seed=seed % 40)) == 4
        if seed % 10 == 0:
            tier.forget(hashes(some_blocks(2, seed=seed % 40)))
    done.set()
    for reader in readers:
        reader.join()
    stats = tier.stats()
    tier.close()
    assert not wrong
    assert stats.counts.blocks_evicted > 0
    assert stats.counts.checksum_failures == 0
    assert not stats.read_failures
    assert sum(map(len, gone)) == stats.counts.blocks_written - stats.num_blocks
