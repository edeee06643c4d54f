"""An owner of KV blocks that says whatever a test wants: over real HTTP, beside a real arena and transport.

`LyingOwner` answers like an honest one except where it was told otherwise; `raw_server` does not even speak HTTP.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.checksum import checksums
from kv_transfer.routes import (
    CONNECT_PATH,
    HANDOFF_PATH,
    HELLO_PATH,
    PRESENCE_PATH,
    PROBE_PATH,
    RELEASE_PATH,
    RENEW_PATH,
)
from kv_transfer.transports.inproc import InprocTransport
from kv_transfer.transports.transport_set import TransportSet
from protocol.ids import new_incarnation
from protocol.tokens import SampledToken
from protocol.transfer import (
    BlocksReady,
    Introduction,
    LeasesHeld,
    LeaseState,
    OpenHandoff,
    PrefillDone,
    ProbePush,
    ProbeResult,
    ReleaseLease,
    RenewLease,
    TransferTicket,
)
from protocol.wire import WIRE_VERSION, Hello, encode_frame
from runtime.rpc_server import get_route, message_route, stream_route
from tests.support.kv_owner import (
    CLUSTER_KEY,
    CONTEXT,
    LAYOUT,
    NUM_BLOCKS,
    NUM_SCRATCH_BLOCKS,
    OWNER,
    PHASES,
    fill,
    serving,
)

Frames = Callable[[], AsyncIterator[bytes]]


class LyingOwner:
    """`hello`, `introduction` and `frames` are what it answers; change them before they are asked for.

    `released` are the tickets that its reader gave back.
    """

    def __init__(self, url: str) -> None:
        self.arena = HostArena(NUM_BLOCKS, LAYOUT.block_bytes, NUM_SCRATCH_BLOCKS)
        fill(self.arena, seed=3)
        self.transport = InprocTransport(self.arena, lambda _ticket, _ids: True)
        self.url = url
        self.incarnation = new_incarnation()
        self.hello: object = Hello(WIRE_VERSION, "prefill-0", self.incarnation, LAYOUT.fingerprint)
        self.introduction: object = TransportSet(self.arena, [self.transport]).introduce(
            OWNER, self.incarnation, LAYOUT
        )
        self.frames: Frames = lambda: _each([self.ready(0, [0, 1]), self.done()])
        self.holds = True
        self.writes = False
        self.released: list[str] = []
        self.leaves = asyncio.Event()

    def ticket(self, request_id: str = "req-1", num_tokens: int = 32, ttl_s: float = 30.0) -> TransferTicket:
        return TransferTicket(
            ticket_id=f"ticket-{request_id}",
            request_id=request_id,
            owner="prefill-0",
            incarnation=self.incarnation,
            layout_fingerprint=LAYOUT.fingerprint,
            control_url=self.url,
            num_tokens=num_tokens,
            context_hash=CONTEXT,
            ttl_s=ttl_s,
        )

    def ready(self, first_block: int, block_ids: list[int], sums: list[int] | None = None) -> bytes:
        found = checksums(self.arena, [block_id for block_id in block_ids if 0 <= block_id < NUM_BLOCKS])
        return encode_frame(BlocksReady(first_block, tuple(block_ids), found if sums is None else tuple(sums)))

    def done(self) -> bytes:
        return encode_frame(PrefillDone(SampledToken(7), False, 0.0, PHASES))

    def say(self, *frames: bytes) -> None:
        """Answer a hand-off with these, and end the stream."""
        self.frames = lambda: _each(list(frames))

    async def _stay(self) -> AsyncIterator[bytes]:
        yield encode_frame(Hello(WIRE_VERSION, "prefill-0", self.incarnation, LAYOUT.fingerprint))
        await self.leaves.wait()

    def app(self) -> Starlette:
        async def hello() -> object:
            return self.hello

        async def connect(_: Introduction) -> object:
            return self.introduction

        async def handoff(_: OpenHandoff) -> AsyncIterator[bytes]:
            return self.frames()

        async def presence(_: Hello) -> AsyncIterator[bytes]:
            return self._stay()

        async def probe(_: ProbePush) -> ProbeResult:
            return ProbeResult(latency_s=1e-5, bytes_per_s=1e9)

        async def renew(message: RenewLease) -> LeasesHeld:
            return LeasesHeld((self.holds,) * len(message.ticket_ids))

        async def release(message: ReleaseLease) -> LeaseState:
            self.released.append(message.ticket_id)
            return LeaseState(self.holds, writing=self.writes)

        return Starlette(
            routes=[
                get_route(HELLO_PATH, hello, CLUSTER_KEY),
                message_route(CONNECT_PATH, Introduction, connect, CLUSTER_KEY),
                message_route(PROBE_PATH, ProbePush, probe, CLUSTER_KEY),
                stream_route(PRESENCE_PATH, Hello, presence, CLUSTER_KEY),
                stream_route(HANDOFF_PATH, OpenHandoff, handoff, CLUSTER_KEY),
                message_route(RENEW_PATH, RenewLease, renew, CLUSTER_KEY),
                message_route(RELEASE_PATH, ReleaseLease, release, CLUSTER_KEY),
            ]
        )


@contextlib.asynccontextmanager
async def lying_owner() -> AsyncIterator[LyingOwner]:
    listener = socket.create_server(("127.0.0.1", 0))
    owner = LyingOwner(f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        async with serving(owner.app(), listener):
            yield owner
            owner.leaves.set()
    finally:
        await owner.transport.close()
        owner.arena.close()


@contextlib.asynccontextmanager
async def raw_server(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]],
) -> AsyncIterator[str]:
    """Yields its URL. Connections end with the context, whatever `answer` is doing."""
    handlers: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await answer(reader, writer)
        finally:
            handlers.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(handlers):
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
        await server.wait_closed()


async def _each(frames: list[bytes]) -> AsyncIterator[bytes]:
    for frame in frames:
        yield frame
