"""What every public route shares: the API key, the request id, bodies under a limit, errors in OpenAI's shape."""

import asyncio
import hmac
import logging
import re
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.errors import (
    Cancelled,
    HeadraceError,
    InternalError,
    MessageTooLarge,
    PayloadTooLarge,
    RequestError,
    Unauthorized,
)
from protocol.ids import new_trace_id
from router.api_errors import (
    MethodNotAllowed,
    RequestTimeout,
    RouteNotFound,
    UnsupportedMediaType,
    error_body,
    error_headers,
    quote,
)
from runtime.rpc_server import read_body

JSON_TYPE = "application/json"
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})
BODY_TIMEOUT_S = 60.0
REQUEST_ID_KEY = "headrace.request_id"
CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

T = TypeVar("T")

log = logging.getLogger(__name__)


class Edge:
    """Wraps the whole app. Everything but OPEN_PATHS needs the key, including paths that do not exist; the path that
    counts is the raw one that routes are matched with. The client's X-Request-Id comes back on every answer (a new one
    if it sent none, or an odd one); it is never a key to anything."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client_id = headers.get("x-request-id", "")
        request_id = client_id if CLIENT_ID.fullmatch(client_id) else new_trace_id()
        scope[REQUEST_ID_KEY] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if self._expected is not None and scope["path"] not in OPEN_PATHS:
            shown = headers.get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(shown, self._expected):
                refusal = Unauthorized("the API key is missing or wrong: send it as 'Authorization: Bearer <key>'")
                await error_response(refusal)(scope, receive, send_with_id)
                return
        await self._app(scope, receive, send_with_id)


def json_response(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type=JSON_TYPE)


def error_response(error: HeadraceError) -> Response:
    response = json_response(error_body(error), error.status)
    response.raw_headers.extend(error_headers(error))
    return response


async def read_json(request: Request, limit: int) -> bytes:
    """Raises UnsupportedMediaType for what does not call itself JSON, PayloadTooLarge past the limit,
    RequestTimeout for a body that has not come after BODY_TIMEOUT_S."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != JSON_TYPE:
        raise UnsupportedMediaType(f"content-type must be {JSON_TYPE}, not {quote(media_type)!r}")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await read_body(request, limit)
    except TimeoutError as error:
        raise RequestTimeout(f"the body did not come within {BODY_TIMEOUT_S:g} s") from error
    except MessageTooLarge as error:
        raise PayloadTooLarge(error.message) from error


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """Run `work` to its end, or until the client has gone, or has left it unread for so long that it may as well have:
    then it is cancelled, waited for, and Cancelled is raised."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client has gone, or does not read")
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def on_headrace_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HeadraceError), "registered for this type only"
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException), "registered for this type only"
    where = f"{request.method} {quote(request.url.path)}"
    if error.status_code == 404:
        return error_response(RouteNotFound(f"there is no {where} here"))
    if error.status_code == 405:
        response = error_response(MethodNotAllowed(f"{where} is not allowed"))
        response.headers.update(error.headers or {})
        return response
    return error_response(RequestError(quote(str(error.detail))))


async def on_bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, quote(request.url.path), exc_info=error)
    return error_response(InternalError("the request failed for a reason of the server's own; its log says more"))
