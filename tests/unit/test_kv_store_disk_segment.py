"""A segment's header: what is written is what is read, and nothing else is believed."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store.disk.segment import (
    MAX_HEADER_BYTES,
    MAX_SEGMENT_BLOCKS,
    PAGE_BYTES,
    SegmentIdentity,
    decode_header,
    encode_header,
    header_bytes,
    segment_bytes,
)
from protocol.checksum import checksum
from protocol.errors import MalformedMessage
from protocol.kv_blocks import CachedBlock
from tests.support.disk_blocks import FINGERPRINT, some_blocks

BLOCK_BYTES = 8192
IDENTITY = SegmentIdentity(7, FINGERPRINT, BLOCK_BYTES)

tenants = st.text("0123456789abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=16)
some_bytes = st.binary(min_size=16, max_size=16)
entries = st.tuples(
    st.builds(CachedBlock, some_bytes, some_bytes, st.integers(0, 1 << 24), tenants) | st.none(),
    st.integers(0, (1 << 63) - 1),
)


def _file_bytes(num_blocks: int) -> int:
    return segment_bytes(num_blocks, BLOCK_BYTES)


@given(
    st.lists(entries, min_size=1, max_size=80, unique_by=lambda entry: entry[0].block_hash if entry[0] else entry[1])
)
def test_what_is_written_is_read(entries: list[tuple[CachedBlock | None, int]]) -> None:
    blocks = [block for block, _ in entries]
    checksums = [block_checksum if block else 0 for block, block_checksum in entries]
    header = encode_header(IDENTITY, blocks, checksums)
    assert len(header) == header_bytes(len(blocks))
    assert decode_header(header + b"payload", _file_bytes(len(blocks)), IDENTITY) == (blocks, checksums)


@given(st.binary(max_size=2 * MAX_HEADER_BYTES), st.integers(0, 1 << 40))
def test_garbage_is_refused(start: bytes, file_bytes: int) -> None:
    with pytest.raises(MalformedMessage):
        decode_header(start, file_bytes, IDENTITY)


@given(st.data())
def test_every_flipped_bit_is_seen(data: st.DataObject) -> None:
    blocks = some_blocks(3)
    header = bytearray(encode_header(IDENTITY, blocks, [1, 2, 3]))
    header[data.draw(st.integers(0, len(header) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(MalformedMessage):
        decode_header(bytes(header), _file_bytes(3), IDENTITY)


@pytest.mark.parametrize(
    "identity",
    [
        SegmentIdentity(8, FINGERPRINT, BLOCK_BYTES),
        SegmentIdentity(7, "f" * 32, BLOCK_BYTES),
        SegmentIdentity(7, FINGERPRINT, BLOCK_BYTES // 2),
    ],
)
def test_a_header_of_another_segment_is_refused(identity: SegmentIdentity) -> None:
    header = encode_header(identity, some_blocks(1), [1])
    with pytest.raises(MalformedMessage):
        decode_header(header, _file_bytes(1), IDENTITY)


@pytest.mark.parametrize("difference", [-BLOCK_BYTES, -1, 1, BLOCK_BYTES])
def test_a_file_of_another_size_is_refused(difference: int) -> None:
    header = encode_header(IDENTITY, some_blocks(2), [1, 2])
    with pytest.raises(MalformedMessage, match="instead of"):
        decode_header(header, _file_bytes(2) + difference, IDENTITY)


def test_a_block_twice_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="twice"):
        decode_header(encode_header(IDENTITY, some_blocks(1) * 2, [1, 1]), _file_bytes(2), IDENTITY)


@pytest.mark.parametrize("num_blocks", [0, MAX_SEGMENT_BLOCKS + 1, 1 << 63])
def test_a_signed_header_with_an_absurd_count_is_refused(num_blocks: int) -> None:
    header = bytearray(encode_header(IDENTITY, some_blocks(1), [1]))
    header[40:48] = struct.pack("<Q", num_blocks)
    header[16:24] = struct.pack("<Q", checksum(bytes(header[24:])))
    with pytest.raises(MalformedMessage, match="blocks in one segment"):
        decode_header(bytes(header), 1 << 62, IDENTITY)


def test_blocks_of_whole_pages_start_at_whole_pages() -> None:
    for num_blocks in (1, 2, 255, MAX_SEGMENT_BLOCKS):
        assert header_bytes(num_blocks) % PAGE_BYTES == 0
    assert header_bytes(MAX_SEGMENT_BLOCKS) == MAX_HEADER_BYTES


def test_the_bytes_of_a_header_do_not_change() -> None:
    header = encode_header(IDENTITY, [*some_blocks(1), None], [5, 6])
    assert checksum(header) == GOLDEN


GOLDEN = 8102674619065535435
"""Files of an earlier version must be read, or get another magic."""
