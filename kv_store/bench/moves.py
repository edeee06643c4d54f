"""The moves of a store, measured: between a cache's blocks and slots by a BlockCopier, between slots and files by the disk tier.

Reads of the disk find nothing in the page cache. Writes are measured as the tier does them: nothing is synced, so where its
own measurement has chosen the page cache, a part of each write is a promise.
"""

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from blake3 import blake3

from kv_store.bench.contest import MEMCPY, Move, MoveResult, contest
from kv_store.bench.slot_memory import SlotMemory
from kv_store.disk.segment import segment_bytes
from kv_store.disk.segment_files import read_all, write_all
from kv_store.disk.tier import DiskTier
from kv_store.tiers import BlockCopier, BlockMemory
from protocol.checksum import checksum
from protocol.errors import ConfigError
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, chain

_ROOT = BlockHash(bytes(16))
_FINGERPRINT = blake3(b"headrace-bench-moves").hexdigest(length=16)
_TIER_ROUNDS = 4
"""Rounds whose blocks the measured tier holds: those before are evicted, as in a tier that has run for a while."""


def measure_host_copy(
    make_copier: Callable[[BlockMemory, BlockMemory], BlockCopier], block_bytes: int, num_blocks: int, num_rounds: int
) -> tuple[MoveResult, ...]:
    """`make_copier(cache, slots)`, for a cache that is in host memory: blocks in an order that means nothing, beside one
    memcpy of as many bytes."""
    cache, slots = SlotMemory(num_blocks, block_bytes), SlotMemory(num_blocks, block_bytes)
    copier = make_copier(cache, slots)
    block_ids = list(range(num_blocks))
    scattered = random.Random(0).sample(block_ids, num_blocks)  # noqa: S311  # an order, not a secret
    moves = [
        Move(MEMCPY, lambda _round: _memcpy(slots, cache)),
        Move("cache to slots", lambda _round: copier.copy_out(scattered, block_ids)),
        Move("slots to cache", lambda _round: copier.copy_in(block_ids, scattered)),
    ]
    return contest(moves, num_blocks * block_bytes, num_rounds)


def measure_disk(folder: Path, block_bytes: int, num_blocks: int, num_rounds: int) -> tuple[MoveResult, ...]:
    """In a folder of its own below `folder`, deleted afterwards: a disk tier beside one plain file that is written and read in one
    call, in the way (O_DIRECT or not) that the tier has chosen.

    Raises ConfigError where there is no room.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=folder) as below:
        size_bytes = _TIER_ROUNDS * num_blocks * segment_bytes(1, block_bytes)
        with contextlib.closing(DiskTier(Path(below) / "tier", _FINGERPRINT, block_bytes, size_bytes)) as tier:
            if tier.capacity_bytes < size_bytes:
                raise ConfigError(f"measuring the disk takes {size_bytes >> 20} MiB in {folder}, which has not so many")
            moves = [
                *_plain_moves(Path(below) / "plain", tier, num_blocks),
                *_tier_moves(Path(below), tier, num_blocks),
            ]
            return contest(moves, num_blocks * block_bytes, num_rounds)


def _plain_moves(path: Path, tier: DiskTier, num_blocks: int) -> list[Move]:
    source, target = SlotMemory(num_blocks, tier.block_bytes), SlotMemory(num_blocks, tier.block_bytes)

    def write(_round: int) -> None:
        with _opened(path, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if tier.io.direct_writes else 0)) as fd:
            write_all(fd, [source.memory], 0)

    def read(_round: int) -> None:
        with _opened(path, os.O_RDONLY | (os.O_DIRECT if tier.io.direct_reads else 0)) as fd:
            read_all(fd, [target.memory], 0)

    return [
        Move(MEMCPY, lambda _round: _memcpy(target, source)),
        Move("plain write", write, prepare=lambda _round: path.unlink(missing_ok=True)),
        Move("plain read", read, prepare=lambda _round: _leave_page_cache(path)),
    ]


def _tier_moves(folder: Path, tier: DiskTier, num_blocks: int) -> list[Move]:
    source, target = SlotMemory(num_blocks, tier.block_bytes), SlotMemory(num_blocks, tier.block_bytes)
    data, into = source.blocks(), target.blocks()
    checksums = [checksum(view) for view in data]

    def write(round_number: int) -> None:
        if tier.write(_blocks(round_number, num_blocks), data, checksums) != num_blocks:
            raise ConfigError(
                f"the disk tier in {folder} could not keep what was written: {tier.stats().write_failures}"
            )

    def read(round_number: int) -> None:
        hashes = [BlockHash(block.block_hash) for block in _blocks(round_number, num_blocks)]
        if tier.read(hashes, into) != num_blocks:
            raise ConfigError(
                f"the disk tier in {folder} could not read what was written: {tier.stats().read_failures}"
            )

    def forget_pages(_round: int) -> None:
        for path in folder.rglob("*.blocks"):
            _leave_page_cache(path)

    return [
        Move("slots to disk", write, reference="plain write"),
        Move("disk to slots", read, prepare=forget_pages, reference="plain read"),
    ]


def _blocks(round_number: int, count: int) -> list[CachedBlock]:
    names = (f"{round_number}/{index}" for index in range(count))
    return chain(_ROOT, [BlockHash(blake3(name.encode()).digest(length=16)) for name in names])


def _memcpy(target: SlotMemory, source: SlotMemory) -> None:
    np.copyto(np.frombuffer(target.memory, np.uint8), np.frombuffer(source.memory, np.uint8))


def _leave_page_cache(path: Path) -> None:
    with _opened(path, os.O_RDONLY) as fd:
        os.fdatasync(fd)  # only what is on the disk can leave
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
