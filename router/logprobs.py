"""Log-probabilities of output tokens in the two shapes that OpenAI's endpoints have for them."""

from collections.abc import Sequence

from router.api_responses import (
    LOWEST_LOGPROB,
    ChatLogprob,
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
)
from router.text_choice import PlacedToken
from router.tokenizer import TextTokenizer


def chat_logprobs(tokenizer: TextTokenizer, tokens: Sequence[PlacedToken], num_top: int) -> ChatLogprobs:
    content: list[ChatTokenLogprob] = []
    for placed in tokens:
        token = placed.token
        own = _chat_logprob(tokenizer, token.token_id, token.logprob)
        top = [_chat_logprob(tokenizer, token_id, logprob) for token_id, logprob in token.top[:num_top]]
        content.append(ChatTokenLogprob(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(content)


def completion_logprobs(
    tokenizer: TextTokenizer, tokens: Sequence[PlacedToken], num_top: int, first_offset: int
) -> CompletionLogprobs:
    """Beside the alternatives, `top_logprobs` always has the sampled token. `first_offset`: length of an echoed prompt."""
    texts, values, tops, offsets = [], [], [], []
    for placed in tokens:
        token = placed.token
        text, value = _text(tokenizer, token.token_id), _finite(token.logprob)
        texts.append(text)
        values.append(value)
        offsets.append(first_offset + placed.text_offset)
        top = {_text(tokenizer, token_id): _finite(logprob) for token_id, logprob in token.top[:num_top]}
        tops.append(top | {text: value})
    return CompletionLogprobs(texts, values, tops if num_top else None, offsets)


def _chat_logprob(tokenizer: TextTokenizer, token_id: int, logprob: float | None) -> ChatLogprob:
    raw = tokenizer.token_bytes(token_id)
    return ChatLogprob(raw.decode("utf-8", "replace"), _finite(logprob), list(raw))


def _text(tokenizer: TextTokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _finite(logprob: float | None) -> float:
    return LOWEST_LOGPROB if logprob is None else max(LOWEST_LOGPROB, logprob)
