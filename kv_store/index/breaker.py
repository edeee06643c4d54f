"""Breaker: whether the server is worth asking. Pure; the clock is injected.

    closed ──3 failures in a row──▶ open ──cooldown over──▶ probing ──success──▶ closed
                                      ▲                        │
                                      └──failure: cooldown x 2─┘

Requests are let through only while it is closed, so that an outage costs three of them their budget and the others nothing.
Probes are made in the background. An outcome that comes late, of an attempt that began in an earlier state, is ignored.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from runtime.clock import Clock

BreakerState = Literal["closed", "open", "probing"]
MAX_FAILURES = 3
FIRST_COOLDOWN_S = 1.0
MAX_COOLDOWN_S = 30.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """The permission to ask once. Its outcome is told to the breaker that gave it."""

    era: int


class Breaker:
    """On one event loop. `jitter` returns something in [0, 1): it keeps many processes from probing at once."""

    def __init__(self, clock: Clock, jitter: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._jitter = jitter
        self._state: BreakerState = "closed"
        self._era = 0
        self._failures = 0
        self._cooldown_s = FIRST_COOLDOWN_S
        self._retry_at = 0.0
        self.num_opened = 0

    @property
    def state(self) -> BreakerState:
        return self._state

    @property
    def retry_in_s(self) -> float:
        """Until the next probe may be made; 0 while closed."""
        return max(0.0, self._retry_at - self._clock.now()) if self._state == "open" else 0.0

    def admit(self) -> Attempt | None:
        """For a request. None: do without."""
        return Attempt(self._era) if self._state == "closed" else None

    def probe(self) -> Attempt | None:
        """For the background: one at a time, when the cooldown is over."""
        if self._state != "open" or self._clock.now() < self._retry_at:
            return None
        self._enter("probing")
        return Attempt(self._era)

    def succeeded(self, attempt: Attempt) -> None:
        if attempt.era != self._era:
            return
        self._failures = 0
        if self._state == "probing":
            self._cooldown_s = FIRST_COOLDOWN_S
            self._enter("closed")

    def failed(self, attempt: Attempt) -> None:
        """No answer: the connection failed, or the time was over. An answer that says no is not a failure."""
        if attempt.era != self._era:
            return
        self._failures += 1
        if self._state == "probing":
            self._cooldown_s = min(MAX_COOLDOWN_S, 2 * self._cooldown_s)
            self._open()
        elif self._failures >= MAX_FAILURES:
            self._open()

    def _open(self) -> None:
        self._retry_at = self._clock.now() + self._cooldown_s * (0.75 + 0.5 * self._jitter())
        self.num_opened += 1
        self._enter("open")

    def _enter(self, state: BreakerState) -> None:
        self._state = state
        self._era += 1
        self._failures = 0
