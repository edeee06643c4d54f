"""A ticket opens the KV of one request's own context and of nothing else, whoever carries it."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from decode_node.service import DecodeService
from kv_transfer.handoff.exports import ExportTable
from prefill_node.service import PrefillService
from protocol.block_hash import context_hash
from protocol.errors import InvalidParameter
from protocol.ids import ContextHash, RequestId
from protocol.requests import DecodeRequest, PrefillRequest
from protocol.sampling import SamplingParams
from protocol.transfer import TransferTicket
from tests.support.kv_owner import LAYOUT

PROMPT = tuple(range(40))
EMITTED = (7, 8)
SALT = "tenant-1"
TICKET = TransferTicket(
    ticket_id="t",
    request_id="req-1",
    owner="p0",
    incarnation="i",
    layout_fingerprint=LAYOUT.fingerprint,
    control_url="http://127.0.0.1:1",
    num_tokens=42,
    context_hash=context_hash(LAYOUT.identity, SALT, PROMPT + EMITTED),
    ttl_s=30.0,
)
REQUEST = DecodeRequest(
    request_id="req-1",
    trace_id="t",
    router_id="r",
    prompt_token_ids=PROMPT,
    emitted_token_ids=EMITTED,
    cache_salt=SALT,
    sampling=SamplingParams(max_tokens=4, seed=0),
    deadline_s=1.0,
    ticket=TICKET,
)


class NoPrefixes:
    """Nobody holds the beginning of anything."""

    def expect(self, _: object) -> int:
        return 0


EXCHANGE = SimpleNamespace(exports=None, prefixes=NoPrefixes(), lender=None)


class Recorder:
    """Stands for engine, outbox and exports: keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def submit(self, request: Any) -> None:
        self.calls.append(("submit", request))

    def expect(self, request_id: RequestId, _: Any) -> None:
        self.calls.append(("expect", request_id))

    def keep(self, ticket: TransferTicket) -> None:
        self.calls.append(("keep", ticket.request_id))

    def open(self, request_id: RequestId, num_tokens: int, context: ContextHash) -> TransferTicket:
        return msgspec.structs.replace(TICKET, request_id=request_id, num_tokens=num_tokens, context_hash=context)


def decode_service(seen: Recorder) -> DecodeService:
    return DecodeService(seen, EXCHANGE, seen, seen, None, 100, LAYOUT)  # type: ignore[arg-type]  # fakes


def test_a_request_with_its_own_ticket_is_taken() -> None:
    seen = Recorder()
    decode_service(seen).decode(REQUEST)
    assert [what for what, _ in seen.calls] == ["expect", "keep", "submit"]


OTHERS = {
    "of another request": (msgspec.structs.replace(REQUEST, request_id="req-2"), "request req-1"),
    "of a shorter context": (msgspec.structs.replace(REQUEST, emitted_token_ids=(7,)), "42 tokens"),
    "of other tokens": (msgspec.structs.replace(REQUEST, emitted_token_ids=(7, 9)), "another context"),
    "of tokens in another order": (msgspec.structs.replace(REQUEST, emitted_token_ids=(8, 7)), "another context"),
    "of another tenant": (msgspec.structs.replace(REQUEST, cache_salt="tenant-2"), "another context"),
    "of a tenant, without one": (msgspec.structs.replace(REQUEST, cache_salt=None), "another context"),
    "with a forged hash": (
        msgspec.structs.replace(REQUEST, ticket=msgspec.structs.replace(TICKET, context_hash=b"\0" * 16)),
        "another context",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_ticket_of_something_else_is_refused_before_anything_begins(name: str) -> None:
    request, names = OTHERS[name]
    seen = Recorder()
    with pytest.raises(InvalidParameter, match=names) as refused:
        decode_service(seen).decode(request)
    assert refused.value.param == "ticket"
    assert seen.calls == []


def test_another_model_is_another_context() -> None:
    seen = Recorder()
    other = msgspec.structs.replace(LAYOUT, model="another")
    service = DecodeService(seen, EXCHANGE, seen, seen, None, 100, other)  # type: ignore[arg-type]  # fakes
    with pytest.raises(InvalidParameter, match="another context"):
        service.decode(REQUEST)
    assert seen.calls == []


def test_where_the_prompt_ends_and_the_answer_begins_makes_no_difference() -> None:
    """A sequence that moved to another node has the same KV."""
    seen = Recorder()
    decode_service(seen).decode(
        msgspec.structs.replace(REQUEST, prompt_token_ids=PROMPT + EMITTED, emitted_token_ids=())
    )
    assert [what for what, _ in seen.calls] == ["expect", "keep", "submit"]


def test_the_prefill_node_binds_its_ticket_to_what_it_computes() -> None:
    seen = Recorder()
    request = PrefillRequest(
        request_id="req-1",
        trace_id="t",
        router_id="r",
        prompt_token_ids=PROMPT,
        emitted_token_ids=EMITTED,
        cache_salt=SALT,
        sampling=SamplingParams(max_tokens=4, seed=0),
        deadline_s=1.0,
    )
    exports: ExportTable = seen  # type: ignore[assignment]  # a fake
    service = PrefillService(
        seen, SimpleNamespace(exports=exports, prefixes=NoPrefixes(), lender=None), seen, None, 100, LAYOUT.identity
    )  # type: ignore[arg-type]  # fakes
    ticket = service.prefill(request).ticket
    assert ticket == TICKET
    decode_service(seen).decode(msgspec.structs.replace(REQUEST, ticket=ticket))
