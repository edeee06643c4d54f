"""NodeLink: all that the router exchanges with one incarnation of one node.

One token stream carries the tokens of all requests there; it is open for as long as the link lives, and opened again when it
was cut. While it is not open, the node is not to be given work. When it ends, is silent for SILENCE_S, skips a frame, or
meets a bug of ours, every request that is attached gets NodeLost at once: the node has cancelled them by then, or does when it notices.

A cancel never loses the race against the request that it is to stop: it is repeated once the call that was under way
has ended.
"""

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from protocol.errors import HeadraceError, MalformedMessage, NodeLost
from protocol.ids import Incarnation, RequestId, RouterId, WorkerId
from protocol.requests import CancelRequest, DecodeAccepted, DecodeRequest, PrefillAccepted, PrefillRequest
from protocol.tokens import OpenTokenStream, TokenFrame, TokenMessage
from protocol.transfer import KVSource, TransferTicket
from protocol.wire import decode
from protocol.workers import WorkerInfo
from runtime.rpc_client import RpcClient

SILENCE_S = 3.0
SECOND_CHANCE_S = 0.5
"""What silence lasts longer. After a pause of this very process its timers are due before it has read what it was sent
meanwhile; a node is lost only if there was nothing to read."""

NEVER_S = 86_400.0
CALL_TIMEOUT_S = 5.0
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0
CANCEL_BATCH = 1024
CANCEL_ATTEMPTS = 3
"""A node that takes none of them has lost its stream meanwhile, which cancels everything there."""

T = TypeVar("T")
Sink = Callable[[TokenMessage | NodeLost], None]

log = logging.getLogger(__name__)


