"""A control plane without sockets: real routes, real RpcClient, and between them a network that can do anything to a
message that a network can do.

    MemoryNetwork      who listens at which address, and the weather
      MemoryRpcClient  RpcClient over it: its timeouts, its typed errors and its framing are the product's own
    Weather            decides the fate of each message and counts what it did

A request may be refused, lost, delayed (so that requests overtake each other) or delivered twice; its answer may be lost; a
stream may be cut, end early, fall silent, or have frames delayed, lost, doubled or swapped.
"""

import asyncio
import errno
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
from aiohttp.client_reqrep import ConnectionKey
from starlette.types import ASGIApp, Message

from runtime.rpc_client import RpcClient

MAX_QUEUED_CHUNKS = 4
"""How far a server may write ahead of its reader, as the buffers of a socket would let it."""


class Weather:
    """`rates`: how likely each kind of mishap is, per message or frame. `delay_s`: the longest delay.

    Draws from `rng` only, and counts in `faults`, which several may share.
    """

    def __init__(self, rng: random.Random, faults: Counter[str]) -> None:
        self.rng = rng
        self.faults = faults
        self.rates: dict[str, float] = {}
        self.delay_s = 0.0

    def strikes(self, kind: str) -> bool:
        struck = self.rng.random() < self.rates.get(kind, 0.0)
        if struck:
            self.faults[kind] += 1
        return struck

    async def delay(self, kind: str) -> None:
        if self.strikes(kind):
            await asyncio.sleep(self.rng.random() * self.delay_s)

    def clear_up(self) -> None:
        self.rates = {}


