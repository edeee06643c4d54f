"""The format of a segment: one file of blocks, written once, of which only forgotten entries are ever changed.

    | header: prefix, num_blocks entries, zeros up to a whole page | block 0 | block 1 | ... |

    prefix   magic 16 | checksum 8 | segment's number 8 | block_bytes 8 | num_blocks 8 | layout fingerprint 32
    entry    address 16 | parent 16 | position 4 | tenant 16, padded with zeros | checksum of the block 8

All numbers are little-endian. The header's checksum (protocol.checksum) covers all of the header that follows it. An entry of
zeros is a block that was forgotten. Blocks lie one after the other, so an entry's number says where its bytes are, and no
offset has to be believed; blocks of whole pages start at whole pages, as O_DIRECT wants it.

A checksum finds damage, not malice: who can write this folder can put any bytes under any address.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from protocol.checksum import checksum
from protocol.errors import MalformedMessage
from protocol.kv_blocks import CachedBlock, Tenant

PAGE_BYTES = 4096
MAX_SEGMENT_BLOCKS = 256
MAX_SEGMENT_BYTES = 64 << 20
"""Of the blocks of one segment, unless a single one is larger. Large enough that a file's overhead (a header page, a rename, an
open: 0.1 ms here) disappears beside its bytes (40 ms), and that a terabyte is 16,000 headers to read at start; small enough
that what is evicted at once is a hundredth of the smallest tier worth having."""

MAX_SEGMENTS = 1 << 48
"""Numbers are below this: with one more every millisecond that lasts for 8,900 years, and a place of a block fits into 64 bits."""

_MAGIC = b"headrace-blocks1"
_PREFIX = struct.Struct("<16sQQQQ32s")
_ENTRY = struct.Struct("<16s16sI16sQ")
_CHECKSUM = struct.Struct("<Q")
_CHECKED_FROM = len(_MAGIC) + _CHECKSUM.size
_MAX_POSITION = 1 << 24
_MAX_CHECKSUM = (1 << 63) - 1
_TENANT = re.compile(rb"([0-9a-z]{1,16})\x00*")
_FORGOTTEN = bytes(_ENTRY.size)
_NOBODY = bytes(16)


def header_bytes(num_blocks: int) -> int:
    """Of a segment of so many blocks: whole pages."""
    return -(-(_PREFIX.size + num_blocks * _ENTRY.size) // PAGE_BYTES) * PAGE_BYTES


def segment_bytes(num_blocks: int, block_bytes: int) -> int:
    """The size of the file."""
    return header_bytes(num_blocks) + num_blocks * block_bytes


MAX_HEADER_BYTES = header_bytes(MAX_SEGMENT_BLOCKS)


@dataclass(frozen=True, slots=True)
class SegmentIdentity:
    """What a header must agree with: `number` is that of the file's name, `fingerprint` 32 hex digits."""

    number: int
    fingerprint: str
    block_bytes: int


@dataclass(slots=True)
class Segment:
    """A segment as the tier knows it. `blocks[i]` is None once it is forgotten; `used_at`: when it was last read or
    written, on the tier's clock; `marked_at`: when the file's own time last said so;
    `being_deleted`: whoever cannot open the file knows why."""

    number: int
    blocks: list[CachedBlock | None]
    checksums: Sequence[int]
    file_bytes: int
    used_at: float
    marked_at: float = 0.0
    being_deleted: bool = False
    num_live: int = field(init=False)
    tenant: str | None = field(init=False)
    """Of its first live block, and of all that this tier has written."""
    first_position: int = field(init=False)
    """Of the blocks that were live at first, the place nearest to the start of its chain."""

    def __post_init__(self) -> None:
        live = [block for block in self.blocks if block is not None]
        self.num_live = len(live)
        self.tenant = live[0].tenant if live else None
        self.first_position = min((block.position for block in live), default=0)


def encode_header(identity: SegmentIdentity, blocks: Sequence[CachedBlock | None], checksums: Sequence[int]) -> bytes:
    """Whole pages."""
    entries = b"".join(
        _FORGOTTEN
        if block is None
        else _ENTRY.pack(block.block_hash, block.parent, block.position, block.tenant.encode(), block_checksum)
        for block, block_checksum in zip(blocks, checksums, strict=True)
    )
    prefix = _PREFIX.pack(_MAGIC, 0, identity.number, identity.block_bytes, len(blocks), identity.fingerprint.encode())
    unsigned = (prefix + entries).ljust(header_bytes(len(blocks)), b"\x00")
    return _MAGIC + _CHECKSUM.pack(checksum(unsigned[_CHECKED_FROM:])) + unsigned[_CHECKED_FROM:]


def decode_header(
    start: bytes, file_bytes: int, identity: SegmentIdentity
) -> tuple[list[CachedBlock | None], list[int]]:
    """Blocks and their checksums, from the first bytes of a file of that size (MAX_HEADER_BYTES of them, or all it has).

    Raises MalformedMessage, which says what is wrong, for anything but that segment, whole.
    """
    if len(start) < _PREFIX.size:
        raise MalformedMessage(f"{file_bytes} bytes are less than a header")
    magic, header_checksum, number, block_bytes, num_blocks, fingerprint = _PREFIX.unpack_from(start)
    if magic != _MAGIC:
        raise MalformedMessage("it does not begin like a segment")
    if not 1 <= num_blocks <= MAX_SEGMENT_BLOCKS:
        raise MalformedMessage(f"{num_blocks} blocks in one segment")
    size = header_bytes(num_blocks)
    if len(start) < size or checksum(start[_CHECKED_FROM:size]) != header_checksum:
        raise MalformedMessage("its header is damaged")
    if (block_bytes, fingerprint) != (identity.block_bytes, identity.fingerprint.encode()):
        raise MalformedMessage("it is of another layout")
    if number != identity.number:
        raise MalformedMessage(f"it was written as segment {number:x}")
    if file_bytes != segment_bytes(num_blocks, block_bytes):
        raise MalformedMessage(f"{file_bytes} bytes instead of {segment_bytes(num_blocks, block_bytes)}")
    return _decode_entries(start[_PREFIX.size : _PREFIX.size + num_blocks * _ENTRY.size])


def _decode_entries(entries: bytes) -> tuple[list[CachedBlock | None], list[int]]:
    blocks: list[CachedBlock | None] = []
    checksums: list[int] = []
    before = b""
    tenants: dict[bytes, Tenant] = {}  # one string for all blocks of a tenant: a store keeps millions of them
    for address, parent, position, tenant_bytes, block_checksum in _ENTRY.iter_unpack(entries):
        checksums.append(block_checksum)
        if tenant_bytes == _NOBODY:
            blocks.append(None)
            continue
        tenant = tenants.get(tenant_bytes)
        if tenant is None:
            text = _TENANT.fullmatch(tenant_bytes)
            if text is None:
                raise MalformedMessage("a tenant's name that is none")
            tenant = tenants[tenant_bytes] = Tenant(text[1].decode())
        if position > _MAX_POSITION or block_checksum > _MAX_CHECKSUM:
            raise MalformedMessage("an entry out of bounds")
        if parent == before:
            parent = before  # the same object: half of the memory that addresses take
        blocks.append(CachedBlock(address, parent, position, tenant))
        before = address
    addresses = [block.block_hash for block in blocks if block is not None]
    if len(set(addresses)) != len(addresses):
        raise MalformedMessage("a block twice in one segment")
    return blocks, checksums
