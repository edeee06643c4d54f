"""What clients get back, in OpenAI's shapes. Fields beyond those are left out unless they say something."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from protocol.phases import HandoffPhases, PhaseLedger

LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity."""


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class HandoffTiming(msgspec.Struct, frozen=True):
    """protocol.phases.HandoffPhases in milliseconds."""

    queue_ms: float
    wire_ms: float
    verify_ms: float
    join_ms: float

    @classmethod
    def of(cls, phases: HandoffPhases) -> "HandoffTiming":
        return cls(*map(_milliseconds, (phases.queue_s, phases.wire_s, phases.verify_s, phases.join_s)))


class Timing(msgspec.Struct, frozen=True):
    """protocol.phases.PhaseLedger in milliseconds. `handoff` is handoff_ms in its parts."""

    router_ms: float
    queue_ms: float
    prefill_ms: float
    handoff_ms: float
    decode_ms: float
    transit_ms: float
    total_ms: float
    handoff: HandoffTiming

    @classmethod
    def of(cls, phases: PhaseLedger) -> "Timing":
        return cls(
            router_ms=_milliseconds(phases.router_s),
            queue_ms=_milliseconds(phases.queue_s),
            prefill_ms=_milliseconds(phases.prefill_s),
            handoff_ms=_milliseconds(phases.handoff_s),
            decode_ms=_milliseconds(phases.decode_s),
            transit_ms=_milliseconds(phases.transit_s),
            total_ms=_milliseconds(phases.total_s),
            handoff=HandoffTiming.of(phases.handoff),
        )


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob, frozen=True):
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class ChatMessage(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatDelta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET
    timing: Timing | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    timing: Timing | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Of a whole answer and of a chunk alike."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    timing: Timing | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Of a whole answer and of a chunk alike."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: None = None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headrace"
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True):
    data: list[Model]
    object: Literal["list"] = "list"


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)
