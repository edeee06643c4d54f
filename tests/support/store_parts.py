"""What a store is put together from in tests: an LRU policy, memory, a device, and a disk that can fail, be slow and lie.

TailsFirst     evicts the oldest, of blocks of one age the one that stands last in its chain
PlainMemory    blocks in one bytearray
FakeDisk       a BlockDisk that keeps what it is given, as far as it is told to behave
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from kv_store.tiers import StoredBlock
from protocol.checksum import checksum
from protocol.ids import BlockHash
from protocol.kv_blocks import NO_TENANT, CachedBlock, Tenant, chain

BLOCK_BYTES = 64


def blocks_of(name: str, count: int, tenant: Tenant = NO_TENANT, first: int = 0) -> list[CachedBlock]:
    """Blocks `first`, ... of a chain; two chains of different names or tenants share nothing."""
    seed = f"{tenant}/{name}"
    hashes = [BlockHash(blake3(f"{seed}/{i}".encode()).digest(length=16)) for i in range(first, first + count)]
    root = BlockHash(blake3(f"{seed}/{first - 1}".encode()).digest(length=16))
    return chain(root, hashes, tenant, first)


def hashes_of(blocks: Sequence[CachedBlock]) -> list[BlockHash]:
    return [BlockHash(block.block_hash) for block in blocks]


def bytes_of(block: CachedBlock, block_bytes: int = BLOCK_BYTES) -> bytes:
    """The KV of a block: anybody can work it out."""
    return blake3(block.block_hash).digest(length=block_bytes)


class TailsFirst:
    def __init__(self) -> None:
        self._blocks: dict[bytes, tuple[int, int]] = {}
        self._num_calls = 0

    def wanted(self, blocks: Sequence[CachedBlock], num_held: int, now: float) -> Iterator[None]:
        self._num_calls += 1
        for block in blocks[:num_held]:
            self._blocks[block.block_hash] = (self._num_calls, -block.position)
        yield

    def added(self, blocks: Sequence[CachedBlock], now: float) -> None:
        self._num_calls += 1
        for block in blocks:
            assert block.block_hash not in self._blocks, "added twice"
            self._blocks[block.block_hash] = (self._num_calls, -block.position)

    def removed(self, block_hashes: Sequence[BlockHash]) -> None:
        for block_hash in block_hashes:
            del self._blocks[block_hash]

    def victims(self, count: int, now: float, may_evict: Callable[[BlockHash], bool]) -> list[BlockHash]:
        order = sorted(self._blocks, key=lambda key: self._blocks[key])
        return [BlockHash(key) for key in order if may_evict(BlockHash(key))][:count]


class PlainMemory:
    def __init__(self, num_blocks: int, block_bytes: int = BLOCK_BYTES) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self._bytes = memoryview(bytearray(num_blocks * block_bytes))

    def block(self, block_id: int) -> memoryview:
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is not in a memory of {self.num_blocks} blocks")
        return self._bytes[block_id * self.block_bytes : (block_id + 1) * self.block_bytes]

    def fill(self, block_ids: Sequence[int], blocks: Sequence[CachedBlock]) -> None:
        for block_id, block in zip(block_ids, blocks, strict=True):
            self.block(block_id)[:] = bytes_of(block, self.block_bytes)

    def right(self, block_ids: Sequence[int], blocks: Sequence[CachedBlock]) -> bool:
        pairs = zip(block_ids, blocks, strict=True)
        return all(self.block(block_id) == bytes_of(block, self.block_bytes) for block_id, block in pairs)


@dataclass
class FakeDisk:
    """`failing`: every call that moves bytes raises. `keeps`: how many blocks of a write are kept. `reads`: how many a read
    brings at most. `gate`: while it is not set, whoever reads or writes waits."""

    failing: bool = False
    keeps: int = 1 << 20
    reads: int = 1 << 20
    gate: threading.Event = field(default_factory=threading.Event)
    num_reads: dict[bytes, int] = field(default_factory=dict)
    num_writes: dict[bytes, int] = field(default_factory=dict)
    closed: bool = False

    def __post_init__(self) -> None:
        self.gate.set()
        self._kept: dict[bytes, tuple[CachedBlock, bytearray, int]] = {}
        self._lock = threading.Lock()

    def write(self, blocks: Sequence[CachedBlock], data: Sequence[memoryview], checksums: Sequence[int]) -> int:
        self.gate.wait()
        if self.failing:
            raise OSError("no space left on this disk")
        with self._lock:
            for block, view, value in list(zip(blocks, data, checksums, strict=True))[: self.keeps]:
                assert checksum(view) == value, "a block is demoted that is not what was stored"
                self._kept[block.block_hash] = (block, bytearray(view), value)
                self.num_writes[block.block_hash] = self.num_writes.get(block.block_hash, 0) + 1
        return min(len(blocks), self.keeps)

    def read(self, block_hashes: Sequence[BlockHash], into: Sequence[memoryview]) -> int:
        self.gate.wait()
        if self.failing:
            raise OSError("input/output error")
        with self._lock:
            for index, (block_hash, view) in enumerate(zip(block_hashes, into, strict=True)):
                self.num_reads[block_hash] = self.num_reads.get(block_hash, 0) + 1
                kept = self._kept.get(block_hash)
                if kept is None or index >= self.reads or checksum(memoryview(kept[1])) != kept[2]:
                    self._kept.pop(block_hash, None)
                    return index
                view[:] = kept[1]
        return len(block_hashes)

    def flip(self, block_hash: bytes) -> None:
        self._kept[block_hash][1][0] ^= 1

    def find(self, block_hashes: Sequence[BlockHash]) -> list[StoredBlock]:
        with self._lock:
            kept = [self._kept[key] for key in block_hashes[: self._num_held(block_hashes)]]
        return [StoredBlock(block, "disk", 0, value) for block, _, value in kept]

    def _num_held(self, block_hashes: Sequence[BlockHash]) -> int:
        return next((i for i, key in enumerate(block_hashes) if key not in self._kept), len(block_hashes))

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._kept

    @property
    def num_blocks(self) -> int:
        return len(self._kept)

    @property
    def capacity_bytes(self) -> int:
        return 1 << 30

    def stats(self) -> "FakeDisk":
        return self

    def stored(self) -> list[StoredBlock]:
        with self._lock:
            return [StoredBlock(block, "disk", 0, value) for block, _, value in self._kept.values()]

    def forget(self, block_hashes: Sequence[BlockHash]) -> None:
        with self._lock:
            for block_hash in block_hashes:
                self._kept.pop(block_hash, None)

    def close(self) -> None:
        self.closed = True
