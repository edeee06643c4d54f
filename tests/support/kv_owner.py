"""An owner of KV blocks for tests: arena, exports, transport and control routes, in this process or in a child.

`running_owner` serves in the test's own event loop. `OwnerProcess` is another process driven over a pipe, so that it can
be stopped, killed and restarted by pid. Such processes are forked from a clean server process that has imported torch
and nothing of NIXL, which takes a tenth of the time of a spawn and is as safe.
"""

import asyncio
import contextlib
import importlib.util
import multiprocessing
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette

from kv_transfer.handoff.exports import ExportTable
from kv_transfer.meeting.link_report import LinkReporter
from kv_transfer.meeting.pushers import Pushers
from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.staging import HostStaging, Staging
from kv_transfer.routes import kv_routes
from kv_transfer.transport import Transport
from kv_transfer.transports.factory import start_transports
from kv_transfer.transports.transport_set import TransportSet
from protocol.ids import ContextHash, Incarnation, RequestId, WorkerId, new_incarnation
from protocol.kv_layout import KVLayout
from protocol.phases import PrefillPhases
from protocol.tokens import SampledToken
from protocol.transfer import Introduction, KVSource, TransferTicket, TransportKind
from runtime.clock import Clock, MonotonicClock
from runtime.node_config import TransferOptions
from tests.support.kv_lender import CachedBlocks
from tests.support.signals import send_signal

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.support.kv_owner"])

CLUSTER_KEY = "a-cluster-key-for-tests"
PHASES = PrefillPhases(queue_s=0.25, prefill_s=0.5)
FIRST_TOKEN = SampledToken(42)
LAYOUT = KVLayout(
    model="test-model",
    revision="r1",
    dtype="float32",
    num_layers=2,
    num_kv_heads=2,
    head_dim=16,
    block_size=16,
    rope="none",
)
NUM_BLOCKS = 64
UCX: list[TransportKind] = ["ucx"] if importlib.util.find_spec("ucxx") else []
"""An optional dependency: its transport is tested where it is installed."""
NUM_SCRATCH_BLOCKS = 4
OWNER = WorkerId("prefill-0")
CONTEXT = ContextHash(b"a context's hash")
"""Of every request here: readers of KV do not look at it, decode nodes do."""


def fill(arena: HostArena, seed: int) -> None:
    generator = np.random.default_rng(seed)
    arena.memory[:] = generator.integers(0, 256, arena.size_bytes, dtype=np.uint8).tobytes()


