"""The error tree as OpenAI's error bodies: {"error": {"message", "type", "param", "code"}}.

Adds the errors that only an HTTP edge has. They never cross to a node:

    RequestError
    ├── UnsupportedParameter (an InvalidParameter)   400, a known feature that this server does not have
    ├── RouteNotFound                                404
    ├── MethodNotAllowed                             405
    ├── UnsupportedMediaType                         415
    └── RequestTimeout                               408, the body did not come; the connection ends

Error text is bounded and quotes at most a little of what the client sent, so that an answer cannot be made larger than
its request.
"""

import math

import msgspec

from protocol.errors import DeadlineExceeded, HeadraceError, InvalidParameter, RequestError, TransferError, Unauthorized

MAX_ERROR_CHARS = 1000
MAX_QUOTED_CHARS = 200
MAX_PARAM_CHARS = 100
DEFAULT_RETRY_AFTER_S = 1.0


class UnsupportedParameter(InvalidParameter):
    code = "unsupported_parameter"


class RouteNotFound(RequestError):
    code = "not_found"
    status = 404


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    status = 405


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"
    status = 415


class RequestTimeout(RequestError):
    code = "request_timeout"
    status = 408


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


def quote(value: object) -> str:
    """A client's value for an error text, cut to a bounded length."""
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= MAX_QUOTED_CHARS else text[:MAX_QUOTED_CHARS] + "..."


def error_body(error: HeadraceError) -> ErrorBody:
    return ErrorBody(
        ErrorDetail(
            message=_cut(error.message, MAX_ERROR_CHARS),
            type=_error_type(error),
            param=None if error.param is None else _cut(error.param, MAX_PARAM_CHARS),
            code="invalid_api_key" if isinstance(error, Unauthorized) else error.code,
        )
    )


def error_headers(error: HeadraceError) -> list[tuple[bytes, bytes]]:
    """Retry-After, in whole seconds, on everything that a retry can mend. The rest of a body that was given up on is not
    to be read as the next request."""
    if isinstance(error, RequestTimeout):
        return [(b"connection", b"close")]
    if error.status not in (429, 503):
        return []
    seconds = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
    return [(b"retry-after", str(max(1, math.ceil(seconds))).encode())]


def _error_type(error: HeadraceError) -> str:
    if error.status == 401:
        return "authentication_error"
    if 400 <= error.status < 500 and error.status != 429:
        return "invalid_request_error"
    if error.status == 429:
        return "rate_limit_error"
    if isinstance(error, TransferError) or error.status == 503:
        return "service_unavailable_error"
    return "timeout_error" if isinstance(error, DeadlineExceeded) else "server_error"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
