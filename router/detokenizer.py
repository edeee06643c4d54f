"""Detokenizers: one sequence's tokens -> text, as they come. Never half a character, never a replacement character that
the next token would have turned into a real one; the pieces add up to the text of the whole. O(1) per token.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from router.tokenizer import TextTokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_CHARACTER_TOKENS = 4
"""A character has at most 4 bytes, so a token that did not complete it after 4 never will."""
CONTEXT_TOKENS = 5


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """The text that is final now. Empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """The rest, once no token follows: an incomplete character as U+FFFD."""
        ...


def make_detokenizer(
    tokenizer: TextTokenizer, *, skip_special_tokens: bool, prompt_token_ids: Sequence[int]
) -> Detokenizer:
    if tokenizer.is_byte_level:
        return ByteLevelDetokenizer(tokenizer, skip_special_tokens)
    return WindowDetokenizer(tokenizer, skip_special_tokens, prompt_token_ids[-CONTEXT_TOKENS:])


class ByteLevelDetokenizer:
    """For vocabularies whose tokens are bytes: an incremental UTF-8 decoder is all there is to it."""

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For vocabularies whose tokens read differently beside each other (a leading space, runs of byte tokens): decodes
    a short window twice, with and without the newest tokens, and takes the difference.

    The window begins with the end of the prompt, so that the first token keeps its leading space.
    """

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = list(context)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._difference()
        if text.endswith(REPLACEMENT) and len(self._pending) < MAX_CHARACTER_TOKENS:
            return ""
        return self._settle(text)

    def flush(self) -> str:
        return self._settle(self._difference()) if self._pending else ""

    def _difference(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _settle(self, text: str) -> str:
        """What is pending becomes the context of what follows. Tokens without text keep the older context alive."""
        if text:
            self._context = self._pending
        self._pending = []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
