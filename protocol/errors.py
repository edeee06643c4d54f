"""The one error tree. Everything that Headrace raises on purpose is in it:

    HeadraceError
    ├── RequestError                    the client must change the request (4xx)
    │   ├── InvalidParameter            400, names the parameter
    │   ├── PromptTooLong               400
    │   ├── ModelNotFound               404
    │   ├── PayloadTooLarge             413
    │   └── Unauthorized                401
    ├── UnavailableError                retry later, or on another node (429, 503)
    │   ├── Overloaded                  queue full; carries retry_after_s
    │   ├── NoWorker                    no node of the needed role is ready
    │   ├── Draining                    the node no longer admits
    │   └── NodeLost                    the node died or went silent
    ├── TransferError                   KV did not arrive; recompute and go on (503 if it ever surfaces)
    │   ├── LayoutMismatch              the two nodes' KV bytes mean different things
    │   ├── LeaseExpired                the export is gone, or belongs to an earlier incarnation
    │   ├── ChecksumMismatch            bytes arrived damaged
    │   ├── PeerLost                    the other node died or cut the connection
    │   └── TransferTimeout             the other node is silent past the deadline
    ├── ProtocolError                   a message that should not exist (400 between nodes)
    │   ├── WireVersionMismatch
    │   ├── MalformedMessage
    │   └── MessageTooLarge
    ├── DeadlineExceeded                the request's own deadline passed (504)
    ├── Cancelled                       the client left, or an operator stopped it (499)
    ├── ConfigError                     start-up: names the setting and how to mend it
    └── InternalError                   a bug of ours; one request fails, the process lives on (500)

An error crosses a process as ErrorInfo: a code, a message that is safe to show, and whether a retry can help.
"""

from typing import Annotated, ClassVar, Self

import msgspec

MAX_MESSAGE_CHARS = 2000


class HeadraceError(Exception):
    """Base of the tree. `code` is stable and machine-readable; `message` is for people and safe to show them."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message[:MAX_MESSAGE_CHARS]
        self.param = param
        self.retry_after_s = retry_after_s

    def to_info(self) -> "ErrorInfo":
        return ErrorInfo(
            code=self.code,
            message=self.message,
            retryable=self.retryable,
            param=self.param,
            retry_after_s=self.retry_after_s,
        )

    @classmethod
    def from_info(cls, info: "ErrorInfo") -> Self:
        return cls(info.message, param=info.param, retry_after_s=info.retry_after_s)


class RequestError(HeadraceError):
    code = "invalid_request"
    status = 400


class InvalidParameter(RequestError):
    code = "invalid_parameter"


class PromptTooLong(RequestError):
    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    code = "model_not_found"
    status = 404


class PayloadTooLarge(RequestError):
    code = "payload_too_large"
    status = 413


class Unauthorized(RequestError):
    code = "unauthorized"
    status = 401


class UnavailableError(HeadraceError):
    code = "unavailable"
    status = 503
    retryable = True


class Overloaded(UnavailableError):
    code = "overloaded"
    status = 429


class NoWorker(UnavailableError):
    code = "no_worker"


class Draining(UnavailableError):
    code = "draining"


class NodeLost(UnavailableError):
    code = "node_lost"


class TransferError(HeadraceError):
    code = "transfer_failed"
    status = 503
    retryable = True


class LayoutMismatch(TransferError):
    code = "layout_mismatch"


class LeaseExpired(TransferError):
    code = "lease_expired"


class ChecksumMismatch(TransferError):
    code = "checksum_mismatch"


class PeerLost(TransferError):
    code = "peer_lost"


class TransferTimeout(TransferError):
    code = "transfer_timeout"


class ProtocolError(HeadraceError):
    code = "protocol_error"
    status = 400


class WireVersionMismatch(ProtocolError):
    code = "wire_version_mismatch"


class MalformedMessage(ProtocolError):
    code = "malformed_message"


class MessageTooLarge(ProtocolError):
    code = "message_too_large"
    status = 413


class DeadlineExceeded(HeadraceError):
    code = "deadline_exceeded"
    status = 504


class Cancelled(HeadraceError):
    code = "cancelled"
    status = 499


class ConfigError(HeadraceError):
    code = "config_error"


class InternalError(HeadraceError):
    code = "internal_error"


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it crosses a process."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    message: Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE_CHARS)]
    retryable: bool
    param: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    retry_after_s: float | None = None

    def to_error(self) -> HeadraceError:
        """The typed error again. A code of a newer peer that we do not know falls back on its retry flag."""
        known = _BY_CODE.get(self.code)
        if known is None:
            known = UnavailableError if self.retryable else HeadraceError
        return known.from_info(self)


def _codes(root: type[HeadraceError]) -> dict[str, type[HeadraceError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _codes(child)
    return found


_BY_CODE = _codes(HeadraceError)
