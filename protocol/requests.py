"""Router -> node: what to compute. One message per dispatch, answered before any token is.

A prefill node answers PrefillRequest with PrefillAccepted, which carries the ticket that the router passes on in
DecodeRequest. A refusal is an ErrorInfo with the error's HTTP status. Tokens come back on the token stream.
"""

from typing import Annotated

import msgspec

from protocol.ids import IdText
from protocol.sampling import SamplingParams
from protocol.transfer import KVSource, TransferTicket

MAX_PROMPT_TOKENS = 1 << 20
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
TokenIds = Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_PROMPT_TOKENS)]
PromptTokenIds = Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)]
Salt = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Sources = Annotated[tuple[KVSource, ...], msgspec.Meta(max_length=16)]
DeadlineSeconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class PrefillRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Compute the KV of a prompt, sample the first token, and export the blocks to whoever holds the ticket.

    `emitted_token_ids` are output tokens that the client has already seen (a request that lost its node): they are
    part of the context, and the next sampled token has output position len(emitted_token_ids). `sources` are other nodes
    that hold more of its beginning, the best one first.
    """

    request_id: IdText
    trace_id: IdText
    router_id: IdText
    prompt_token_ids: PromptTokenIds
    sampling: SamplingParams
    deadline_s: DeadlineSeconds
    emitted_token_ids: TokenIds = ()
    cache_salt: Salt | None = None
    sources: Sources = ()


class PrefillAccepted(msgspec.Struct, frozen=True):
    ticket: TransferTicket


class DecodeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Continue a prompt to its end.

    With a ticket, the KV and the first token come from the prefill node it names; without one, this node computes
    them itself (local prefill). `emitted_token_ids` and `sources` as in PrefillRequest.
    """

    request_id: IdText
    trace_id: IdText
    router_id: IdText
    prompt_token_ids: PromptTokenIds
    sampling: SamplingParams
    deadline_s: DeadlineSeconds
    emitted_token_ids: TokenIds = ()
    cache_salt: Salt | None = None
    ticket: TransferTicket | None = None
    sources: Sources = ()


class DecodeAccepted(msgspec.Struct, frozen=True):
    request_id: IdText


class CancelRequest(msgspec.Struct, frozen=True):
    """Stop these requests and free what they hold. Unknown ids are no error: cancel races with finishing."""

    request_ids: Annotated[tuple[IdText, ...], msgspec.Meta(max_length=4096)]
