"""What clients send to /v1/chat/completions and /v1/completions, decoded and type-checked once, at the edge.

Unknown fields are ignored (clients send many) and logged once per name. Known features that this server does not have are
refused by name, because silence about them would be a wrong answer. Ranges are checked where sampling parameters are
made (api_choices).
"""

import logging
import re
from typing import Annotated, Any, TypeVar

import msgspec

from protocol.errors import InvalidParameter, RequestError
from router.api_errors import UnsupportedParameter, quote

MAX_SALT_CHARS = 1024
MAX_INERT_BYTES = 256
MAX_LOGGED_FIELDS = 256

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]

log = logging.getLogger(__name__)


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints share. None is "not said" everywhere.

    `include_timing` adds the phase ledger to every finished choice, `return_token_ids` the ids of its tokens.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    include_timing: bool | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: msgspec.Raw | None = None


class ChatRequest(GenerationFields, frozen=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: int | None = None
    echo: bool | None = None


UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "documents": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "suffix": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "priority": (0,),
}
"""Known fields that are refused, unless null or one of these values, which ask for nothing."""

IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
"""Known fields that change nothing about the answer."""

T = TypeVar("T", bound=GenerationFields)

_FIELDS_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (ChatRequest, CompletionRequest)
}
_AT = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_seen_unknown: set[str] = set()


def decode_request(body: bytes, kind: type[T]) -> T:
    """Raises RequestError for what is no JSON object, InvalidParameter naming the field for a wrong type, and
    UnsupportedParameter for a feature that is not there."""
    try:
        fields = _FIELDS_DECODER.decode(body)
        _refuse_unsupported(fields, kind)
        request: T = _DECODERS[kind].decode(body)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {quote(str(error))}") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    _note_unknown(fields, kind)
    return request


def _refuse_unsupported(fields: dict[str, msgspec.Raw], kind: type[GenerationFields]) -> None:
    for name in fields.keys() & UNSUPPORTED.keys():
        if not _is_inert(bytes(fields[name]), UNSUPPORTED[name]):
            raise UnsupportedParameter(f"{name} is not supported by this server", param=name)
    if kind is ChatRequest and "echo" in fields and not _is_inert(bytes(fields["echo"]), (False,)):
        raise UnsupportedParameter("echo is not supported for chat completions", param="echo")


def _is_inert(raw: bytes, inert: tuple[object, ...]) -> bool:
    if len(raw) > MAX_INERT_BYTES:
        return False
    value: object = msgspec.json.decode(raw)
    return value is None or any(value == one and type(value) is type(one) for one in inert)


def _note_unknown(fields: dict[str, msgspec.Raw], kind: type[GenerationFields]) -> None:
    unknown = fields.keys() - set(kind.__struct_fields__) - UNSUPPORTED.keys() - IGNORED - {"echo"} - _seen_unknown
    for name in sorted(unknown)[: MAX_LOGGED_FIELDS - len(_seen_unknown)]:
        _seen_unknown.add(name)
        log.info("ignoring unknown request field %r (said once)", quote(name))


def _invalid_field(message: str) -> RequestError:
    found = _AT.search(message)
    if found is None:
        if missing := re.search(r"missing required field `(\w+)`", message):
            return InvalidParameter(f"{missing[1]} is required", param=missing[1])
        return RequestError(f"the body must be a JSON object: {quote(message)}")
    path = found["path"].replace("[...]", "") or None
    text = message[: found.start()]
    if missing := re.search(r"missing required field `(\w+)`", text):
        name = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidParameter(f"{quote(name)} is required", param=quote(name))
    return InvalidParameter(f"{quote(path or 'body')}: {quote(text.lower())}", param=path)
