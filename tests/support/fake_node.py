"""A node without an engine: speaks the node API over real HTTP, registers like a real one, and answers from a script.

Output token `i` of any request is `script[i % len(script)]`, so that a sequence that moves between nodes must come out the
same. `hold_at` stops before that output position until `go()`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fake_store import FakeStore
from starlette.applications import Starlette

from kv_store.admin import admin_routes
from protocol.block_hash import context_hash
from protocol.errors import Draining, HeadraceError
from protocol.ids import RequestId, RouterId, new_incarnation, new_ticket_id
from protocol.kv_events import AllBlocksCleared, BlocksStored, KVEventBatch
from protocol.kv_layout import KVLayout
from protocol.phases import DecodePhases, HandoffPhases, PrefillPhases
from protocol.requests import CancelRequest, DecodeAccepted, DecodeRequest, PrefillAccepted, PrefillRequest
from protocol.sampling import SamplingParams
from protocol.tokens import (
    FinishReason,
    OpenTokenStream,
    PromptComputed,
    SampledToken,
    SequenceFailed,
    SequenceFinished,
    TokenChunk,
    TokenMessage,
)
from protocol.transfer import TransferTicket
from protocol.wire import WIRE_VERSION
from protocol.workers import Role, WorkerInfo, WorkerLoad
from runtime.life import Phase, ProcessLife
from runtime.registration import KVEventFeed, Registration
from runtime.rpc_client import RpcClient
from runtime.rpc_server import message_route, stream_route
from runtime.serving import bind_socket, serve_sockets, socket_url
from runtime.token_outbox import TokenOutbox

LAYOUT = KVLayout(
    model="tiny",
    revision="1",
    dtype="float32",
    num_layers=2,
    num_kv_heads=2,
    head_dim=16,
    block_size=16,
    rope="none",
)
NUM_CACHED_TOKENS = 16
PREFILL_PHASES = PrefillPhases(queue_s=0.0001, prefill_s=0.0002)
DECODE_PHASES = DecodePhases(HandoffPhases(wire_s=0.0001, join_s=0.0002), decode_s=0.0004)


class FakeNode:
    """`requests` and `cancelled` are what it was asked for, `sent` its tokens. `refusal` is raised on dispatch, `failure` sent at `hold_at`,
    nothing at all once `frozen`."""

    def __init__(
        self,
        role: Role,
        worker_id: str,
        router_control_url: str,
        script: Sequence[int],
        *,
        max_model_len: int = 256,
        cluster_key: str | None = None,
    ) -> None:
        self.role: Role = role
        self.worker_id = worker_id
        self.script = list(script)
        self.requests: list[Any] = []
        self.cancelled: list[str] = []
        self.sent: list[int] = []
        self.hold_at: int | None = None
        self.refusal: HeadraceError | None = None
        self.failure: HeadraceError | None = None
        self.frozen = False
        self.num_cached_tokens = NUM_CACHED_TOKENS
        self.stored: tuple[bytes, ...] = ()
        self.store = FakeStore(worker_id)
        self.outbox = TokenOutbox(self._on_lost)
        self._held = asyncio.Event()
        self._router = router_control_url
        self._max_model_len = max_model_len
        self._key = cluster_key
        self._life = ProcessLife()
        self._stack = AsyncExitStack()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.incarnation = new_incarnation()
        self.url = ""

    async def start(self) -> None:
        bound = bind_socket("127.0.0.1", 0)
        self.url = socket_url(bound)
        app = Starlette(
            routes=[
                stream_route("/node/v1/tokens", OpenTokenStream, self._open, self._key),
                message_route("/node/v1/cancel", CancelRequest, self._cancel, self._key),
                message_route("/node/v1/prefill", PrefillRequest, self._prefill, self._key),
                message_route("/node/v1/decode", DecodeRequest, self._decode, self._key),
                *admin_routes(self.store, self._key),
            ]
        )
        client = await self._stack.enter_async_context(RpcClient(self._key))
        feed = KVEventFeed(take=lambda: None, snapshot=self._snapshot)
        self.registration = Registration(client, (self._router,), self._info(), self._load, feed)
        serving = asyncio.Event()
        self._tasks = [
            asyncio.create_task(
                serve_sockets([(app, bound)], self._life, self._no_drain, 0.1, lambda _: serving.set())
            ),
            asyncio.create_task(self.registration.run()),
        ]
        await serving.wait()

    async def die(self) -> None:
        """Streams end, nothing answers any more."""
        for task in [*self._tasks[1:], *self._running.values()]:
            task.cancel()
        self._life.stop("killed")
        self.outbox.close()
        await asyncio.gather(*self._tasks, *self._running.values(), return_exceptions=True)
        self._tasks = []
        await self._stack.aclose()

    def go(self) -> None:
        self._held.set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def _info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            wire_version=WIRE_VERSION,
            role=self.role,
            control_url=self.url,
            served_model="tiny",
            vocab_size=400,
            max_model_len=self._max_model_len,
            num_blocks=1000,
            layout=LAYOUT,
            transports=("inproc",),
        )

    def _load(self) -> WorkerLoad:
        return WorkerLoad(running=0, waiting=0, waiting_tokens=0, free_blocks=1000, steps=0, draining=False)

    def _snapshot(self) -> KVEventBatch:
        return KVEventBatch(self.incarnation, 0, (AllBlocksCleared(), BlocksStored(self.stored)))

    async def _no_drain(self) -> None:
        return None

    async def _open(self, message: OpenTokenStream) -> AsyncIterator[bytes]:
        if self._life.phase is Phase.STOPPED:
            raise Draining("killed")
        return self._frames(self.outbox.open(RouterId(message.router_id)))

    async def _frames(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for frame in frames:
            if self.frozen:
                await asyncio.Event().wait()
            yield frame

    async def _cancel(self, message: CancelRequest) -> None:
        for request_id in message.request_ids:
            self.cancelled.append(request_id)
            self._stop(request_id)

    def _on_lost(self, request_ids: list[RequestId]) -> None:
        for request_id in request_ids:
            self._stop(request_id)

    def _stop(self, request_id: str) -> None:
        self.outbox.forget(RequestId(request_id))
        if task := self._running.pop(request_id, None):
            task.cancel()

    async def _prefill(self, request: PrefillRequest) -> PrefillAccepted:
        self._accept(request, self._run_prefill(request))
        token_ids = request.prompt_token_ids + request.emitted_token_ids
        return PrefillAccepted(
            TransferTicket(
                ticket_id=new_ticket_id(),
                request_id=request.request_id,
                owner=self.worker_id,
                incarnation=self.incarnation,
                layout_fingerprint=LAYOUT.fingerprint,
                control_url=self.url,
                num_tokens=len(token_ids),
                context_hash=context_hash(LAYOUT.identity, request.cache_salt, token_ids),
                ttl_s=30,
            )
        )

    async def _decode(self, request: DecodeRequest) -> DecodeAccepted:
        self._accept(request, self._run_decode(request))
        return DecodeAccepted(request.request_id)

    def _accept(self, request: PrefillRequest | DecodeRequest, work: Any) -> None:
        if self.refusal is not None:
            work.close()
            raise self.refusal
        try:
            self.outbox.expect(RequestId(request.request_id), RouterId(request.router_id))
        except HeadraceError:
            work.close()
            raise
        self.requests.append(request)
        task = self._running[request.request_id] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._running.pop(request.request_id, None))

    async def _run_prefill(self, request: PrefillRequest) -> None:
        index = len(request.emitted_token_ids)
        if not await self._reach(index, request.request_id):
            return
        token = self._token(index, request.sampling)
        messages: list[TokenMessage] = [
            TokenChunk(request.request_id, index, (token,)),
            PromptComputed(request.request_id, self.num_cached_tokens, PREFILL_PHASES),
        ]
        reason, stop_token_id = self._end(index, token.token_id, request.sampling)
        if reason is not None:
            none = DecodePhases(HandoffPhases(), 0.0)
            messages.append(SequenceFinished(request.request_id, reason, none, stop_token_id))
        self.outbox.post(messages)
        self.outbox.forget(RequestId(request.request_id))

    async def _run_decode(self, request: DecodeRequest) -> None:
        index = len(request.emitted_token_ids)
        while True:
            if not await self._reach(index, request.request_id):
                return
            token = self._token(index, request.sampling)
            self.sent.append(token.token_id)
            messages: list[TokenMessage] = [TokenChunk(request.request_id, index, (token,))]
            if request.ticket is None and index == len(request.emitted_token_ids):
                messages.append(PromptComputed(request.request_id, self.num_cached_tokens, PREFILL_PHASES))
            self.outbox.post(messages)
            reason, stop_token_id = self._end(index, token.token_id, request.sampling)
            if reason is not None:
                break
            index += 1
            await asyncio.sleep(0)
        self.outbox.post([SequenceFinished(request.request_id, reason, DECODE_PHASES, stop_token_id)])

    async def _reach(self, index: int, request_id: str) -> bool:
        if index == self.hold_at:
            if self.failure is not None:
                self.outbox.post([SequenceFailed(request_id, self.failure.to_info())])
                return False
            await self._held.wait()
        return True

    def _token(self, index: int, sampling: SamplingParams) -> SampledToken:
        token_id = self.script[index % len(self.script)]
        if sampling.logprobs is None:
            return SampledToken(token_id)
        return SampledToken(token_id, -0.5, tuple((token_id + i, -0.5 - i) for i in range(sampling.logprobs)))

    def _end(self, index: int, token_id: int, sampling: SamplingParams) -> tuple[FinishReason | None, int | None]:
        if token_id in sampling.stop_token_ids and index >= sampling.min_tokens:
            return "stop", token_id
        return ("length" if index + 1 >= sampling.max_tokens else None), None


async def until(condition: Callable[[], object], timeout_s: float = 10) -> None:
    """Wait for something to become true on this loop."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def nodes(*members: FakeNode) -> AsyncIterator[None]:
    """Start nodes, and wait until their router has taken them in."""
    try:
        for member in members:
            await member.start()
        await until(lambda: all(member.registration.registered_with for member in members))
        yield
    finally:
        await asyncio.gather(*(member.die() for member in members))
