"""ChatTemplate: messages -> the text the model was trained on, by the model's own Jinja template, in a sandbox.

A template comes with the model and messages come from clients, so neither is trusted: no attribute of Python is reachable,
values cannot be changed, and output is cut off (with an error) past a limit while it is being made.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.runtime
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import ConfigError, InvalidParameter, RequestError
from router.api_errors import quote

MAX_RENDERED_CHARS = 32 * 1024 * 1024
MAX_EXPONENT = 64


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox bounds loops; this bounds the operators that make much out of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        plain = isinstance(left, int | float) and isinstance(right, int | float)
        if not plain or (operator == "**" and abs(right) > MAX_EXPONENT):
            raise SecurityError(f"{operator} is only allowed between small numbers")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """`special_tokens` are the names a template may use for them: bos_token, eos_token, ..."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template cannot be compiled: {error}", param="model") from error
        self._special_tokens = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, object] | None = None,
    ) -> str:
        """Raises RequestError with the template's own words if it refuses the messages."""
        context: dict[str, object] = {
            **self._special_tokens,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        for name, value in (extra or {}).items():
            if name in context or name in self._template.environment.globals:
                raise InvalidParameter(f"{quote(name)} cannot be set", param="chat_template_kwargs")
            context[name] = value
        try:
            return "".join(_bounded(self._template.generate(context)))
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RequestError(f"the chat template refuses these messages: {quote(str(error))}") from error
        except RecursionError as error:
            raise RequestError("the chat template nests too deeply for these messages") from error


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_RENDERED_CHARS:
            raise RequestError(f"the rendered messages are longer than {MAX_RENDERED_CHARS} characters")
        yield piece


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Like Jinja's own filter, without its HTML escapes: a prompt is not a web page."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
