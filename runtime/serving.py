"""Serving HTTP for a process's life: sockets first, then uvicorn on the caller's event loop, then a drain.

Sockets are bound before anything else starts, so that a taken port fails at once and port 0 has become a number by the
time anyone needs to know it. What is opened here is closed here: no task, connection or socket outlives `serve_sockets`.
"""

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.errors import ConfigError
from runtime.http_protocol import BoundedHttpProtocol
from runtime.life import Phase, ProcessLife

BACKLOG = 2048
SWITCH_INTERVAL_S = 0.5e-3
"""How long a thread that waits for the interpreter lock lets another go on, at most. With Python's own 5 ms the event loop of a
node now and then waited that long, several times on a hand-off's way, for an engine that was planning its next step: with
8 hand-offs at once on two cores the slowest of them took 17 to 25 ms, and 7 to 10 ms with this."""

KEEP_ALIVE_S = 75
"""Longer than any client's of ours, so that the client is the one to close an idle connection."""

FAREWELL_TIMEOUT_S = 10
"""How long the farewell may take, also of a process that is to stop at once: a third signal kills it."""

CLOSE_TIMEOUT_S = 1
"""How long connections may take to end once the drain is over."""

CUT_TIMEOUT_S = 0.5
"""How long handlers may take to notice that their connections were cut, before they are cancelled."""

log = logging.getLogger(__name__)


def run_on_event_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a process's main coroutine to its end, on uvloop, beside whatever threads the process has."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


def announce(role: str, url: str, **more: str) -> None:
    """Print the one line on stdout that tells whoever started this process where it listens."""
    print(json.dumps({"event": "listening", "role": role, "url": url, **more}), flush=True)  # noqa: T201


def bind_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket, owned by the caller; connections wait in its backlog until it is served. `port` 0 takes a
    free one. Raises ConfigError for an address that cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)  # here, because two sockets may bind one address as long as neither listens
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}", param="port") from error
    bound.setblocking(False)
    return bound


def socket_url(bound: socket.socket) -> str:
    """How this host reaches a bound socket."""
    host, port = bound.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - recognised, not bound
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


async def serve_apps(
    apps: Sequence[tuple[ASGIApp, str, int]],
    life: ProcessLife,
    drain: Callable[[], Awaitable[None]],
    drain_timeout_s: float,
    on_serving: Callable[[list[str]], None],
) -> None:
    """Bind (app, host, port) each and serve them as `serve_sockets` does."""
    with ExitStack() as stack:
        served = [(app, stack.enter_context(bind_socket(host, port))) for app, host, port in apps]
        await serve_sockets(served, life, drain, drain_timeout_s, on_serving)


async def serve_sockets(
    apps: Sequence[tuple[ASGIApp, socket.socket]],
    life: ProcessLife,
    drain: Callable[[], Awaitable[None]],
    drain_timeout_s: float,
    on_serving: Callable[[list[str]], None],
    farewell: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve until `life` ends; takes over the sockets.

    `on_serving` gets the apps' URLs, in order, once all of them answer. When `life` drains, `drain` is awaited for at
    most `drain_timeout_s` seconds while the apps go on serving what runs; then connections are closed. `life.stop` cuts
    that short. `farewell` follows the drain, however that ended: what peers must be told, or must not see cut, while we still
    answer. It is awaited for at most FAREWELL_TIMEOUT_S. Afterwards the life is stopped.
    """
    servers = [_Server(app) for app, _ in apps]
    urls = [socket_url(bound) for _, bound in apps]
    try:
        async with asyncio.TaskGroup() as tasks:
            for server, url, (_, bound) in zip(servers, urls, apps, strict=True):
                tasks.create_task(server.serve(sockets=[bound]), name=f"serve:{url}")
            for server in servers:
                await server.answering.wait()
            on_serving(urls)
            await life.wait(Phase.DRAINING)
            await _drain(life, drain, drain_timeout_s)
            if farewell is not None:
                await _say(farewell)
            for server in servers:
                server.end(at_once=life.phase is Phase.STOPPED)
    finally:
        for _, bound in apps:
            bound.close()
        life.stop("served to the end")


async def _drain(life: ProcessLife, drain: Callable[[], Awaitable[None]], timeout_s: float) -> None:
    """Whatever becomes of the drain, the process ends after it; so its failure is told, not raised."""
    draining = asyncio.ensure_future(drain())
    stopping = asyncio.ensure_future(life.wait(Phase.STOPPED))
    try:
        await asyncio.wait((draining, stopping), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            log.warning("giving up the drain: %s", life.reason if stopping.done() else f"not over in {timeout_s:g} s")
    finally:
        draining.cancel()
        stopping.cancel()
        outcome, _ = await asyncio.gather(draining, stopping, return_exceptions=True)
    if isinstance(outcome, Exception):
        log.error("the drain failed", exc_info=outcome)


async def _say(farewell: Callable[[], Awaitable[None]]) -> None:
    """As of the drain, its failure is told, not raised."""
    try:
        async with asyncio.timeout(FAREWELL_TIMEOUT_S):
            await farewell()
    except TimeoutError:
        log.warning("giving up the farewell: not over in %g s", FAREWELL_TIMEOUT_S)
    except Exception:
        log.exception("the farewell failed")


class _Server(uvicorn.Server):
    """uvicorn without its own ideas about signals and logs, and with an event for "it answers"."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            http=BoundedHttpProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        super().__init__(config)
        self._app = app
        self._close_timeout_s: float = CLOSE_TIMEOUT_S
        self._cut = False
        self.answering = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self, at_once: bool) -> None:
        """Let `serve` return: when connections have ended, or after a second, or at once."""
        if at_once:
            self._close_timeout_s = 0  # `force_exit` would leave the lifespan task behind
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answering.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End every connection, then let uvicorn do the rest: what it would have to cut off itself, such as the streams
        that peers hold open for as long as we live, it would report as an error."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if not await self._ended(self._close_timeout_s):
            self._cut = True
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            while not await self._ended(CUT_TIMEOUT_S):
                for task in list(self.server_state.tasks):
                    task.cancel()
        await super().shutdown(sockets)

    async def _ended(self, timeout_s: float) -> bool:
        """Whether all handlers have returned, within the timeout."""
        running = set(self.server_state.tasks)
        return not running or not (await asyncio.wait(running, timeout=timeout_s))[1]

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What is cancelled because its connection was cut has nobody left to answer."""
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._cut or scope["type"] != "http":
                raise
