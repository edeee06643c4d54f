"""StopStringFinder: finds stop strings in a text that arrives in pieces of any size.

Holds back only what could still become a stop string. Where the pieces end makes no difference to the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """`text` may go out. If `stop` is set, it was found there and nothing may follow."""

    text: str
    stop: str | None = None


class StopStringFinder:
    """`include`: the stop string itself goes out as well."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> Found:
        """The match that is complete first wins; of two complete at the same character, the longer."""
        if not self._stops:
            return Found(text)
        buffer = self._held + text
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if matches:
            end, start, stop = min(matches)
            self._held = ""
            return Found(buffer[: end if self._include else start], stop)
        keep = self._could_become_a_stop(buffer)
        self._held = buffer[len(buffer) - keep :]
        return Found(buffer[: len(buffer) - keep])

    def pass_through(self, text: str) -> Found:
        """Text in which stop strings do not count (before `min_tokens`)."""
        held, self._held = self._held, ""
        return Found(held + text)

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held

    def _could_become_a_stop(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that is the beginning of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(buffer)), 0, -1):
            tail = buffer[len(buffer) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
