"""TextModel: what the router knows of the model it serves, and how requests become prompts of it."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protocol.errors import InvalidParameter, ModelNotFound, PromptTooLong, RequestError
from router.api_errors import UnsupportedParameter, quote
from router.api_types import ChatMessage, ChatRequest, CompletionRequest
from router.chat_template import ChatTemplate
from router.tokenizer import LARGE_TEXT_CHARS, TextTokenizer
from runtime.models.model_files import SamplingDefaults

MAX_MESSAGES = 4096
MAX_PROMPTS = 128
MAX_TEMPLATE_OPTIONS = 32


@dataclass(frozen=True)
class TextModel:
    """`max_model_len` is the model's; nodes may offer less (`Limits`)."""

    name: str
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int
    sampling: SamplingDefaults


@dataclass(frozen=True, slots=True)
class Limits:
    """What the cluster can take: prompt and output tokens of one sequence together."""

    max_model_len: int
    vocab_size: int

    def check_prompt(self, num_tokens: int, param: str, counted: str = "") -> None:
        """Raise PromptTooLong unless there is room for the prompt and one token. `counted`: "at least "."""
        if num_tokens == 0:
            raise InvalidParameter(f"{param} has no tokens", param=param)
        if num_tokens >= self.max_model_len:
            raise PromptTooLong(
                f"This model's maximum context length is {self.max_model_len} tokens. However, the prompt has "
                f"{counted}{num_tokens} tokens, which leaves no room for an answer. Shorten the prompt.",
                param=param,
            )


@dataclass(frozen=True, slots=True)
class PromptText:
    """One prompt. `text` is what `echo` repeats."""

    token_ids: tuple[int, ...]
    text: str


def check_model(model: TextModel, asked: str | None) -> None:
    """Raise ModelNotFound for another model than the one that is served. None asks for whichever that is."""
    if asked is not None and asked != model.name:
        raise ModelNotFound(
            f"model {quote(asked)!r} does not exist; this server serves {model.name!r}",
            param="model",
        )


async def chat_prompt(model: TextModel, request: ChatRequest, limits: Limits) -> PromptText:
    """Raises RequestError for messages that the model's template refuses, or that are too long."""
    if model.template is None:
        raise RequestError(
            f"model {model.name!r} has no chat template; use /v1/completions, or a model that was tuned for chat",
            param="messages",
        )
    messages = _template_messages(request.messages)
    extra = request.chat_template_kwargs or {}
    if len(extra) > MAX_TEMPLATE_OPTIONS:
        raise InvalidParameter(f"at most {MAX_TEMPLATE_OPTIONS} are allowed", param="chat_template_kwargs")
    text = await _render(model.template, messages, request.add_generation_prompt is not False, extra)
    token_ids = await _tokenize(model, text, limits, "messages", request.add_special_tokens is True)
    return PromptText(token_ids, text)


async def completion_prompts(model: TextModel, request: CompletionRequest, limits: Limits) -> list[PromptText]:
    """One for each prompt of the request, in order."""
    return [await _completion_prompt(model, one, request, limits) for one in _split_prompts(request.prompt)]


async def _completion_prompt(
    model: TextModel, prompt: str | list[int], request: CompletionRequest, limits: Limits
) -> PromptText:
    if isinstance(prompt, str):
        token_ids = await _tokenize(model, prompt, limits, "prompt", request.add_special_tokens is not False)
        return PromptText(token_ids, prompt)
    limits.check_prompt(len(prompt), "prompt")
    for token_id in prompt:
        if not 0 <= token_id < limits.vocab_size:
            raise InvalidParameter(
                f"token id {quote(token_id)} is not in the vocabulary of {limits.vocab_size}", param="prompt"
            )
    text = model.tokenizer.decode(prompt, skip_special_tokens=False) if request.echo else ""
    return PromptText(tuple(prompt), text)


def _split_prompts(prompt: str | list[str | int | list[int]]) -> list[str] | list[list[int]]:
    """Strings, or one list of token ids, or lists of token ids: never a mixture."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt:
        raise InvalidParameter("prompt is empty", param="prompt")
    if ints := [one for one in prompt if isinstance(one, int)]:
        if len(ints) == len(prompt):
            return [ints]
    elif len(prompt) > MAX_PROMPTS:
        raise InvalidParameter(f"{len(prompt)} prompts are more than the {MAX_PROMPTS} allowed", param="prompt")
    texts = [one for one in prompt if isinstance(one, str)]
    if len(texts) == len(prompt):
        if not all(texts):
            raise InvalidParameter("prompt is empty", param="prompt")
        return texts
    lists = [one for one in prompt if isinstance(one, list)]
    if len(lists) == len(prompt):
        return lists
    raise InvalidParameter("prompt mixes text and token ids", param="prompt")


def _template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    if not messages:
        raise InvalidParameter("messages is empty", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidParameter(f"{len(messages)} messages are more than the {MAX_MESSAGES} allowed", param="messages")
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: ChatMessage, param: str) -> dict[str, str]:
    if message.tool_calls or (message.function_call is not None and bytes(message.function_call) != b"null"):
        raise UnsupportedParameter(f"{param}: tool calls are not supported by this server", param=f"{param}.tool_calls")
    content = message.content
    if content is None:
        raise InvalidParameter(f"{param}.content is required", param=f"{param}.content")
    if content == []:
        raise InvalidParameter(f"{param}.content has no parts", param="messages")
    if not isinstance(content, str):
        pieces: list[str] = []
        for i, part in enumerate(content):
            where = f"{param}.content[{i}]"
            if part.type not in ("text", "input_text"):
                raise UnsupportedParameter(
                    f"{where}: parts of type {quote(part.type)!r} are not supported, only text", param=where
                )
            if part.text is None:
                raise InvalidParameter(f"{where}.text is required", param=f"{where}.text")
            pieces.append(part.text)
        content = "\n".join(pieces)
    rendered = {"role": message.role, "content": content}
    return rendered if message.name is None else rendered | {"name": message.name}


async def _render(
    template: ChatTemplate, messages: list[dict[str, str]], add_generation_prompt: bool, extra: Mapping[str, object]
) -> str:
    """On a thread if there is much to render."""
    if sum(len(message["content"]) for message in messages) <= LARGE_TEXT_CHARS and len(messages) <= 64:
        return template.render(messages, add_generation_prompt=add_generation_prompt, extra=extra)
    return await asyncio.to_thread(template.render, messages, add_generation_prompt=add_generation_prompt, extra=extra)


async def _tokenize(
    model: TextModel, text: str, limits: Limits, param: str, add_special_tokens: bool
) -> tuple[int, ...]:
    """What is too long beyond doubt is refused without tokenizing it."""
    limits.check_prompt(max(1, model.tokenizer.least_tokens(text)), param, "at least ")
    token_ids = await model.tokenizer.encode_off_loop(text, add_special_tokens=add_special_tokens)
    limits.check_prompt(len(token_ids), param)
    return tuple(token_ids)
