"""Time, injected. Instants never leave the process; durations do."""

import time
from typing import Protocol

from protocol.errors import DeadlineExceeded


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a clock that never goes back. Only differences mean anything."""
        ...


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that tests move by hand."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


class Deadline:
    """A point in time of this process by which something must be done."""

    def __init__(self, seconds: float, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._at = self._clock.now() + seconds

    @property
    def remaining_s(self) -> float:
        """Seconds left; 0 once it has passed."""
        return max(0.0, self._at - self._clock.now())

    @property
    def passed(self) -> bool:
        return self._clock.now() >= self._at

    def check(self, what: str) -> None:
        """Raise DeadlineExceeded, naming what was being done, once it has passed."""
        if self.passed:
            raise DeadlineExceeded(f"deadline passed while {what}")
