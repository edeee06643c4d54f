"""TextTokenizer: text -> token ids, and what each token id stands for. Built once per process, shared by all requests.

Long texts are tokenized on a thread: the library lets go of the interpreter meanwhile, so streams go on.
"""

import asyncio
import json
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

LARGE_TEXT_CHARS = 8192
CHARS_PER_NORMALIZED_CHAR = 4
"""No Unicode normalization form makes a text shorter than this by composing its characters."""


class TextTokenizer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: Path) -> "TextTokenizer":
        return cls(Tokenizer.from_file(str(path)))

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are markup, not text."""
        return frozenset(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token stands for a fixed string of bytes, whatever its neighbours."""
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        return decoder.get("type") == "ByteLevel"

    @cached_property
    def max_token_chars(self) -> int:
        return max((len(token) for token in self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def least_tokens(self, text: str) -> int:
        """A lower bound on the number of tokens of a text, known without tokenizing it."""
        return len(text) // (self.max_token_chars * CHARS_PER_NORMALIZED_CHAR)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    async def encode_off_loop(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Like encode; a long text does not hold up the event loop."""
        if len(text) <= LARGE_TEXT_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token: exact for a byte-level vocabulary, else those of its text. Empty for an id that the
        vocabulary does not have (models pad theirs)."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._compute_token_bytes(token_id)
        return known

    def _compute_token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if not self.is_byte_level:
            return self.decode([token_id], skip_special_tokens=False).encode()
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        except KeyError:
            return str(token).encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write bytes as visible characters: printable Latin-1 as itself, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_level_alphabet()
