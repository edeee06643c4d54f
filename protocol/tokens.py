"""Node -> router: one TokenFrame per engine step, with the tokens of all of that router's requests.

The stream of frames is long-lived, one per (router, node) pair, and it is also the lease on the router's requests: when
it ends, the node cancels them and the router dispatches them elsewhere. Within a stream frames are ordered and counted.

Whoever computes the prompt accounts for it right after its first token (PromptComputed), so that the account is there
however the sequence ends. One request's messages are, from a node that computes the prompt and goes on (or whose first
token is the last): chunk, computed, chunks, finished; from one that hands it off: chunk, computed; from one that imports
it: chunks, finished.

Each chunk says at which output position it starts. A position may be reported twice (the first token is, by the
prefill node and by the decode node that took over); the values are then the same, and the router drops the second.
"""

from typing import Annotated, Literal

import msgspec

from protocol.errors import ErrorInfo
from protocol.ids import IdText
from protocol.phases import DecodePhases, PrefillPhases

FinishReason = Literal["stop", "length"]


class SampledToken(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """One output token. `logprob` (natural log) and `top` (token id, logprob; best first) only where asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenChunk(msgspec.Struct, frozen=True, tag="tokens"):
    """Output tokens `index`, `index + 1`, ... of one request."""

    request_id: IdText
    index: Annotated[int, msgspec.Meta(ge=0)]
    tokens: tuple[SampledToken, ...]


class PromptComputed(msgspec.Struct, frozen=True, tag="computed"):
    """From the node that computed the prompt, right after its first token. `num_cached_tokens` of the prompt came from
    its prefix cache. The last word of a prefill node whose request goes on elsewhere."""

    request_id: IdText
    num_cached_tokens: int
    phases: PrefillPhases


class SequenceFinished(msgspec.Struct, frozen=True, tag="finished"):
    """The sequence is complete; no chunk follows. `stop_token_id` is the token that ended it, if one did (it is also
    the last token of the last chunk)."""

    request_id: IdText
    reason: FinishReason
    decode: DecodePhases
    stop_token_id: int | None = None


class SequenceFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The node gives the sequence up. A retryable error means: dispatch prompt and emitted tokens again."""

    request_id: IdText
    error: ErrorInfo


TokenMessage = TokenChunk | PromptComputed | SequenceFinished | SequenceFailed


class TokenFrame(msgspec.Struct, frozen=True):
    """What one engine step produced for one router. `number` counts from 0 without gaps; an empty frame is a sign of
    life."""

    number: Annotated[int, msgspec.Meta(ge=0)]
    messages: tuple[TokenMessage, ...]


class OpenTokenStream(msgspec.Struct, frozen=True):
    """Router -> node: send me my tokens here. A second stream for the same router replaces the first, which ends."""

    router_id: IdText
