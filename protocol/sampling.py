"""SamplingParams: how one sequence is sampled. Complete and validated before a node sees it.

Randomness is a function of (seed, position of the output token) alone, so that a sequence can move to another node at
any token and go on as if nothing had happened. The router draws a seed where the client named none.
"""

import math
from typing import Annotated

import msgspec

from protocol.errors import InvalidParameter

MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIAS = 1024
MIN_TEMPERATURE = 1e-5
MIN_REPETITION_PENALTY = 0.01
"""Beyond it, or its inverse, a penalty is an overflow rather than a preference."""

Int63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Defaults are OpenAI's. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    `stop_token_ids` includes the model's end-of-sequence tokens unless the client asked to ignore them; they are
    neither sampled nor honoured before `min_tokens` output tokens. `logprobs` is the number of alternatives wanted
    beside each sampled token, None for no log-probabilities at all.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    seed: Int63
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_STOP_TOKENS)] = ()
    logit_bias: Annotated[dict[int, float], msgspec.Meta(max_length=MAX_LOGIT_BIAS)] = {}
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Temperatures below MIN_TEMPERATURE count as 0: logits divided by them are no longer finite numbers."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidParameter, naming the parameter, on a value out of range. Ranges are vLLM's, where it has bounds."""
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require(0.0 < self.top_p <= 1.0, "top_p", "must be in (0, 1]")
        _require(0 <= self.top_k < 1 << 31, "top_k", "must be 0 (off) or a positive count")
        _within("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 1 / MIN_REPETITION_PENALTY)
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "must be between 0 and max_tokens")
        if self.logprobs is not None:
            _require(
                0 <= self.logprobs <= MAX_TOP_LOGPROBS, "top_logprobs", f"must be between 0 and {MAX_TOP_LOGPROBS}"
            )
        for token_id in self.stop_token_ids:
            _require(
                0 <= token_id < vocab_size, "stop_token_ids", f"{token_id} is not in the vocabulary of {vocab_size}"
            )
        for token_id, bias in self.logit_bias.items():
            _require(0 <= token_id < vocab_size, "logit_bias", f"{token_id} is not in the vocabulary of {vocab_size}")
            _require(-100.0 <= bias <= 100.0, "logit_bias", "values must be between -100 and 100")


def _within(param: str, value: float, low: float, high: float) -> None:
    _require(math.isfinite(value) and low <= value <= high, param, f"must be between {low:g} and {high:g}")


def _require(holds: bool, param: str, requirement: str) -> None:
    if not holds:
        raise InvalidParameter(f"{param} {requirement}", param=param)
