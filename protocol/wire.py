"""Encoding of messages, their size limits, and the two-phase compatibility check.

Bodies are msgpack of the structs in this package, decoded and validated in one place, at the edge. Phase one of a
meeting is a Hello that every version can read (it only ever gains optional fields); nothing else is decoded before
`check_wire_version` has accepted it. The wire version is its own number, not the package's, so that a rolling upgrade
between two releases with the same wire keeps working.

A stream carries frames: a 4-byte little-endian length, then that many bytes of body.
"""

import struct
from functools import cache
from types import UnionType
from typing import Any, TypeVar, overload

import msgspec

from protocol.errors import MalformedMessage, MessageTooLarge, WireVersionMismatch

WIRE_VERSION = 2
"""Raised when a message changes its meaning. Adding an optional field does not raise it."""

SUPPORTED_WIRE_VERSIONS = frozenset({WIRE_VERSION})

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Upper limit of any control message: a prompt of a million tokens fits."""

MAX_FRAME_BYTES = 8 * 1024 * 1024

_LENGTH = struct.Struct("<I")
FRAME_HEADER_BYTES = _LENGTH.size

T = TypeVar("T")


class Hello(msgspec.Struct, frozen=True):
    """Phase one: the only message that must stay readable across wire versions."""

    wire_version: int
    worker_id: str
    incarnation: str
    layout_fingerprint: str


def check_wire_version(version: int, peer: str) -> None:
    """Raise WireVersionMismatch unless this process can talk `version` with `peer`."""
    if version not in SUPPORTED_WIRE_VERSIONS:
        ours = ", ".join(str(v) for v in sorted(SUPPORTED_WIRE_VERSIONS))
        raise WireVersionMismatch(
            f"{peer} speaks wire version {version}, this process speaks {ours}; upgrade the older of the two"
        )


@cache
def _decoder(message_type: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(message_type)


_ENCODER = msgspec.msgpack.Encoder()


def encode(message: object) -> bytes:
    return _ENCODER.encode(message)


@overload
def decode(body: bytes | bytearray | memoryview, message_type: type[T]) -> T: ...
@overload
def decode(body: bytes | bytearray | memoryview, message_type: UnionType) -> Any: ...
def decode(body: bytes | bytearray | memoryview, message_type: Any) -> Any:
    """Decode and validate one message of a type, or of a union of tagged types.

    Raises MessageTooLarge over MAX_MESSAGE_BYTES, MalformedMessage (naming the field) on anything that does not fit.
    """
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(f"message of {len(body)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return _decoder(message_type).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = getattr(message_type, "__name__", str(message_type))
        raise MalformedMessage(f"not a valid {name}: {error}") from error


def encode_frame(message: object) -> bytes:
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise MessageTooLarge(f"frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into frames. Feed it chunks as they arrive; it yields whole bodies, in order.

    Raises MessageTooLarge as soon as a header announces an over-long frame, before buffering it.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        self._buffer += chunk
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= FRAME_HEADER_BYTES:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > self._max_frame_bytes:
                raise MessageTooLarge(f"frame of {length} bytes is over the limit of {self._max_frame_bytes}")
            end = start + FRAME_HEADER_BYTES + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + FRAME_HEADER_BYTES : end]))
            start = end
        if start:
            del self._buffer[:start]
        return bodies
