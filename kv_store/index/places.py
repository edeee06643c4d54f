"""Places: the value of an index entry, packed. Little-endian, VERSION and then up to MAX_PLACES places:

    offset size            offset size
     0      1  VERSION      0      4  life of the owner
     1    27*n places       4      1  kind: 1 host, 2 disk (the slower, where it is some of each)
                            5      4  number of the first block's slot or place, for people
                            9      2  number of blocks
                           11      8  checksum over the blocks' checksums
                           19      4  number of tokens
                           23      4  when it was published: the server's clock, seconds since 1970

There is no state for bytes that are still being written: what is not committed is not published. Anybody with access to the
server can write anything here, so a value that is not exactly of this form holds no places.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kv_store.tiers import Tier
from protocol.checksum import checksum

VERSION = 1
MAX_PLACES = 8
_PUBLISHED = struct.Struct("<IBIHQI")
PLACE_BYTES = _PUBLISHED.size + 4
MAX_VALUE_BYTES = 1 + MAX_PLACES * PLACE_BYTES
_PLACE = struct.Struct("<IBIHQII")
_HEAD = struct.Struct("<IB")
_KINDS: dict[Tier, int] = {"host": 1, "disk": 2}
_TIERS: dict[int, Tier] = {kind: tier for tier, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is published of consecutive blocks that an owner holds, all of them."""

    tier: Tier
    first: int
    num_blocks: int
    checksum: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Place:
    """A chunk of one owner's, as read from the index: a claim, to be confirmed by the owner."""

    life: int
    chunk: Chunk
    created: int


def checksum_of(checksums: Sequence[int]) -> int:
    """Of a chunk, from those of its blocks."""
    return checksum(struct.pack(f"<{len(checksums)}Q", *checksums))


def pack(life: int, chunk: Chunk) -> bytes:
    """A place without its time, which the server adds."""
    kind, first = _KINDS[chunk.tier], chunk.first & 0xFFFFFFFF
    return _PUBLISHED.pack(life, kind, first, chunk.num_blocks, chunk.checksum, chunk.num_tokens)


def unpack(value: bytes) -> tuple[Place, ...] | None:
    """The places of an entry; None where it is not of the form above."""
    num_places, rest = divmod(len(value) - 1, PLACE_BYTES)
    if rest or not 1 <= num_places <= MAX_PLACES or value[0] != VERSION:
        return None
    places = tuple(_places(value))
    return places if len(places) == num_places else None


def lives(value: bytes) -> tuple[tuple[int, int], ...] | None:
    """(life, kind) of each place, for lookups, which need no more. None where the value is not of the form above."""
    num_places, rest = divmod(len(value) - 1, PLACE_BYTES)
    if rest or not 1 <= num_places <= MAX_PLACES or value[0] != VERSION:
        return None
    return tuple(_HEAD.unpack_from(value, 1 + PLACE_BYTES * index) for index in range(num_places))


def _places(value: bytes) -> Iterator[Place]:
    for life, kind, first, num_blocks, digest, num_tokens, created in _PLACE.iter_unpack(value[1:]):
        if kind in _TIERS:
            yield Place(life, Chunk(_TIERS[kind], first, num_blocks, digest, num_tokens), created)
