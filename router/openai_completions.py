"""/v1/completions: how a completion request is run, and how its answer is written."""

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from router.api_choices import completion_logprobs
from router.api_responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from router.api_types import CompletionRequest
from router.logprobs import completion_logprobs as write_logprobs
from router.openai_format import Envelope
from router.prompts import Limits, PromptText, TextModel, completion_prompts
from router.text_choice import Delta


class CompletionEndpoint:
    path = "/v1/completions"
    request_type = CompletionRequest

    async def prompts(self, model: TextModel, request: CompletionRequest, limits: Limits) -> list[PromptText]:
        return await completion_prompts(model, request, limits)

    def top_logprobs(self, request: CompletionRequest) -> int | None:
        return completion_logprobs(request)

    def format(self, model: TextModel, request: CompletionRequest, prompts: Sequence[PromptText]) -> "CompletionFormat":
        return CompletionFormat(model, request, prompts)


class CompletionFormat:
    def __init__(self, model: TextModel, request: CompletionRequest, prompts: Sequence[PromptText]) -> None:
        self._tokenizer = model.tokenizer
        self._envelope = Envelope("cmpl", model.name, request)
        self._num_top = completion_logprobs(request)
        self._n = request.n or 1
        self._echoed = [prompt.text for prompt in prompts] if request.echo else None
        self._begun: set[int] = set()

    def chunks(self, delta: Delta, usage: Usage | UnsetType | None) -> list[Completion]:
        choice = self._choice(delta)
        says_something = choice.text or delta.finish is not None
        if not says_something and not (delta.tokens and (self._num_top is not None or self._envelope.with_ids)):
            return []
        return [self._completion([choice], usage)]

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> Completion:
        return self._completion([self._choice(delta) for delta in deltas], usage)

    def _choice(self, delta: Delta) -> CompletionChoice:
        """An echoed prompt goes before a choice's first text."""
        echoed = "" if self._echoed is None else self._echoed[delta.index // self._n]
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        finish = delta.finish
        return CompletionChoice(
            index=delta.index,
            text=echoed + delta.text if first else delta.text,
            logprobs=self._logprobs(delta, len(echoed)),
            finish_reason=None if finish is None else finish.reason,
            stop_reason=UNSET if finish is None else finish.stop_reason,
            token_ids=self._envelope.token_ids(delta),
            timing=UNSET if finish is None else self._envelope.timing(finish),
        )

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        envelope = self._envelope
        return Completion(id=envelope.id, created=envelope.created, model=envelope.model, choices=choices, usage=usage)

    def _logprobs(self, delta: Delta, first_offset: int) -> CompletionLogprobs | None:
        if self._num_top is None:
            return None
        return write_logprobs(self._tokenizer, delta.tokens, self._num_top, first_offset)
