"""/v1/chat/completions: how a chat request is run, and how its answer is written."""

from collections.abc import Sequence

from msgspec import UnsetType

from router.api_choices import chat_logprobs
from router.api_responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Usage,
)
from router.api_types import ChatRequest
from router.logprobs import chat_logprobs as write_logprobs
from router.openai_format import Envelope
from router.prompts import Limits, PromptText, TextModel, chat_prompt
from router.text_choice import Delta


class ChatEndpoint:
    path = "/v1/chat/completions"
    request_type = ChatRequest

    async def prompts(self, model: TextModel, request: ChatRequest, limits: Limits) -> list[PromptText]:
        return [await chat_prompt(model, request, limits)]

    def top_logprobs(self, request: ChatRequest) -> int | None:
        return chat_logprobs(request)

    def format(self, model: TextModel, request: ChatRequest, _: Sequence[PromptText]) -> "ChatFormat":
        return ChatFormat(model, request)


class ChatFormat:
    def __init__(self, model: TextModel, request: ChatRequest) -> None:
        self._tokenizer = model.tokenizer
        self._envelope = Envelope("chatcmpl", model.name, request)
        self._num_top = chat_logprobs(request)
        self._begun: set[int] = set()

    def chunks(self, delta: Delta, usage: Usage | UnsetType | None) -> list[ChatCompletionChunk]:
        """A choice's first chunk carries its role, its last nothing but how it ended."""
        choices: list[ChatChunkChoice] = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            choices.append(ChatChunkChoice(index=delta.index, delta=ChatDelta(role="assistant", content="")))
        if delta.text or (delta.tokens and (self._num_top is not None or self._envelope.with_ids)):
            choices.append(
                ChatChunkChoice(
                    index=delta.index,
                    delta=ChatDelta(content=delta.text),
                    logprobs=self._logprobs(delta),
                    token_ids=self._envelope.token_ids(delta),
                )
            )
        if delta.finish is not None:
            choices.append(
                ChatChunkChoice(
                    index=delta.index,
                    delta=ChatDelta(),
                    finish_reason=delta.finish.reason,
                    stop_reason=delta.finish.stop_reason,
                    timing=self._envelope.timing(delta.finish),
                )
            )
        return [self._chunk([choice], usage) for choice in choices]

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return self._chunk([], usage)

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> ChatCompletion:
        choices: list[ChatChoice] = []
        for delta in deltas:
            assert delta.finish is not None, "a whole answer is made of finished choices"
            choices.append(
                ChatChoice(
                    index=delta.index,
                    message=ChatMessage(delta.text),
                    logprobs=self._logprobs(delta),
                    finish_reason=delta.finish.reason,
                    stop_reason=delta.finish.stop_reason,
                    token_ids=self._envelope.token_ids(delta),
                    timing=self._envelope.timing(delta.finish),
                )
            )
        envelope = self._envelope
        return ChatCompletion(
            id=envelope.id, created=envelope.created, model=envelope.model, choices=choices, usage=usage
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        envelope = self._envelope
        return ChatCompletionChunk(
            id=envelope.id, created=envelope.created, model=envelope.model, choices=choices, usage=usage
        )

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        return None if self._num_top is None else write_logprobs(self._tokenizer, delta.tokens, self._num_top)
