"""What the tcp transport's two ends say to each other, and reading it from a blocking socket under a deadline.

Private to that transport, so it is not in protocol/: the control plane has met before, checked the wire version and
handed over the address.

    reader -> owner    frame of TcpRead
    owner -> reader    frame of TcpReply; if it has no error, `num_bytes` bytes of blocks follow, in the order asked for
"""

import socket
import struct
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec

from protocol.errors import ErrorInfo, MessageTooLarge, PeerLost, TransferTimeout
from protocol.ids import IdText
from protocol.transfer import BlockCount
from protocol.wire import FRAME_HEADER_BYTES, decode
from runtime.clock import Deadline

MAX_RUNS = 1 << 16
MAX_FRAME_BYTES = 1 << 20
BATCH_BYTES = 4 << 20
BATCH_PIECES = 64
"""Of one system call."""

_TIMEVAL = struct.Struct("@ll")

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
    """Fill `target`. Raises as receive_frame does."""
    receive_all(connection, [target], deadline)


def receive_all(connection: socket.socket, targets: Sequence[memoryview], deadline: Deadline) -> None:
    """Fill them all, in order. Raises as receive_frame does."""
    pieces = _Pieces(targets)
    while batch := pieces.next_batch():
        _check(deadline, "the peer sends too slowly")
        try:
            _limit(connection, socket.SO_RCVTIMEO, deadline)
            received = connection.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError as error:
            raise TransferTimeout("the peer sends nothing") from error
        except OSError as error:
            raise PeerLost(f"the connection broke: {error}") from error
        if received == 0:
            raise PeerLost("cut while receiving") if pieces.begun else ConnectionEnded("the peer closed the connection")
        pieces.advance(received)


def send_all(connection: socket.socket, sources: Sequence[bytes | memoryview], deadline: Deadline) -> None:
    """Send them all, in order. Raises PeerLost, TransferTimeout."""
    pieces = _Pieces([memoryview(source) for source in sources])
    while batch := pieces.next_batch():
        _check(deadline, "the peer takes too slowly what it asked for")
        try:
            _limit(connection, socket.SO_SNDTIMEO, deadline)
            pieces.advance(connection.sendmsg(batch))
        except BlockingIOError as error:
            raise TransferTimeout("the peer does not take what it asked for") from error
        except OSError as error:
            raise PeerLost(f"the connection broke: {error}") from error


class _Pieces:
    """Pieces of memory that one system call after another works through: a batch at a time, and from any byte on."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = [view for view in views if len(view)]
        self._first = 0
        self.begun = False

    def next_batch(self) -> list[memoryview]:
        """Empty when all are done."""
        batch: list[memoryview] = []
        room = BATCH_BYTES
        for view in self._views[self._first : self._first + BATCH_PIECES]:
            batch.append(view[:room])
            room -= len(batch[-1])
            if room == 0:
                break
        return batch

    def advance(self, num_bytes: int) -> None:
        self.begun = True
        while num_bytes:
            view = self._views[self._first]
            if num_bytes < len(view):
                self._views[self._first] = view[num_bytes:]
                return
            num_bytes -= len(view)
            self._first += 1


def _check(deadline: Deadline, problem: str) -> None:
    """A limit on each system call is none on all of them: a peer may let a byte through at a time."""
    if deadline.passed:
        raise TransferTimeout(problem)


def _limit(connection: socket.socket, option: int, deadline: Deadline) -> None:
    """Let the next system call on this blocking socket take until the deadline. Python's own timeouts poll before every
    call, and cut calls short that could wait for all of a batch."""
    seconds = max(deadline.remaining_s, 1e-3)  # 0 would mean: for ever
    connection.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6)))
