"""TextChoice: one sequence's tokens -> text deltas, up to the stop token or stop string that ends it.

The token that ends a sequence counts as output but its text does not go out (unless the client asked for it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.phases import PhaseLedger
from protocol.tokens import FinishReason, SampledToken
from router.api_choices import Choice, TextOptions
from router.detokenizer import make_detokenizer
from router.stop_strings import Found, StopStringFinder
from router.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """An output token and the character of the choice's text at which its own text begins."""

    token: SampledToken
    text_offset: int


@dataclass(frozen=True, slots=True)
class Finish:
    """`stop_reason`: the stop string or the client's own stop token that ended the choice, if one did."""

    reason: FinishReason
    stop_reason: str | int | None
    phases: PhaseLedger
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one choice. Its last delta, and only that, has `finish`."""

    index: int
    text: str
    tokens: tuple[PlacedToken, ...]
    finish: Finish | None = None

    def __add__(self, later: "Delta") -> "Delta":
        return Delta(self.index, self.text + later.text, self.tokens + later.tokens, later.finish)


class TextChoice:
    def __init__(self, tokenizer: TextTokenizer, choice: Choice, options: TextOptions) -> None:
        self._index = choice.index
        self._options = options
        self._stop_ids = frozenset(choice.sampling.stop_token_ids)
        self._detokenizer = make_detokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            prompt_token_ids=choice.prompt.token_ids,
        )
        self._stops = StopStringFinder(options.stop, include=options.include_stop)
        self._num_tokens = 0
        self._num_chars = 0
        self.stopped_by: str | None = None

    def push(self, tokens: Sequence[SampledToken]) -> Delta:
        """The text that is certain now. Once `stopped_by` is set the choice is over, and later tokens do not count."""
        text: list[str] = []
        placed: list[PlacedToken] = []
        for token in tokens:
            placed.append(PlacedToken(token, self._num_chars))
            found = self._take(token.token_id)
            text.append(found.text)
            if found.stop is not None:
                self.stopped_by = found.stop
                break
        return Delta(self._index, "".join(text), tuple(placed))

    def finish(self, reason: FinishReason, stop_token_id: int | None, phases: PhaseLedger, num_cached: int) -> Delta:
        """What was held back, and how the choice ended."""
        text = ""
        if self.stopped_by is None:
            found = self._stops.push(self._detokenizer.flush())
            self.stopped_by = found.stop
            text = found.text + (self._stops.flush() if found.stop is None else "")
        stop_reason: str | int | None = self.stopped_by
        if self.stopped_by is not None:
            reason = "stop"
        elif stop_token_id in self._options.client_stop_ids:
            stop_reason = stop_token_id
        return Delta(self._index, text, (), Finish(reason, stop_reason, phases, num_cached))

    def _take(self, token_id: int) -> Found:
        position = self._num_tokens
        self._num_tokens += 1
        if token_id in self._stop_ids and position >= self._options.min_tokens and not self._options.include_stop:
            return Found("")
        text = self._detokenizer.push(token_id)
        self._num_chars += len(text)
        if position < self._options.min_tokens:
            return self._stops.pass_through(text)
        return self._stops.push(text)