@dataclass
class Owner:
    staging: Staging
    transports: TransportSet
    pushers: Pushers
    exports: ExportTable
    url: str
    incarnation: Incarnation
    cached: CachedBlocks
    released: list[RequestId] = field(default_factory=list)

    @property
    def transport(self) -> Transport:
        """The first, which is the only one where a test names a kind."""
        return next(iter(self.transports))

    def introduction(self) -> Introduction:
        return self.transports.introduce(OWNER, self.incarnation, LAYOUT)

    @property
    def arena(self) -> HostArena:
        assert isinstance(self.staging.arena, HostArena)
        return self.staging.arena

    def source(self, num_blocks: int) -> KVSource:
        return KVSource(worker=OWNER, incarnation=self.incarnation, control_url=self.url, num_blocks=num_blocks)

    def open(self, request_id: str, num_tokens: int) -> TransferTicket:
        """A prefill that has begun."""
        return self.exports.open(RequestId(request_id), num_tokens, CONTEXT)

    def hand_off(self, request_id: str, num_tokens: int, block_ids: list[int]) -> TransferTicket:
        """A prefill that is over already."""
        ticket = self.open(request_id, num_tokens)
        self.exports.publish(RequestId(request_id), 0, block_ids)
        self.finish(request_id)
        return ticket

    def finish(self, request_id: str) -> None:
        self.exports.finish(RequestId(request_id), FIRST_TOKEN, False, MonotonicClock().now(), PHASES)


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(port: int, host: str = "127.0.0.1") -> socket.socket:
    """Says that it is TCP: asyncio turns Nagle's algorithm off only for sockets that do, and 40 ms lie in that."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen()
    return listener


@contextlib.asynccontextmanager
async def serving(app: Starlette, listener: socket.socket) -> AsyncIterator[None]:
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1, ws="none")
    server = _QuietServer(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield
    finally:
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def running_owner(
    kind: TransportKind,
    *,
    port: int = 0,
    host: str = "127.0.0.1",
    layout: KVLayout = LAYOUT,
    options: TransferOptions | None = None,
    clock: Clock | None = None,
    pusher_clock: Clock | None = None,
    seed: int = 1,
    staging: Staging | None = None,
    on_released: Callable[[RequestId], object] | None = None,
) -> AsyncIterator[Owner]:
    """`staging`: where the blocks come from, if not from an arena filled with noise. Closed in the end with its arena."""
    options = options or TransferOptions(transport=kind, stall_timeout_s=2.0)
    listener = _listen(port, host)
    url = f"http://{host}:{listener.getsockname()[1]}"
    incarnation = new_incarnation()
    staging = staging or HostStaging(HostArena(NUM_BLOCKS, layout.block_bytes, NUM_SCRATCH_BLOCKS))
    arena = staging.arena
    if isinstance(arena, HostArena):
        fill(arena, seed)
    released: list[RequestId] = []

    def release(request_id: RequestId) -> None:
        released.append(request_id)
        if on_released is not None:
            on_released(request_id)

    transports = start_transports(
        options,
        arena,
        incarnation=incarnation,
        host=host,
        may_read=lambda ticket_id, block_ids: exports.may_read(ticket_id, block_ids),
    )
    pushers = Pushers(transports, pusher_clock or MonotonicClock())
    exports = ExportTable(
        staging,
        owner=OWNER,
        incarnation=incarnation,
        layout=layout,
        control_url=url,
        options=options,
        clock=clock or MonotonicClock(),
        on_released=release,
        push_links=pushers,
    )
    reporter = LinkReporter(OWNER, transports, MonotonicClock(), pushers=pushers)
    cached = CachedBlocks(exports, layout.block_size, NUM_BLOCKS, options.stall_timeout_s)
    routes = kv_routes(
        exports,
        transports,
        pushers,
        layout,
        worker_id=OWNER,
        incarnation=incarnation,
        cluster_key=CLUSTER_KEY,
        lend=cached.lender.lend,
    )
    reaper = asyncio.create_task(exports.run())
    try:
        async with pushers, exports, serving(Starlette(routes=[*routes, reporter.route(CLUSTER_KEY)]), listener):
            yield Owner(staging, transports, pushers, exports, url, incarnation, cached, released)
            await exports.stop()
    finally:
        reaper.cancel()
        await asyncio.gather(reaper, return_exceptions=True)
        await staging.close()
        await transports.close()
        if isinstance(arena, HostArena):
            arena.close()


class OwnerProcess:
    """A spawned owner. Its blocks hold what `fill(arena, seed)` writes, so that a test can work them out."""

    def __init__(self, kind: TransportKind, port: int = 0, seed: int = 1) -> None:
        self._pipe, theirs = _processes.Pipe()
        ucx = {name: value for name, value in os.environ.items() if name.startswith("UCX_")}
        self.process = _processes.Process(target=_main, args=(theirs, kind, port, seed, ucx), daemon=True)
        self.process.start()
        theirs.close()
        self.pid = self.process.pid or 0
        self.port: int = self._reply()

    def hand_off(self, request_id: str, num_tokens: int, block_ids: list[int]) -> TransferTicket:
        ticket: TransferTicket = self.ask("hand_off", request_id, num_tokens, block_ids)
        return ticket

    def ask(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._reply()

    def signal(self, number: int) -> None:
        send_signal(self.pid, number)

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self._pipe.close()
        self.process.close()

    def _reply(self) -> Any:
        if not self._pipe.poll(30):
            raise TimeoutError("the owner process does not answer")
        return self._pipe.recv()


def _main(pipe: Connection, kind: TransportKind, port: int, seed: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    asyncio.run(_serve(pipe, kind, port, seed))


async def _serve(pipe: Connection, kind: TransportKind, port: int, seed: int) -> None:
    async with running_owner(kind, port=port, seed=seed) as owner:
        pipe.send(int(owner.url.rsplit(":", 1)[1]))
        while True:
            try:
                method, arguments = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            pipe.send(_act(owner, method, arguments))


def _act(owner: Owner, method: str, arguments: tuple[Any, ...]) -> Any:
    match method:
        case "hand_off":
            return owner.hand_off(*arguments)
        case "open":
            return owner.open(*arguments)
        case "publish":
            return owner.exports.publish(*arguments)
        case "finish":
            return owner.finish(*arguments)
        case "stats":
            return owner.exports.stats()
        case "released":
            return owner.released
        case "overwrite":
            for block_id in arguments[0]:
                owner.arena.block(block_id)[:] = bytes(owner.arena.block_bytes)
            return None
        case _:
            raise ValueError(method)
