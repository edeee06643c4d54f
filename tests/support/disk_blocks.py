"""Blocks for tests of the disk tier: their bytes follow from their address, so that whoever reads one knows what it must be."""

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from kv_store.disk.tier import DiskTier
from protocol.checksum import checksum
from protocol.ids import BlockHash
from protocol.kv_blocks import NO_TENANT, CachedBlock, Tenant, chain

FINGERPRINT = "0123456789abcdef" * 2
ROOT = BlockHash(b"root of a chain!")


def content(block_hash: bytes, block_bytes: int) -> bytes:
    return blake3(block_hash).digest(length=block_bytes)


def address(seed: int) -> BlockHash:
    return BlockHash(blake3(seed.to_bytes(8, "little")).digest(length=16))


def some_blocks(count: int, seed: int = 0, tenant: Tenant = NO_TENANT) -> list[CachedBlock]:
    """A chain of its own for each seed."""
    return chain(ROOT, [address(seed * 1000 + index) for index in range(count)], tenant)


def hashes(blocks: Sequence[CachedBlock]) -> list[BlockHash]:
    return [BlockHash(block.block_hash) for block in blocks]


class Slots:
    """Page-aligned memory for blocks, like a host tier's: one after the other."""

    def __init__(self, count: int, block_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(1, count * block_bytes))
        memory = memoryview(self._map)
        self.views = [memory[index * block_bytes : (index + 1) * block_bytes] for index in range(count)]

    def __getitem__(self, index: int) -> bytes:
        return bytes(self.views[index])


def slots_of(blocks: Sequence[CachedBlock], block_bytes: int) -> Slots:
    slots = Slots(len(blocks), block_bytes)
    for view, block in zip(slots.views, blocks, strict=True):
        view[:] = content(block.block_hash, block_bytes)
    return slots


def put(tier: DiskTier, blocks: Sequence[CachedBlock]) -> int:
    slots = slots_of(blocks, tier.block_bytes)
    return tier.write(blocks, slots.views, [checksum(view) for view in slots.views])


def served(tier: DiskTier, blocks: Sequence[CachedBlock]) -> int:
    """How many leading blocks the tier serves; fails if one is not what was written."""
    slots = Slots(len(blocks), tier.block_bytes)
    num_read = tier.read(hashes(blocks), slots.views)
    for index in range(num_read):
        assert slots[index] == content(blocks[index].block_hash, tier.block_bytes)
    return num_read


@contextmanager
def open_tier(
    path: Path, block_bytes: int = 4096, size_bytes: int = 64 << 20, fingerprint: str = FINGERPRINT
) -> Iterator[DiskTier]:
    tier = DiskTier(path, fingerprint, block_bytes, size_bytes)
    try:
        yield tier
    finally:
        tier.close()


def files_in(path: Path, fingerprint: str = FINGERPRINT) -> list[Path]:
    return sorted((path / fingerprint).iterdir())


def flip(path: Path, offset: int) -> None:
    """One bit of a file."""
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ 1]), offset)
    finally:
        os.close(fd)
