"""TokenMerge: two nodes' chunks -> one sequence of output tokens, without gaps or repeats.

The first token comes from the prefill node and again from the decode node; either may be first. A chunk that is ahead of
its time waits for what is missing. Two nodes that disagree about a token cannot both be right, and the client must not
get a mixture of two answers.
"""

from protocol.errors import TransferError
from protocol.tokens import SampledToken, TokenChunk


class TokenMerge:
    """`emitted`: ids of the output tokens that are known already; grows."""

    def __init__(self, emitted: list[int]) -> None:
        self._emitted = emitted
        self._waiting: dict[int, TokenChunk] = {}

    @property
    def has_gap(self) -> bool:
        return bool(self._waiting)

    def push(self, chunk: TokenChunk) -> list[SampledToken]:
        """The tokens that follow what is known now. Raises TransferError on a contradiction."""
        self._waiting[chunk.index] = max(chunk, self._waiting.get(chunk.index, chunk), key=lambda c: len(c.tokens))
        new: list[SampledToken] = []
        while True:
            ready = [index for index in self._waiting if index <= len(self._emitted)]
            if not ready:
                return new
            new += self._take(self._waiting.pop(min(ready)))

    def _take(self, chunk: TokenChunk) -> list[SampledToken]:
        known = len(self._emitted) - chunk.index
        repeated = [token.token_id for token in chunk.tokens[:known]]
        if repeated != self._emitted[chunk.index : chunk.index + len(repeated)]:
            raise TransferError(f"two nodes disagree about output token {chunk.index}")
        fresh = list(chunk.tokens[known:])
        self._emitted += [token.token_id for token in fresh]
        return fresh
