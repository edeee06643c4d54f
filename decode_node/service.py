"""DecodeService: between the control plane, the engine and the hand-offs. Lives on the node's event loop.

A request with a ticket is submitted as an import: the engine reserves its blocks and says so, the hand-off fills them,
the engine decodes. One without is generated here from its first token on. Either way the engine's events are what
the router gets to see.
"""

from collections.abc import Iterable, Sequence

from decode_node.handoff import Handoffs
from engine.engine import Engine
from engine.events import EngineEvent, Failed, Finished, Reserved, TokensSampled
from engine.request import EngineRequest, Mode
from protocol.errors import HeadraceError, InvalidParameter
from protocol.ids import RequestId, RouterId
from protocol.requests import DecodeAccepted, DecodeRequest
from protocol.tokens import SequenceFailed, SequenceFinished, TokenChunk, TokenMessage
from protocol.transfer import TransferTicket
from runtime.clock import Deadline
from runtime.metrics import NodeMetrics
from runtime.token_outbox import TokenOutbox


class DecodeService:
    def __init__(
        self, engine: Engine, handoffs: Handoffs, outbox: TokenOutbox, metrics: NodeMetrics, vocab_size: int
    ) -> None:
        self._engine = engine
        self._handoffs = handoffs
        self._outbox = outbox
        self._metrics = metrics
        self._vocab_size = vocab_size
        self._expected: dict[RequestId, tuple[TransferTicket, Deadline]] = {}

    def decode(self, request: DecodeRequest) -> DecodeAccepted:
        """Admit one request. Raises a HeadraceError and leaves nothing behind if it cannot be taken."""
        request.sampling.validate(self._vocab_size)
        _check_ticket(request)
        request_id = RequestId(request.request_id)
        self._outbox.expect(request_id, RouterId(request.router_id))
        if request.ticket is not None:
            self._expected[request_id] = (request.ticket, Deadline(request.deadline_s))
        try:
            self._engine.submit(
                EngineRequest(
                    request_id=request_id,
                    prompt_token_ids=request.prompt_token_ids,
                    sampling=request.sampling,
                    mode=Mode.GENERATE if request.ticket is None else Mode.IMPORT,
                    emitted_token_ids=request.emitted_token_ids,
                    cache_salt=request.cache_salt,
                    deadline_s=request.deadline_s,
                )
            )
        except HeadraceError:
            self._expected.pop(request_id, None)
            self._outbox.forget(request_id)
            raise
        return DecodeAccepted(request_id)

    def cancel(self, request_ids: Iterable[RequestId]) -> None:
        """Stop requests wherever they are. Unknown ones are no error. A hand-off under way ends first."""
        ids = list(request_ids)
        self._engine.cancel(ids)
        self._handoffs.cancel(ids)
        for request_id in ids:
            self._outbox.forget(request_id)

    def on_engine_events(self, events: Sequence[EngineEvent]) -> None:
        messages: list[TokenMessage] = []
        for event in events:
            match event:
                case Reserved(request_id):
                    ticket, deadline = self._expected.pop(request_id)
                    self._handoffs.start(event, ticket, max(deadline.remaining_s, 0.001))
                case TokensSampled(request_id, index, tokens):
                    messages.append(TokenChunk(request_id, index, tokens))
                case Finished():
                    self._observe(event)
                    messages.append(_finished(event))
                case Failed(request_id, error):
                    self._metrics.requests.labels(error.to_info().code).inc()
                    self._expected.pop(request_id, None)
                    messages.append(SequenceFailed(request_id, error.to_info()))
        self._outbox.post(messages)

    def _observe(self, event: Finished) -> None:
        self._metrics.requests.labels("finished").inc()
        self._metrics.phases.labels("decode").observe(event.decode.decode_s)
        if event.prefill is None:
            self._metrics.handoff_seconds.observe(event.decode.handoff_s)
            self._metrics.phases.labels("handoff").observe(event.decode.handoff_s)
        else:
            self._metrics.phases.labels("queue").observe(event.prefill.queue_s)
            self._metrics.phases.labels("prefill").observe(event.prefill.prefill_s)


def _check_ticket(request: DecodeRequest) -> None:
    num_tokens = len(request.prompt_token_ids) + len(request.emitted_token_ids)
    if request.ticket is not None and request.ticket.num_tokens != num_tokens:
        raise InvalidParameter(
            f"the ticket is for {request.ticket.num_tokens} tokens, the request has {num_tokens}", param="ticket"
        )


def _finished(event: Finished) -> SequenceFinished:
    return SequenceFinished(
        request_id=event.request_id,
        reason=event.reason,
        num_cached_tokens=event.num_cached_tokens,
        decode=event.decode,
        prefill=event.prefill,
        stop_token_id=event.stop_token_id,
    )
