"""AnswerFormat: what an endpoint must be able to write, whole and in chunks, and what both endpoints write alike."""

import secrets
import time
from collections.abc import Sequence
from typing import Protocol

from msgspec import UNSET, UnsetType

from router.api_responses import PromptTokensDetails, Timing, Usage
from router.api_types import GenerationFields
from router.text_choice import Delta, Finish


class AnswerFormat(Protocol):
    def chunks(self, delta: Delta, usage: Usage | UnsetType | None) -> Sequence[object]:
        """The chunk objects for what is new of one choice; none if there is nothing to say yet."""
        ...

    def usage_chunk(self, usage: Usage) -> object: ...

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> object:
        """The answer, from one complete delta for each choice, in order."""
        ...


class Envelope:
    """What every object of one answer repeats."""

    def __init__(self, prefix: str, model: str, request: GenerationFields) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self._with_ids = request.return_token_ids is True
        self._with_timing = request.include_timing is True

    @property
    def with_ids(self) -> bool:
        return self._with_ids

    def token_ids(self, delta: Delta) -> list[int] | UnsetType:
        return [placed.token.token_id for placed in delta.tokens] if self._with_ids else UNSET

    def timing(self, finish: Finish) -> Timing | UnsetType:
        return Timing.of(finish.phases) if self._with_timing else UNSET


def make_usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptTokensDetails(cached_tokens)
    )