class MemoryNetwork:
    """Applications by address. Whoever stops listening cuts its connections."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather
        self._apps: dict[str, ASGIApp] = {}
        self._open: dict[str, dict[_Connection, None]] = {}  # in order, unlike a set, and so is their end
        self._partitions: dict[str, asyncio.Event] = {}
        self._strays: set[asyncio.Task[None]] = set()

    def listen(self, url: str, app: ASGIApp) -> None:
        self._apps[url] = app
        self._open[url] = {}

    async def stop_listening(self, url: str) -> None:
        """The process there is gone: its handlers with it, and every peer's connection."""
        del self._apps[url]
        connections = self._open.pop(url)
        for connection in connections:
            connection.cut(aiohttp.ClientPayloadError("connection reset"))
        await asyncio.gather(*(connection.served() for connection in connections))

    def partition(self, url: str) -> None:
        """Nothing gets there, or back from there, before `heal`; nor is anything refused."""
        self._partitions.setdefault(url, asyncio.Event())

    def heal(self) -> None:
        for healed in self._partitions.values():
            healed.set()
        self._partitions.clear()

    async def passable(self, url: str) -> None:
        if url in self._partitions:
            await self._partitions[url].wait()

    async def connect(self, method: str, url: str, headers: dict[str, str], body: bytes) -> "_Connection":
        """Send a request and wait for the head of its answer, as far as the weather allows."""
        parts = urlsplit(url)
        address = f"{parts.scheme}://{parts.netloc}"
        weather = self.weather
        await weather.delay("request delayed")
        await self.passable(address)
        if address not in self._apps:
            raise _refused(address)
        if weather.strikes("request refused"):
            raise aiohttp.ClientConnectionError("connection reset")
        if weather.strikes("request lost"):
            await asyncio.Event().wait()
        if weather.strikes("request doubled"):
            self._stray(self._discard(address, method, parts.path, headers, body))
        connection = self._serve(address, method, parts.path, headers, body)
        try:
            await connection.started.wait()
            if weather.strikes("answer lost"):
                await asyncio.Event().wait()
            await weather.delay("answer delayed")
        except BaseException:
            connection.close()
            raise
        if connection.error is not None:
            raise connection.error
        return connection

    async def close(self) -> None:
        for task in list(self._strays):
            task.cancel()
        await asyncio.gather(*self._strays, return_exceptions=True)
        for url in list(self._apps):
            await self.stop_listening(url)

    def _serve(self, address: str, method: str, path: str, headers: dict[str, str], body: bytes) -> "_Connection":
        connection = _Connection(self, address, method, path, headers, body)
        connections = self._open[address]
        connections[connection] = None
        connection.serve(self._apps[address], on_end=lambda: connections.pop(connection, None))
        return connection

    async def _discard(self, address: str, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        """A second delivery, at some other time, whose answer nobody reads."""
        await asyncio.sleep(self.weather.rng.random() * self.weather.delay_s)
        if address in self._apps:
            connection = self._serve(address, method, path, headers, body)
            await connection.started.wait()
            connection.close()

    def _stray(self, work: Any) -> None:
        task = asyncio.create_task(work, name="network")
        self._strays.add(task)
        task.add_done_callback(self._strays.discard)


def _refused(address: str) -> aiohttp.ClientConnectorError:
    """What the kernel of a machine answers on which nobody listens any more."""
    key = ConnectionKey(address, None, False, True, None, None, None)
    return aiohttp.ClientConnectorError(key, OSError(errno.ECONNREFUSED, "connection refused"))


class _Connection:
    """One request and its answer: the server's ASGI end, and what aiohttp shows the client of it."""

    def __init__(
        self, network: MemoryNetwork, address: str, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> None:
        self._network = network
        self._address = address
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
        self._body: bytes | None = body
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_QUEUED_CHUNKS)
        self._gone = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.started = asyncio.Event()
        self.status = 0
        self.error: aiohttp.ClientError | None = None
        self.content = self
        """aiohttp's name for where the body is read from."""

    # The server's end.

    def serve(self, app: ASGIApp, on_end: Any) -> None:
        self._task = asyncio.create_task(self._run(app), name="network")
        self._task.add_done_callback(lambda _: on_end())

    async def served(self) -> None:
        assert self._task is not None
        await asyncio.gather(self._task, return_exceptions=True)

    def cut(self, error: aiohttp.ClientError) -> None:
        """The server's process has died."""
        assert self._task is not None
        self.error = error
        self.started.set()
        self._task.cancel()
        self._forget_chunks()
        self._chunks.put_nowait(None)  # for a client that waits

    async def _run(self, app: ASGIApp) -> None:
        try:
            await app(self._scope, self._receive, self._send)
        finally:
            self.started.set()
            if not self._gone.is_set() and self.error is None:
                await self._chunks.put(None)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._gone.is_set():
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.started.set()
        elif message.get("body"):
            await self._chunks.put(message["body"])

    # The client's end.

    def close(self) -> None:
        self._gone.set()
        self._forget_chunks()

    def _forget_chunks(self) -> None:
        """A server that waits to write may go on, into nothing."""
        while not self._chunks.empty():
            self._chunks.get_nowait()

    async def readany(self) -> bytes:
        """One frame, or what the weather makes of it; empty at the end."""
        while True:
            chunk = await self._next()
            if chunk is None:
                return b""
            weather = self._network.weather
            if weather.strikes("stream cut"):
                raise aiohttp.ClientPayloadError("cut")
            if weather.strikes("stream ended"):
                return b""
            if weather.strikes("stream silent"):
                while chunk is not None:  # frames are lost; what the kernels say of the connection's end is not
                    chunk = await self._next()
                return b""
            await weather.delay("frame delayed")
            if weather.strikes("frame lost"):
                continue
            if weather.strikes("frame doubled"):
                return chunk + chunk
            if weather.strikes("frames swapped"):
                following = await self._next()
                return (following or b"") + chunk
            return chunk

    async def iter_any(self) -> AsyncIterator[bytes]:
        while (chunk := await self._next()) is not None:
            yield chunk

    async def _next(self) -> bytes | None:
        if self.error is not None:
            raise self.error
        chunk = await self._chunks.get()
        await self._network.passable(self._address)
        if self.error is not None:
            raise self.error
        return chunk


class _Exchange:
    """What aiohttp's `session.request` gives: a context manager around the answer, and awaitable."""

    def __init__(self, opening: Any) -> None:
        self._opening = opening
        self._connection: _Connection | None = None

    def __await__(self) -> Any:
        return self._opening.__await__()

    async def __aenter__(self) -> _Connection:
        self._connection = await self._opening
        return self._connection

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()


class _Session:
    def __init__(self, network: MemoryNetwork, headers: dict[str, str]) -> None:
        self._network = network
        self._headers = headers

    def request(self, method: str, url: str, *, data: Any, allow_redirects: bool) -> _Exchange:
        assert not allow_redirects
        body = data if isinstance(data, bytes) else b"" if data is None else data.read()
        return _Exchange(self._network.connect(method, url, self._headers, body))

    def post(self, url: str, *, data: Any, allow_redirects: bool) -> _Exchange:
        return self.request("POST", url, data=data, allow_redirects=allow_redirects)

    async def close(self) -> None:
        return None


class MemoryRpcClient(RpcClient):
    def __init__(self, network: MemoryNetwork, cluster_key: str | None) -> None:
        super().__init__(cluster_key)
        self._network = network

    async def __aenter__(self) -> Self:
        self._session = _Session(self._network, self._headers)  # type: ignore[assignment]  # as much of one as is used
        return self
