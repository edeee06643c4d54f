"""The seams of a store: where bytes come from and go to, and who hears what is kept.

    device ──copy_out──▶ host slots ──▶ disk        who hears of it: TierListener
    device ◀──copy_in─── host slots ◀── disk

A store never touches an engine or a transport. Both meet it through these protocols, put together by the nodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock

Tier = Literal["host", "disk"]

OnLoaded = Callable[[int], None]
"""`on_loaded(num_blocks)`: so many further blocks of a chain are on the device, verified."""


class BlockMemory(Protocol):
    """A region of host memory that consists of blocks, contiguous, all of one size. kv_transfer's HostArena is one."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def block(self, block_id: int) -> memoryview:
        """One block's bytes, zero-copy and writable. Raises IndexError outside of the region."""
        ...


class BlockCopier(Protocol):
    """Moves blocks between the engine's KV cache and the slots of a host tier. Blocking; the store calls it from one thread
    of its own, never from the event loop or the engine. Nothing is copied any more when a call returns or raises."""

    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        """Block `block_ids[i]` of the cache to slot `slots[i]`."""
        ...

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        """Slot `slots[i]` to block `block_ids[i]` of the cache."""
        ...


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block that a tier holds, committed. `checksum` as in protocol.transfer.Checksum; `place`: the slot, or a number that
    the disk tier understands."""

    block: CachedBlock
    tier: Tier
    place: int
    checksum: int


class DiskFigures(Protocol):
    @property
    def num_blocks(self) -> int: ...

    @property
    def capacity_bytes(self) -> int: ...


class BlockDisk(Protocol):
    """A disk tier, as a store uses it: blocking and thread-safe, read and written from threads of the store's own. Questions
    (`in`, `find`) are answered from memory, from any thread. It evicts on its own and tells itself who hears of that.
    Nothing here raises because a disk is full or broken."""

    def write(self, blocks: Sequence[CachedBlock], data: Sequence[memoryview], checksums: Sequence[int]) -> int:
        """How many of them it holds now. Nothing of `data` is read any more when it returns."""
        ...

    def read(self, block_hashes: Sequence[BlockHash], into: Sequence[memoryview]) -> int:
        """How many leading blocks have been read and are right. Nothing is written any more when it returns or raises."""
        ...

    def find(self, block_hashes: Sequence[BlockHash]) -> list[StoredBlock]:
        """The leading blocks that it holds."""
        ...

    def __contains__(self, block_hash: bytes) -> bool: ...

    def stored(self) -> list[StoredBlock]:
        """All blocks."""
        ...

    def forget(self, block_hashes: Sequence[BlockHash]) -> None: ...

    def stats(self) -> DiskFigures: ...

    def close(self) -> None: ...


class TierListener(Protocol):
    """Hears what a store has, after the fact and in order: bytes are committed before `stored`, and may be gone after
    `removed`. Called from any thread; must neither block nor raise."""

    def stored(self, blocks: Sequence[StoredBlock]) -> None: ...

    def removed(self, blocks: Sequence[StoredBlock]) -> None: ...
