"""What the parts of the ucx transport say to each other. Private to it; light to import, for the helper process.

    node -> its helper     Command, one message each over a local socket that keeps message boundaries
    helper -> its node     Event, likewise
    helper -> peer helper  a UCX message tagged REQUEST_TAG: seal, then UcxRequest
    peer helper -> helper  a UCX message tagged as the request asks: frame of UcxReply. If it has no error, one message
                           for each run follows, tagged one higher, in the order asked for

The seal is an HMAC under the key that the owner's payload carries, and payloads travel over the authenticated control
channel only. So nothing of a stranger's request is looked at, least of all by native code.
"""

import hashlib
import hmac
from typing import Annotated

import msgspec

from protocol.errors import ErrorInfo, TransferError
from protocol.ids import IdText
from protocol.transfer import BlockCount
from protocol.wire import decode, encode

REQUEST_TAG = 1 << 63
MAX_TAG = REQUEST_TAG - 2
MAX_RUNS = 4096
"""Of one request. A request, and a Read, then stay well below MAX_MESSAGE_BYTES."""

MAX_MESSAGE_BYTES = 128 << 10
MAX_ADDRESS_BYTES = 32 << 10
KEY_BYTES = 32
SEAL_BYTES = hashlib.sha256().digest_size
MAX_REPLY_BYTES = 16 << 10

BlockRunLength = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
RemoteRun = tuple[BlockCount, BlockRunLength]
"""First block id in the owner's arena, number of blocks."""

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Address = Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_ADDRESS_BYTES)]


class HelperSettings(msgspec.Struct, frozen=True):
    """The helper's one argument. Descriptors are inherited; block 0 is `arena_offset` bytes into the arena's file."""

    arena_fd: int
    arena_offset: int
    block_bytes: int
    num_blocks: int
    control_fd: int


class UcxPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a helper is reached: its UCX worker's address, and the key that requests must be sealed with."""

    address: Address
    key: Key


class UcxRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`address` is the reader's worker; the answer goes there, tagged `tag`, and the blocks `tag` + 1."""

    ticket_id: IdText
    runs: Annotated[tuple[RemoteRun, ...], msgspec.Meta(min_length=1, max_length=MAX_RUNS)]
    tag: Annotated[int, msgspec.Meta(ge=0, le=MAX_TAG)]
    address: Address


class UcxReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    num_blocks: Annotated[int, msgspec.Meta(ge=0)]
    error: ErrorInfo | None = None


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    peer_id: int
    payload: UcxPayload


class Disconnect(msgspec.Struct, frozen=True, tag="disconnect"):
    """Once no read of the peer is left."""

    peer_id: int


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Answered by ReadEnded, however long it takes."""

    read_id: int
    peer_id: int
    ticket_id: str
    runs: tuple[tuple[int, int, int], ...]
    """(source, destination, num_blocks)"""


class Permission(msgspec.Struct, frozen=True, tag="permission"):
    """The answer to AskPermission."""

    question_id: int
    granted: bool


Command = Connect | Disconnect | Read | Permission


class Started(msgspec.Struct, frozen=True, tag="started"):
    payload: UcxPayload


class StartFailed(msgspec.Struct, frozen=True, tag="start-failed"):
    reason: str


class ReadEnded(msgspec.Struct, frozen=True, tag="ended"):
    """No more bytes of this read can land."""

    read_id: int
    error: ErrorInfo | None = None


class Note(msgspec.Struct, frozen=True, tag="note"):
    """For the node's log."""

    text: str


class AskPermission(msgspec.Struct, frozen=True, tag="may-read"):
    question_id: int
    ticket_id: str
    runs: tuple[RemoteRun, ...]


Event = Started | StartFailed | ReadEnded | AskPermission | Note


def seal_request(key: bytes, request: UcxRequest) -> bytes:
    body = encode(request)
    return hmac.digest(key, body, hashlib.sha256) + body


def open_request(key: bytes, message: bytes) -> UcxRequest:
    """Raises TransferError for a request that is not sealed with our key, ProtocolError for one that is malformed."""
    seal, body = message[:SEAL_BYTES], message[SEAL_BYTES:]
    if not hmac.compare_digest(seal, hmac.digest(key, body, hashlib.sha256)):
        raise TransferError("a request that is not sealed with this helper's key")
    return decode(body, UcxRequest)
