"""DecodeService: between the control plane, the engine and the hand-offs. Lives on the node's event loop.

A request with a ticket is submitted as an import: the engine reserves its blocks and says so, the hand-off fills them,
the engine decodes. One without is generated here from its first token on. Either way the engine's events are what
the router gets to see.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from decode_node.handoff import Handoffs
from engine.engine import Engine
from engine.events import EngineEvent, Failed, Finished, Pinned, PromptComputed, Reserved, TokensSampled
from engine.request import EngineRequest, Mode
from kv_transfer.exchange import NodeExchange
from kv_transfer.lending.holders import Holders, holders_of
from protocol import tokens
from protocol.block_hash import context_hash
from protocol.errors import Cancelled, HeadraceError, InvalidParameter
from protocol.ids import RequestId, RouterId
from protocol.kv_layout import KVLayout
from protocol.requests import DecodeAccepted, DecodeRequest
from protocol.tokens import SequenceFailed, SequenceFinished, TokenChunk, TokenMessage
from protocol.transfer import TransferTicket
from runtime.clock import Deadline
from runtime.metrics import NodeMetrics
from runtime.token_outbox import TokenOutbox


@dataclass(frozen=True, slots=True)
class _Expected:
    """A hand-off that waits for room here."""

    ticket: TransferTicket
    holders: Holders
    deadline: Deadline


class DecodeService:
    def __init__(
        self,
        engine: Engine,
        exchange: NodeExchange,
        handoffs: Handoffs,
        outbox: TokenOutbox,
        metrics: NodeMetrics,
        vocab_size: int,
        layout: KVLayout,
    ) -> None:
        self._engine = engine
        self._prefixes = exchange.prefixes
        self._lender = exchange.lender
        self._handoffs = handoffs
        self._outbox = outbox
        self._metrics = metrics
        self._vocab_size = vocab_size
        self._layout = layout
        self._expected: dict[RequestId, _Expected] = {}

    def decode(self, request: DecodeRequest) -> DecodeAccepted:
        """Admit one request. Raises a HeadraceError and leaves nothing behind if it cannot be taken."""
        request.sampling.validate(self._vocab_size)
        if request.ticket is not None:
            _check_ticket(request.ticket, request, self._layout.identity)
        request_id = RequestId(request.request_id)
        self._outbox.expect(request_id, RouterId(request.router_id))
        if request.ticket is not None:
            holders = holders_of(request, self._layout, request.ticket.num_tokens)
            self._expected[request_id] = _Expected(request.ticket, holders, Deadline(request.deadline_s))
            self._handoffs.keep(request.ticket)
        try:
            if request.ticket is None:
                self._engine.submit(EngineRequest.of(request, Mode.GENERATE, self._prefixes.expect(request)))
            else:
                self._engine.submit(EngineRequest.of(request, Mode.IMPORT))
        except HeadraceError:
            self._forget(request_id)
            self._outbox.forget(request_id)
            raise
        return DecodeAccepted(request_id)

    def cancel(self, request_ids: Iterable[RequestId]) -> None:
        """Stop requests wherever they are. Unknown ones are no error. A hand-off under way ends first."""
        ids = list(request_ids)
        self._engine.cancel(ids)
        self._handoffs.cancel(ids)
        self._prefixes.cancel(ids)
        for request_id in ids:
            self._forget(request_id)
            self._outbox.forget(request_id)

    def on_engine_events(self, events: Sequence[EngineEvent]) -> None:
        messages: list[TokenMessage] = []
        for event in events:
            match event:
                case Reserved(request_id, block_ids, num_cached_blocks, True, block_hashes):
                    self._prefixes.reserved(request_id, block_ids, num_cached_blocks, block_hashes)
                case Reserved():
                    self._reserved(event)
                case Pinned(pin_id, block_ids):
                    self._lender.pinned(pin_id, block_ids)
                case TokensSampled(request_id, index, sampled):
                    messages.append(TokenChunk(request_id, index, sampled))
                case PromptComputed():
                    messages.append(self._computed(event))
                case Finished():
                    messages.append(self._finished(event))
                case Failed(request_id, error):
                    self._metrics.requests.labels(error.to_info().code).inc()
                    self._forget(request_id)
                    self._prefixes.cancel([request_id])
                    messages.append(SequenceFailed(request_id, error.to_info()))
        self._outbox.post(messages)

    def _reserved(self, event: Reserved) -> None:
        expected = self._expected.pop(event.request_id, None)
        if expected is None:
            self._handoffs.refuse(event, Cancelled("the request was cancelled"))
            return
        deadline_s = max(expected.deadline.remaining_s, 0.001)
        self._handoffs.start(event, expected.ticket, expected.holders, deadline_s)

    def _forget(self, request_id: RequestId) -> None:
        """It will not be imported. No error if it is not waiting for that."""
        self._prefixes.forget(request_id)
        expected = self._expected.pop(request_id, None)
        if expected is not None:
            self._handoffs.drop(expected.ticket)

    def _computed(self, event: PromptComputed) -> tokens.PromptComputed:
        self._prefixes.forget(event.request_id)
        self._metrics.phases.labels("queue").observe(event.phases.queue_s)
        self._metrics.phases.labels("prefill").observe(event.phases.prefill_s)
        return tokens.PromptComputed(event.request_id, event.num_cached_tokens, event.phases)

    def _finished(self, event: Finished) -> SequenceFinished:
        self._metrics.requests.labels("finished").inc()
        self._metrics.phases.labels("decode").observe(event.decode.decode_s)
        if event.imported:
            self._metrics.observe_handoff(event.decode.handoff)
        return SequenceFinished(event.request_id, event.reason, event.decode, event.stop_token_id)


def _check_ticket(ticket: TransferTicket, request: DecodeRequest, layout_identity: str) -> None:
    """Raise InvalidParameter, naming what differs, for a ticket to anything but this request's own context: its blocks
    would be valid KV of something else, which no checksum can tell."""
    token_ids = request.prompt_token_ids + request.emitted_token_ids
    if ticket.request_id != request.request_id:
        raise InvalidParameter(f"the ticket is for request {ticket.request_id}, not for this one", param="ticket")
    if ticket.num_tokens != len(token_ids):
        raise InvalidParameter(
            f"the ticket is for {ticket.num_tokens} tokens, the request has {len(token_ids)}", param="ticket"
        )
    if ticket.context_hash != context_hash(layout_identity, request.cache_salt, token_ids):
        raise InvalidParameter(
            "the ticket is for another context: tokens, cache_salt or model differ from the request's", param="ticket"
        )
