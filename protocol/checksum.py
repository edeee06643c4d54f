"""Checksums of KV blocks: the low 63 bits of xxh3-64, as protocol.transfer.Checksum carries them.

One core does 9 GB/s from memory, and xxhash lets go of the GIL while it reads.
"""

from collections.abc import Sequence

import xxhash

_LOW_63_BITS = (1 << 63) - 1


def checksum(data: bytes | memoryview) -> int:
    return int(xxhash.xxh3_64_intdigest(data)) & _LOW_63_BITS


def num_right(expected: Sequence[int], found: Sequence[int]) -> int:
    """How many leading checksums are what was expected. Raises ValueError for lists of different lengths."""
    pairs = list(zip(expected, found, strict=True))
    return next((index for index, (theirs, ours) in enumerate(pairs) if theirs != ours), len(pairs))