class NodeLink:
    """`run()` for the link's whole life, in a task; it closes what it opened when that task is cancelled."""

    def __init__(self, client: RpcClient, info: WorkerInfo, router_id: RouterId, on_open: Callable[[], None]) -> None:
        self._client = client
        self._on_open = on_open
        self._router_id = router_id
        self._url = info.control_url
        self.worker_id = WorkerId(info.worker_id)
        self.incarnation = Incarnation(info.incarnation)
        self._sinks: dict[RequestId, Sink] = {}
        self._open = asyncio.Event()
        self._to_cancel: asyncio.Queue[RequestId] = asyncio.Queue()
        self._in_call: set[RequestId] = set()
        self._cancelled_in_call: set[RequestId] = set()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def as_source(self, num_blocks: int) -> KVSource:
        """This node, as one that others may borrow a context's first blocks from."""
        return KVSource(
            worker=self.worker_id, incarnation=self.incarnation, control_url=self._url, num_blocks=num_blocks
        )

    async def wait_open(self, timeout_s: float) -> None:
        """Raise NodeLost unless the token stream is open within the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._open.wait()
        except TimeoutError as error:
            raise NodeLost(
                f"no token stream from {self.worker_id}: its control_url {self._url} cannot be reached from the router; "
                "set the node's advertise_url"
            ) from error

    async def run(self) -> None:
        """A bug met here costs this node its stream, and nobody else anything."""
        try:
            while True:
                try:
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(self._keep_stream(), name=f"token-stream:{self.worker_id}")
                        tasks.create_task(self._send_cancels(), name=f"cancels:{self.worker_id}")
                except* Exception:
                    log.exception("the connection to %s failed", self.worker_id)
                self._lose(NodeLost(f"{self.worker_id} was lost: its connection failed in the router"))
                await asyncio.sleep(MAX_BACKOFF_S)
        finally:
            self._lose(NodeLost(f"the connection to {self.worker_id} was given up"))

    def attach(self, request_id: RequestId, sink: Sink) -> None:
        """Messages of this request go to `sink`, in order, until it is detached. Raises NodeLost without a stream."""
        if not self.is_open:
            raise NodeLost(f"{self.worker_id} cannot be reached")
        self._sinks[request_id] = sink

    def detach(self, request_id: RequestId) -> None:
        self._sinks.pop(request_id, None)

    async def prefill(self, request: PrefillRequest) -> TransferTicket:
        """Raises what the node refuses with, NodeLost if it does not answer."""
        answer = await self._call("prefill", request, PrefillAccepted, RequestId(request.request_id))
        ticket = answer.ticket
        if (ticket.request_id, ticket.incarnation) != (request.request_id, self.incarnation):
            raise NodeLost(f"{self.worker_id} answered with a ticket that is not for this request")
        return ticket

    async def decode(self, request: DecodeRequest) -> None:
        """Raises what the node refuses with, NodeLost if it does not answer."""
        await self._call("decode", request, DecodeAccepted, RequestId(request.request_id))

    def cancel(self, request_id: RequestId) -> None:
        """Stop a request there and free what it holds, soon. Does not wait."""
        self._to_cancel.put_nowait(request_id)
        if request_id in self._in_call:
            self._cancelled_in_call.add(request_id)

    async def _call(self, name: str, message: object, reply_type: type[T], request_id: RequestId) -> T:
        self._in_call.add(request_id)
        try:
            return await self._client.call(f"{self._url}/node/v1/{name}", message, reply_type, CALL_TIMEOUT_S)
        except HeadraceError:
            raise
        except Exception as error:
            log.exception("calling %s of %s failed", name, self.worker_id)
            raise NodeLost(f"calling {self.worker_id} failed in the router") from error
        finally:
            self._in_call.discard(request_id)
            if request_id in self._cancelled_in_call:
                self._cancelled_in_call.discard(request_id)
                self._to_cancel.put_nowait(request_id)

    async def _keep_stream(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                await self._read_stream()
                lost = NodeLost(f"{self.worker_id} ended its token stream")
            except HeadraceError as error:
                lost = NodeLost(f"{self.worker_id} was lost: {error.message}")
            if self.is_open:
                log.warning("%s", lost.message)
                backoff_s = FIRST_BACKOFF_S
            self._lose(lost)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _read_stream(self) -> None:
        expected = 0
        message = OpenTokenStream(self._router_id)
        async with (
            _SilenceLimit() as silence,
            self._client.stream(f"{self._url}/node/v1/tokens", message, NEVER_S) as bodies,
        ):
            async for body in bodies:
                silence.heard()
                frame = decode(body, TokenFrame)
                if frame.number != expected:
                    raise MalformedMessage(f"frame {frame.number} came where {expected} was due")
                expected += 1
                self._note_open()
                for token_message in frame.messages:
                    sink = self._sinks.get(RequestId(token_message.request_id))
                    if sink is not None:
                        sink(token_message)

    def _note_open(self) -> None:
        if not self.is_open:
            self._open.set()
            self._on_open()

    def _lose(self, lost: NodeLost) -> None:
        self._open.clear()
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(lost)

    async def _send_cancels(self) -> None:
        while True:
            ids = [await self._to_cancel.get()]
            while len(ids) < CANCEL_BATCH and not self._to_cancel.empty():
                ids.append(self._to_cancel.get_nowait())
            for attempt in range(CANCEL_ATTEMPTS):
                try:
                    await self._client.notify(f"{self._url}/node/v1/cancel", CancelRequest(tuple(ids)), CALL_TIMEOUT_S)
                    break
                except HeadraceError as error:
                    log.warning("%s did not take %d cancels: %s", self.worker_id, len(ids), error.message)
                    await asyncio.sleep(FIRST_BACKOFF_S * 2**attempt)


class _SilenceLimit:
    """Raises NodeLost from its block when `heard` was not called for SILENCE_S, nor in the second chance after it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        self.heard()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as silence:
            raise NodeLost(f"silent for {SILENCE_S:g} s") from silence

    def heard(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._limit.when() is not None and not self._limit.expired():
            self._limit.reschedule(None)
        self._timer = self._loop.call_later(SILENCE_S, self._give_second_chance)

    def _give_second_chance(self) -> None:
        self._limit.reschedule(self._loop.time() + SECOND_CHANCE_S)
