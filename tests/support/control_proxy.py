"""ControlProxy: stands between a reader and its owner's control routes, and does to their messages what networks do.

    async with control_proxy(owner.port) as proxy:
        proxy.tamper("/kv/release", Tamper(lose_request=True))
        await reader.fetch(proxy.through(ticket), ...)

It knows nothing of what the messages mean, except that hand-offs are streams of frames. Runs in the test's event loop.
"""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp
import msgspec
from aiohttp import web

from protocol.transfer import TransferTicket
from protocol.wire import FrameReader

EditFrame = Callable[[int, bytes], list[bytes]]
"""(index in its stream, body) -> what goes on instead."""


class Cut(Exception):
    """Raised by an EditFrame to break the connection."""


@dataclass(frozen=True)
class Tamper:
    """What happens to requests of one path. `times`: to how many of them; the others pass. `hang`: no answer, ever."""

    times: int = 1_000_000
    lose_request: bool = False
    lose_reply: bool = False
    repeat: int = 1
    hang: bool = False
    edit: Callable[[bytes], bytes] | None = None
    edit_frame: EditFrame | None = None


class ControlProxy:
    def __init__(self, session: aiohttp.ClientSession, owner_port: int) -> None:
        self._session = session
        self._owner = f"http://127.0.0.1:{owner_port}"
        self._tampers: dict[str, Tamper] = {}
        self._done: dict[str, int] = {}
        self._ended = asyncio.Event()
        self.port = 0

    def tamper(self, path: str, how: Tamper) -> None:
        self._tampers[path] = how
        self._done[path] = 0

    def clear(self) -> None:
        self._tampers.clear()

    def through(self, ticket: TransferTicket) -> TransferTicket:
        return msgspec.structs.replace(ticket, control_url=f"http://127.0.0.1:{self.port}")

    def num_tampered(self, path: str) -> int:
        return self._done[path]

    def end(self) -> None:
        self._ended.set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        how = self._tampers.get(request.path, Tamper())
        if request.path in self._done:
            self._done[request.path] += 1
            if self._done[request.path] > how.times:
                how = Tamper()
        body = await request.read()
        if how.hang:
            await self._ended.wait()
        if how.hang or how.lose_request:
            return _cut(request)
        for _ in range(how.repeat - 1):
            async with self._forward(request, body) as answer:
                await answer.read()
        async with self._forward(request, body) as answer:
            if how.edit_frame is not None and answer.status == 200:
                return await _relay(request, answer, how.edit_frame)
            if answer.content_type == "application/x-headrace-frames":
                return await _relay(request, answer, lambda _, frame: [frame])
            content = await answer.read()
            if how.lose_reply:
                return _cut(request)
            content = how.edit(content) if how.edit is not None else content
            return web.Response(status=answer.status, body=content, content_type=answer.content_type)

    def _forward(
        self, request: web.Request, body: bytes
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        return self._session.request(request.method, self._owner + request.path, data=body, headers=headers)


@contextlib.asynccontextmanager
async def control_proxy(owner_port: int) -> AsyncIterator[ControlProxy]:
    async with aiohttp.ClientSession() as session:
        proxy = ControlProxy(session, owner_port)
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", proxy.handle)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        proxy.port = runner.addresses[0][1]
        try:
            yield proxy
        finally:
            proxy.end()
            await runner.cleanup()


def _cut(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _relay(request: web.Request, answer: aiohttp.ClientResponse, edit_frame: EditFrame) -> web.StreamResponse:
    """Frame by frame."""
    response = web.StreamResponse(headers={"Content-Type": answer.content_type})
    await response.prepare(request)
    frames = FrameReader()
    index = 0
    async for chunk in answer.content.iter_any():
        for body in frames.feed(chunk):
            try:
                bodies = edit_frame(index, body)
            except Cut:
                return _cut(request)
            try:
                for edited in bodies:
                    await response.write(struct.pack("<I", len(edited)) + edited)
            except ConnectionResetError:  # the reader has heard enough
                return response
            index += 1
    await response.write_eof()
    return response
