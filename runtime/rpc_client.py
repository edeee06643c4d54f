"""Calls to another process's control plane.

Guarantees: a call returns a decoded reply or raises a HeadraceError within its timeout. An error that the peer typed is
raised as that type; a peer that cannot be reached, or dies meanwhile, is NodeLost; silence is NodeLost as well, because
a caller treats both alike: try elsewhere.
"""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self, TypeVar

import aiohttp

from protocol.errors import ErrorInfo, HeadraceError, NodeLost, ProtocolError
from protocol.wire import MAX_MESSAGE_BYTES, FrameReader, decode, encode
from runtime.auth import authorization_header

CONNECT_TIMEOUT_S = 3.0
LARGE_BODY_BYTES = 1 << 20
HTTP_OK = 200

_UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError, ValueError)
"""What a peer, its address or the way to it can do wrong. ValueError is a host name that is none."""

T = TypeVar("T")


class RpcClient:
    """A pool of connections. Used as `async with RpcClient(key) as client:`."""

    def __init__(self, cluster_key: str | None) -> None:
        self._headers = authorization_header(cluster_key)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(self, url: str, message: object, reply_type: type[T], timeout_s: float) -> T:
        """POST one message, wait for its reply at most `timeout_s` seconds."""
        return await self._exchange("POST", url, _payload(message), reply_type, timeout_s)

    async def get(self, url: str, reply_type: type[T], timeout_s: float) -> T:
        return await self._exchange("GET", url, None, reply_type, timeout_s)

    async def notify(self, url: str, message: object, timeout_s: float) -> None:
        """POST one message whose reply carries nothing."""
        await self._exchange("POST", url, _payload(message), None, timeout_s)

    @asynccontextmanager
    async def stream(
        self, url: str, message: object, idle_timeout_s: float | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """POST one message and iterate over the bodies of the frames that come back.

        Iteration ends when the peer ends the stream, raises NodeLost if it is cut or silent for `idle_timeout_s` (None: for
        as long as it likes), and MessageTooLarge for an over-long frame. Leaving the context closes the connection: the peer sees that.
        """
        try:
            # Not wait_for: before Python 3.12 it swallows a cancel that comes together with the result.
            async with asyncio.timeout(idle_timeout_s):
                response = await self._open.post(url, data=_payload(message), allow_redirects=False)
        except _UNREACHABLE as error:
            raise NodeLost(f"{url} cannot be reached: {_describe(error)}") from error
        try:
            if response.status != HTTP_OK:
                raise _typed_error(url, response.status, await _read_error(url, response, idle_timeout_s))
            yield _frames(url, response, idle_timeout_s)
        finally:
            response.close()

    @property
    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "RpcClient is used outside its context"
        return self._session

    async def _exchange(
        self, method: str, url: str, body: bytes | io.BytesIO | None, reply_type: type[T] | None, timeout_s: float
    ) -> T:
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._open.request(method, url, data=body, allow_redirects=False) as response,
            ):
                content = await _read_body(response)
        except _UNREACHABLE as error:
            raise NodeLost(f"no answer from {url}: {_describe(error)}") from error
        if response.status != HTTP_OK:
            raise _typed_error(url, response.status, content)
        try:
            return decode(content, reply_type) if reply_type is not None else None  # type: ignore[return-value]  # notify
        except ProtocolError as error:
            raise NodeLost(f"{url} answered with what is no reply: {error.message}") from error


def _payload(message: object) -> bytes | io.BytesIO:
    """A large body as a file, which aiohttp sends piece by piece instead of holding up the event loop."""
    body = encode(message)
    return io.BytesIO(body) if len(body) > LARGE_BODY_BYTES else body


async def _frames(url: str, response: aiohttp.ClientResponse, idle_timeout_s: float | None) -> AsyncIterator[bytes]:
    reader = FrameReader()
    while True:
        try:
            async with asyncio.timeout(idle_timeout_s):
                chunk = await response.content.readany()
        except TimeoutError as error:
            raise NodeLost(f"{url} was silent for {idle_timeout_s} s") from error
        except _UNREACHABLE as error:
            raise NodeLost(f"stream from {url} was cut: {_describe(error)}") from error
        if not chunk:
            return
        for body in reader.feed(chunk):
            yield body


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    """Not a byte more than a message may have, whatever the peer sends."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_MESSAGE_BYTES:
            response.close()
            raise aiohttp.ClientPayloadError(f"the answer is over {MAX_MESSAGE_BYTES} bytes")
    return bytes(body)


async def _read_error(url: str, response: aiohttp.ClientResponse, timeout_s: float | None) -> bytes:
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_body(response)
    except _UNREACHABLE as error:
        raise NodeLost(f"{url} failed in the middle of an error: {_describe(error)}") from error


def _typed_error(url: str, status: int, content: bytes) -> HeadraceError:
    try:
        return decode(content, ErrorInfo).to_error()
    except ProtocolError:
        return NodeLost(f"{url} answered HTTP {status} without a typed error")


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__
