"""What the tcp transport's two ends say to each other, and reading it from a blocking socket under a deadline.

Private to that transport, so it is not in protocol/: the control plane has met before, checked the wire version and
handed over the address.

    reader -> owner    frame of TcpRead
    owner -> reader    frame of TcpReply; if it has no error, `num_bytes` bytes of blocks follow, in the order asked for
"""

import socket
import struct
from typing import Annotated, TypeVar

import msgspec

from protocol.errors import ErrorInfo, MessageTooLarge, PeerLost, TransferTimeout
from protocol.ids import IdText
from protocol.transfer import BlockCount
from protocol.wire import FRAME_HEADER_BYTES, decode
from runtime.clock import Deadline

MAX_RUNS = 1 << 16
MAX_FRAME_BYTES = 1 << 20

T = TypeVar("T")

_LENGTH = struct.Struct("<I")
Run = tuple[BlockCount, Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]]
"""First block id in the owner's arena, number of blocks."""


class TcpRead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ticket_id: IdText
    runs: Annotated[tuple[Run, ...], msgspec.Meta(min_length=1, max_length=MAX_RUNS)]


class TcpReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    num_bytes: Annotated[int, msgspec.Meta(ge=0)]
    error: ErrorInfo | None = None


class TcpPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the owner listens."""

    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class ConnectionEnded(PeerLost):
    """The peer closed the connection between two messages."""


def receive_frame(connection: socket.socket, message_type: type[T], deadline: Deadline) -> T:
    """Raises ConnectionEnded at a clean end, PeerLost at an unclean one, TransferTimeout, MessageTooLarge,
    MalformedMessage."""
    header = bytearray(FRAME_HEADER_BYTES)
    receive_into(connection, memoryview(header), deadline)
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise MessageTooLarge(f"frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    body = bytearray(length)
    receive_into(connection, memoryview(body), deadline)
    return decode(body, message_type)


def receive_into(connection: socket.socket, target: memoryview, deadline: Deadline) -> None:
    """Fill `target`."""
    filled = 0
    while filled < len(target):
        try:
            connection.settimeout(_remaining(deadline))
            received = connection.recv_into(target[filled:])
        except TimeoutError as error:
            raise TransferTimeout("the peer sends nothing") from error
        except OSError as error:
            raise PeerLost(f"the connection broke: {error}") from error
        if received == 0:
            raise ConnectionEnded("the peer closed the connection") if filled == 0 else PeerLost("cut while receiving")
        filled += received


def send(connection: socket.socket, data: bytes | memoryview, deadline: Deadline) -> None:
    try:
        connection.settimeout(_remaining(deadline))
        connection.sendall(data)
    except TimeoutError as error:
        raise TransferTimeout("the peer does not take what it asked for") from error
    except OSError as error:
        raise PeerLost(f"the connection broke: {error}") from error


def _remaining(deadline: Deadline) -> float:
    return max(deadline.remaining_s, 1e-3)  # 0 would mean: do not block
