"""Choices: how often, and with which sampling parameters, each prompt of a request is to be run.

Everything a client may set has been range-checked when these functions return; a node that still refuses is a bug.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import InvalidParameter, PromptTooLong
from protocol.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS, SamplingParams
from router.api_errors import quote
from router.api_types import ChatRequest, CompletionRequest, GenerationFields
from router.prompts import Limits, PromptText, TextModel

MAX_N = 128
MAX_CHOICES = 256
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1024
DEFAULT_COMPLETION_TOKENS = 16
MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence to run. `leader`: the choice with the same prompt that runs first and leaves it in a prefix cache;
    its own index if that is itself."""

    index: int
    leader: int
    prompt: PromptText
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text. `client_stop_ids` are reported as `stop_reason`; other stop tokens are the model's own."""

    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    client_stop_ids: frozenset[int]
    min_tokens: int
    top_logprobs: int | None


def text_options(request: GenerationFields, top_logprobs: int | None) -> TextOptions:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidParameter(f"{len(stop)} stop strings are more than the {MAX_STOP_STRINGS} allowed", param="stop")
    if not all(0 < len(one) <= MAX_STOP_CHARS for one in stop):
        raise InvalidParameter(f"stop strings must have 1 to {MAX_STOP_CHARS} characters", param="stop")
    return TextOptions(
        stop=tuple(stop),
        include_stop=request.include_stop_str_in_output is True,
        skip_special_tokens=request.skip_special_tokens is not False,
        client_stop_ids=frozenset(request.stop_token_ids or ()),
        min_tokens=request.min_tokens or 0,
        top_logprobs=top_logprobs,
    )


def chat_logprobs(request: ChatRequest) -> int | None:
    """Alternatives wanted beside each token, None for no log-probabilities."""
    wanted = request.top_logprobs
    if wanted is not None and not 0 <= wanted <= MAX_TOP_LOGPROBS:
        raise InvalidParameter(f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}", param="top_logprobs")
    if not request.logprobs:
        if wanted:
            raise InvalidParameter("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None
    return wanted or 0


def completion_logprobs(request: CompletionRequest) -> int | None:
    wanted = request.logprobs
    if wanted is not None and not 0 <= wanted <= MAX_TOP_LOGPROBS:
        raise InvalidParameter(f"logprobs must be between 0 and {MAX_TOP_LOGPROBS}", param="logprobs")
    if wanted is not None and request.echo:
        raise InvalidParameter("logprobs of an echoed prompt are not supported", param="logprobs")
    return wanted


def make_choices(
    model: TextModel,
    limits: Limits,
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[PromptText],
    logprobs: int | None,
) -> list[Choice]:
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MAX_N:
        raise InvalidParameter(f"n must be between 1 and {MAX_N}", param="n")
    if n * len(prompts) > MAX_CHOICES:
        raise InvalidParameter(f"n times the number of prompts must be at most {MAX_CHOICES}", param="n")
    choices: list[Choice] = []
    for position, prompt in enumerate(prompts):
        max_tokens = _max_tokens(request, limits.max_model_len, len(prompt.token_ids))
        leader = position * n
        for j in range(n):
            sampling = _sampling(model, request, max_tokens, _seed(request.seed, j), logprobs)
            if j == 0:
                _check(sampling, limits)
            choices.append(Choice(leader + j, leader, prompt, sampling))
    return choices


def _max_tokens(request: ChatRequest | CompletionRequest, max_model_len: int, num_prompt_tokens: int) -> int:
    room = max_model_len - num_prompt_tokens
    param, wanted = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        param, wanted = "max_completion_tokens", request.max_completion_tokens
    if wanted is None:
        return room if isinstance(request, ChatRequest) else min(room, DEFAULT_COMPLETION_TOKENS)
    if wanted < 1:
        raise InvalidParameter(f"{param} must be at least 1", param=param)
    if wanted > room:
        raise PromptTooLong(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{quote(num_prompt_tokens + wanted)} tokens ({num_prompt_tokens} in the prompt, {quote(wanted)} in the "
            "answer). Shorten one of the two.",
            param=param,
        )
    return wanted


def _seed(client_seed: int | None, position: int) -> int:
    if client_seed is None:
        return secrets.randbits(63)
    if not -MAX_SEED - 1 <= client_seed <= MAX_SEED:
        raise InvalidParameter("seed must be a 64-bit integer", param="seed")
    return (client_seed + position) & MAX_SEED


def _sampling(
    model: TextModel, request: GenerationFields, max_tokens: int, seed: int, logprobs: int | None
) -> SamplingParams:
    own_stops = () if request.ignore_eos else model.eos_token_ids
    defaults = model.sampling
    top_k = defaults.top_k if request.top_k is None else request.top_k
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=_or(request.temperature, defaults.temperature),
        top_k=0 if top_k == -1 else top_k,
        top_p=_or(request.top_p, defaults.top_p),
        min_p=_or(request.min_p, defaults.min_p),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(dict.fromkeys([*own_stops, *(request.stop_token_ids or ())])),
        logit_bias=_logit_bias(request.logit_bias or {}),
        logprobs=logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(by_text: dict[str, float]) -> dict[int, float]:
    """JSON has only string keys; the API means token ids."""
    if len(by_text) > MAX_LOGIT_BIAS:
        raise InvalidParameter(f"logit_bias has more than {MAX_LOGIT_BIAS} entries", param="logit_bias")
    found: dict[int, float] = {}
    for key, bias in by_text.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidParameter(f"logit_bias: {quote(key)!r} is not a token id", param="logit_bias")
        found[int(key)] = bias
    return found


def _check(sampling: SamplingParams, limits: Limits) -> None:
    if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidParameter(f"more than {MAX_STOP_TOKENS} stop tokens", param="stop_token_ids")
    sampling.validate(limits.vocab_size)
