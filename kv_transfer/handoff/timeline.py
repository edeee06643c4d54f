"""HandoffTimeline: what a hand-off did when, so that the time which it exposed can be told apart afterwards. Without I/O.

At every instant a hand-off moves bytes; or moves none and proves what came; or does neither, and waits: for checksums, an
announcement, its turn on the link, a message. So the three add up to the whole, however pieces overlap.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from protocol.phases import HandoffPhases
from runtime.clock import Clock

_State = Literal["queue", "wire", "verify"]


class HandoffTimeline:
    """Instants are of `clock`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._num_moving = 0
        self._num_verifying = 0
        self._changes: list[tuple[float, _State]] = [(-math.inf, "queue")]

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around one piece's way over the wire. Pieces may overlap."""
        self._num_moving += 1
        self._note()
        try:
            yield
        finally:
            self._num_moving -= 1
            self._note()

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """Around the proof of one piece."""
        self._num_verifying += 1
        self._note()
        try:
            yield
        finally:
            self._num_verifying -= 1
            self._note()

    def exposed(self, computed_at: float, ended_at: float) -> HandoffPhases:
        """Of the time between the two instants. What comes before the first counts for nothing: prefill computed meanwhile."""
        spent: dict[_State, float] = {"queue": 0.0, "wire": 0.0, "verify": 0.0}
        ends = [*(instant for instant, _ in self._changes[1:]), ended_at]
        for (began_at, state), next_at in zip(self._changes, ends, strict=True):
            spent[state] += max(0.0, min(next_at, ended_at) - max(began_at, computed_at))
        return HandoffPhases(queue_s=spent["queue"], wire_s=spent["wire"], verify_s=spent["verify"])

    def _note(self) -> None:
        state: _State = "wire" if self._num_moving else "verify" if self._num_verifying else "queue"
        if state != self._changes[-1][1]:
            self._changes.append((self._clock.now(), state))
