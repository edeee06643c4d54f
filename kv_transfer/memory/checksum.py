"""Checksums of KV blocks: the low 63 bits of xxh3-64, as protocol.transfer.Checksum defines them.

One core does 9 GB/s from memory, and xxhash lets go of the GIL while it reads. What is much belongs on a worker thread;
of what is little, the way there costs more than the reading (kv_transfer.memory.staging says how much that is).
"""

from collections.abc import Iterable, Sequence

import xxhash

from kv_transfer.memory.arena import HostArena

_LOW_63_BITS = (1 << 63) - 1


def checksum(data: bytes | memoryview) -> int:
    return int(xxhash.xxh3_64_intdigest(data)) & _LOW_63_BITS


def checksums(arena: HostArena, block_ids: Iterable[int]) -> tuple[int, ...]:
    """One checksum per block, in order. Raises IndexError for an id outside of the arena."""
    return tuple(checksum(arena.block(block_id)) for block_id in block_ids)


def verify(arena: HostArena, block_ids: Sequence[int], expected: Sequence[int]) -> int:
    """How many of the leading blocks hold what is expected: all, or the index of the first that does not. Blocking.

    Raises IndexError for an id outside of the arena and ValueError for lists of different lengths.
    """
    if len(block_ids) != len(expected):
        raise ValueError(f"{len(expected)} checksums for {len(block_ids)} blocks")
    return num_right(expected, checksums(arena, block_ids))


def num_right(expected: Sequence[int], found: Sequence[int]) -> int:
    """How many leading checksums are what was expected. Raises ValueError for lists of different lengths."""
    pairs = list(zip(expected, found, strict=True))
    return next((index for index, (theirs, ours) in enumerate(pairs) if theirs != ours), len(pairs))
