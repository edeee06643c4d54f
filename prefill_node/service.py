"""PrefillService: between the control plane, the engine and the exports. Lives on the node's event loop.

A request is admitted by opening an export and submitting to the engine; from then on the engine's events drive both the
reader's stream (blocks as they become final) and the router's (the first token). Where other nodes hold its beginning, that
is borrowed before the rest is computed; others borrow from this node in the same way. What ends a request early, from
whatever side, ends it on all three: engine, export, token stream.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from engine.engine import Engine
from engine.events import BlocksComputed, EngineEvent, Failed, Pinned, PrefillFinished, Reserved
from engine.request import EngineRequest, Mode
from kv_transfer.exchange import NodeExchange
from kv_transfer.memory.staging import StagedBlocks
from protocol.block_hash import context_hash
from protocol.errors import Cancelled, HeadraceError
from protocol.ids import RequestId, RouterId
from protocol.phases import DecodePhases, HandoffPhases
from protocol.requests import PrefillAccepted, PrefillRequest
from protocol.tokens import PromptComputed, SequenceFailed, SequenceFinished, TokenChunk, TokenMessage
from runtime.metrics import NodeMetrics
from runtime.token_outbox import TokenOutbox

MAKE_WAY_S = 200e-6
"""For how long the engine makes way for the event loop when a prefill is done: what that needs to say so to the reader. On
two cores that both compute it took 1.4 ms in the median and up to 8 ms before, and takes 0.1 ms now."""


class PrefillService:
    """The exports of `exchange` call `engine.release` when a reader is done with a request's blocks."""

    def __init__(
        self,
        engine: Engine,
        exchange: NodeExchange,
        outbox: TokenOutbox,
        metrics: NodeMetrics,
        vocab_size: int,
        layout_identity: str,
    ) -> None:
        self._engine = engine
        self._exports = exchange.exports
        self._prefixes = exchange.prefixes
        self._lender = exchange.lender
        self._outbox = outbox
        self._metrics = metrics
        self._vocab_size = vocab_size
        self._layout_identity = layout_identity
        self._first_index: dict[RequestId, int] = {}

    def prefill(self, request: PrefillRequest) -> PrefillAccepted:
        """Admit one request. Raises a HeadraceError and leaves nothing behind if it cannot be taken."""
        request.sampling.validate(self._vocab_size)
        request_id = RequestId(request.request_id)
        self._outbox.expect(request_id, RouterId(request.router_id))
        token_ids = request.prompt_token_ids + request.emitted_token_ids
        context = context_hash(self._layout_identity, request.cache_salt, token_ids)
        try:
            ticket = self._exports.open(request_id, len(token_ids), context)
        except HeadraceError:
            self._outbox.forget(request_id)
            raise
        self._first_index[request_id] = len(request.emitted_token_ids)
        try:
            self._engine.submit(EngineRequest.of(request, Mode.PREFILL_ONLY, self._prefixes.expect(request)))
        except HeadraceError as error:
            self._prefixes.forget(request_id)
            self._first_index.pop(request_id, None)
            self._exports.fail(request_id, error)
            self._outbox.forget(request_id)
            raise
        return PrefillAccepted(ticket)

    def cancel(self, request_ids: Iterable[RequestId]) -> None:
        """Stop requests wherever they are. Unknown ones are no error."""
        ids = list(request_ids)
        self._engine.cancel(ids)
        self._prefixes.cancel(ids)
        for request_id in ids:
            self._first_index.pop(request_id, None)
            self._exports.fail(request_id, Cancelled("the request was cancelled"))
            self._outbox.forget(request_id)

    def listener(self, loop: asyncio.AbstractEventLoop) -> Callable[[list[EngineEvent]], None]:
        """What the engine is to be started with. Blocks are staged on the engine's own thread, which runs anyway, as far as
        that is quick: on its way to a reader the last chunk then waits for no other thread than the event loop's. And for
        that one the engine makes way: it goes on computing at once otherwise, on the core and with the interpreter lock
        that the event loop needs."""

        def hand_on(events: list[EngineEvent]) -> None:
            if loop.is_closed():
                return
            staged = {e: self._exports.stage_at_once(e.block_ids) for e in events if isinstance(e, BlocksComputed)}
            loop.call_soon_threadsafe(self.on_engine_events, events, staged)
            if any(isinstance(event, PrefillFinished) for event in events):
                time.sleep(MAKE_WAY_S)

        return hand_on

    def on_engine_events(
        self, events: Sequence[EngineEvent], staged: Mapping[BlocksComputed, StagedBlocks | None]
    ) -> None:
        """One step's events, and what has been staged of their blocks. Announcements go out before the first token that
        depends on them."""
        messages: list[TokenMessage] = []
        for event in events:
            match event:
                case BlocksComputed(request_id, first_block, block_ids):
                    self._exports.publish(request_id, first_block, block_ids, staged.get(event))
                case Reserved(request_id, block_ids, num_cached_blocks, _, block_hashes):
                    self._prefixes.reserved(request_id, block_ids, num_cached_blocks, block_hashes)
                case Pinned(pin_id, block_ids):
                    self._lender.pinned(pin_id, block_ids)
                case PrefillFinished():
                    messages += self._finished(event)
                case Failed(request_id, error):
                    self._metrics.requests.labels(error.to_info().code).inc()
                    self._first_index.pop(request_id, None)
                    self._prefixes.cancel([request_id])
                    self._exports.fail(request_id, error)
                    messages.append(SequenceFailed(request_id, error.to_info()))
        self._outbox.post(messages)
        for event in events:
            if isinstance(event, PrefillFinished):
                self._outbox.forget(event.request_id)

    def _finished(self, event: PrefillFinished) -> list[TokenMessage]:
        request_id = event.request_id
        self._metrics.requests.labels("finished").inc()
        self._metrics.phases.labels("queue").observe(event.phases.queue_s)
        self._metrics.phases.labels("prefill").observe(event.phases.prefill_s)
        self._prefixes.forget(request_id)
        index = self._first_index.pop(request_id, None)
        if index is None:
            return []
        over = event.finish_reason is not None
        self._exports.finish(request_id, event.first_token, over, event.computed_at, event.phases)
        messages: list[TokenMessage] = [
            TokenChunk(request_id, index, (event.first_token,)),
            PromptComputed(request_id, event.num_cached_tokens, event.phases),
        ]
        if event.finish_reason is not None:
            none = DecodePhases(HandoffPhases(), 0.0)
            messages.append(SequenceFinished(request_id, event.finish_reason, none, event.stop_token_id))
        return messages
