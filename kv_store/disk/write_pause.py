"""WritePause: after the disk has refused a write, when to try again. Pure; times are in seconds."""

import errno
import os
from collections import Counter

FIRST_PAUSE_S = 5.0
MAX_PAUSE_S = 300.0


def cause_of(error: Exception) -> str:
    """For counts and logs: "ENOSPC (No space left on device)"; of what is no disk's doing, and so a bug, its type."""
    if not isinstance(error, OSError):
        return type(error).__name__
    number = error.errno or 0
    return f"{errno.errorcode.get(number, str(number))} ({os.strerror(number)})"


class WritePause:
    """Writes rest for FIRST_PAUSE_S after a failure, twice as long after each that follows without a success between."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        """Since the start, by cause."""
        self._pause_s = FIRST_PAUSE_S
        self._until = float("-inf")
        self._told: set[str] = set()

    def may_write(self, now: float) -> bool:
        return now >= self._until

    def remaining_s(self, now: float) -> float:
        return max(0.0, self._until - now)

    def failed(self, cause: str, now: float) -> bool:
        """Whether to log it: once for each cause, until a write succeeds again."""
        self.failures[cause] += 1
        self._until = now + self._pause_s
        self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s)
        is_new = cause not in self._told
        self._told.add(cause)
        return is_new

    def succeeded(self) -> None:
        self._pause_s = FIRST_PAUSE_S
        self._until = float("-inf")
        self._told.clear()
