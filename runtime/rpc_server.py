"""The HTTP edge of the control plane: one message in, one message out, errors typed.

Routes are plain Starlette; `message_route` turns `async def handler(message) -> reply` into one, `json_route` one for
people. Bodies are read under a
size limit before anything is decoded. Every control route is behind the cluster key.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from protocol.errors import HeadraceError, InternalError, MessageTooLarge
from protocol.wire import MAX_MESSAGE_BYTES, decode, encode
from runtime.auth import check_authorization

MESSAGE_TYPE = "application/x-msgpack"
FRAMES_TYPE = "application/x-headrace-frames"

log = logging.getLogger(__name__)

In = TypeVar("In")


def message_route(
    path: str, message_type: type[In], handler: Callable[[In], Awaitable[object]], cluster_key: str | None
) -> Route:
    """POST `path`: decode `message_type`, answer with the encoded reply, or with an ErrorInfo and its status."""

    async def endpoint(request: Request) -> Response:
        try:
            message = await _read(request, message_type, cluster_key)
            return _reply(await handler(message))
        except (HeadraceError, ClientDisconnect) as error:
            return error_response(error)
        except Exception:
            log.exception("handler of %s failed", path)
            return error_response(InternalError(f"the handler of {path} failed; see this process's log"))

    return Route(path, endpoint, methods=["POST"])


def stream_route(
    path: str,
    message_type: type[In],
    handler: Callable[[In], Awaitable[AsyncIterator[bytes]]],
    cluster_key: str | None,
) -> Route:
    """POST `path`: decode `message_type`, answer with a stream of frames. Errors before the first byte are typed;
    a handler's iterator is closed when the reader goes away."""

    async def endpoint(request: Request) -> Response:
        try:
            message = await _read(request, message_type, cluster_key)
            frames = await handler(message)
        except (HeadraceError, ClientDisconnect) as error:
            return error_response(error)
        return StreamingResponse(frames, media_type=FRAMES_TYPE)

    return Route(path, endpoint, methods=["POST"])


def get_route(path: str, handler: Callable[[], Awaitable[object]], cluster_key: str | None) -> Route:
    """GET `path`: answer with the encoded reply."""

    async def endpoint(request: Request) -> Response:
        try:
            check_authorization(cluster_key, request.headers.get("authorization"))
            return _reply(await handler())
        except HeadraceError as error:
            return error_response(error)

    return Route(path, endpoint, methods=["GET"])


def json_route(path: str, handler: Callable[[], Awaitable[object]], cluster_key: str | None) -> Route:
    """GET `path`: answer in JSON, for people and scripts; with an ErrorInfo where that fails."""

    async def endpoint(request: Request) -> Response:
        try:
            check_authorization(cluster_key, request.headers.get("authorization"))
            body, status = msgspec.json.encode(await handler()), 200
        except HeadraceError as error:
            body, status = msgspec.json.encode(error.to_info()), error.status
        return Response(body, status_code=status, media_type="application/json")

    return Route(path, endpoint, methods=["GET"])


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused with MessageTooLarge as soon as it is known to pass `limit` bytes."""
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise MessageTooLarge(f"body of {announced} bytes is over the limit of {limit}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise MessageTooLarge(f"body is over the limit of {limit} bytes")
    return bytes(body)


def error_response(error: HeadraceError | ClientDisconnect) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    return Response(encode(error.to_info()), status_code=error.status, media_type=MESSAGE_TYPE)


async def _read(request: Request, message_type: type[In], cluster_key: str | None) -> In:
    check_authorization(cluster_key, request.headers.get("authorization"))
    message: In = decode(await read_body(request, MAX_MESSAGE_BYTES), message_type)
    return message


def _reply(reply: Any) -> Response:
    return Response(b"" if reply is None else encode(reply), media_type=MESSAGE_TYPE)
