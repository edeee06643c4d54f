"""Scratch: the blocks of an arena that hold nothing of anybody's, and how a probe sees that bytes have moved.

    | KV blocks ... | samples: written once, at the start, and copied by probes | landing blocks: where our probes end |
                      ^ num_blocks                                                ^ num_blocks + num_scratch_blocks // 2

A transport that claims success without moving a byte would be the fastest of all. So landing blocks are cleared before
a probe, and must hold the other side's samples after it. What a sample holds follows from its number and a seed that
its owner tells with its Introduction.

Only this process's own probes end in its landing blocks, one at a time. Those of a probe that was given up are kept
back until no more bytes can land in them: they would raise a false alarm.
"""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import xxhash

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.device_arena import Arena
from kv_transfer.transport import TransferAbandoned

SEED_BYTES = 16
_DIGEST_BYTES = 32


def sample_ids(num_blocks: int, num_scratch_blocks: int) -> range:
    """The samples of an arena with so many blocks."""
    return range(num_blocks, num_blocks + num_scratch_blocks // 2)


def sample(seed: bytes, index: int, num_bytes: int) -> bytes:
    """What sample number `index` holds: one digest, repeated."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), key=seed, digest_size=_DIGEST_BYTES).digest()
    return (digest * (num_bytes // _DIGEST_BYTES + 1))[:num_bytes]


class Scratch:
    """One per process. Where the arena is in device memory nothing can be written or looked at from here: `seed` is then
    empty and probes only measure. Event loop only."""

    def __init__(self, arena: Arena) -> None:
        self.block_bytes = arena.block_bytes
        self.samples = sample_ids(arena.num_blocks, arena.num_scratch_blocks)
        self._arena = arena if isinstance(arena, HostArena) else None
        self._free = list(range(self.samples.stop, arena.num_wire_blocks))
        self._kept_back: list[tuple[asyncio.Event, list[int]]] = []
        self._turn = asyncio.Lock()
        self.seed = b""
        if self._arena is not None:
            self.seed = secrets.token_bytes(SEED_BYTES)
            for index, block_id in enumerate(self.samples):
                self._arena.block(block_id)[:] = sample(self.seed, index, self.block_bytes)

    @property
    def num_kept_back(self) -> int:
        """Landing blocks in which bytes of probes that were given up may still land."""
        self._settle()
        return sum(len(block_ids) for _, block_ids in self._kept_back)

    @asynccontextmanager
    async def landing(self, max_blocks: int) -> AsyncIterator[tuple[int, ...]]:
        """Cleared blocks for one probe; waits for the one before. At most half of what there is, so that a probe that gets
        stuck does not end all probing; none, where all are kept back.

        If TransferAbandoned passes through here the blocks are kept back until it has settled.
        """
        async with self._turn:
            self._settle()
            count = min(max_blocks, (len(self._free) + 1) // 2)
            taken, self._free = self._free[:count], self._free[count:]
            try:
                await asyncio.to_thread(self._clear, taken)
                yield tuple(taken)
            except TransferAbandoned as error:
                self._kept_back.append((error.settled, taken))
                raise
            except BaseException:
                self._free += taken
                raise
            self._free += taken

    async def holds(self, block_ids: Sequence[int], seed: bytes) -> bool:
        """Whether these landing blocks hold the first samples of an arena with this seed. True where that cannot be
        known."""
        return await asyncio.to_thread(self._holds, block_ids, seed)

    def _holds(self, block_ids: Sequence[int], seed: bytes) -> bool:
        if self._arena is None or not seed:
            return True
        for index, block_id in enumerate(block_ids):
            expected = sample(seed, index, self.block_bytes)
            if xxhash.xxh3_64_intdigest(self._arena.block(block_id)) != xxhash.xxh3_64_intdigest(expected):
                return False
        return True

    def _clear(self, block_ids: Sequence[int]) -> None:
        if self._arena is not None:
            for block_id in block_ids:
                self._arena.block(block_id)[:] = bytes(self.block_bytes)

    def _settle(self) -> None:
        self._free += [block_id for settled, kept in self._kept_back if settled.is_set() for block_id in kept]
        self._kept_back = [(settled, kept) for settled, kept in self._kept_back if not settled.is_set()]
