"""PutLane: one store's share of what a node puts, and what the node knows of that store: how fast it takes blocks, and whether
it has failed lately. Each lane is emptied by a task of its own, so that a store which is silent holds up nobody else's."""

from dataclasses import dataclass

from protocol.store import MAX_PUT_S
from store_node.waiting_blocks import WaitingBlocks

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0

MIN_PUT_S = 4.0
SLACK = 4
"""A store has other puts to take, and room to make."""

ASSUMED_BYTES_PER_S = 256 << 20
ASSUMED_S = 0.1
"""Before anything is measured: as if so much had gone over, in so long."""

DECAY = 0.75
"""Of what was measured, with each further put."""


@dataclass(slots=True)
class _Pause:
    until: float
    seconds: float


class PutLane:
    """Of the store at control URL `url`. Blocks take `block_bytes` each. `running` belongs to whoever empties it."""

    def __init__(self, url: str, block_bytes: int) -> None:
        self.url = url
        self.waiting = WaitingBlocks()
        self.running = False
        self._block_bytes = block_bytes
        self._bytes = ASSUMED_BYTES_PER_S * ASSUMED_S
        self._seconds = ASSUMED_S
        self._pause: _Pause | None = None

    def is_open(self, now: float) -> bool:
        return self._pause is None or self._pause.until <= now

    def patience_s(self, num_blocks: int) -> float:
        """How long a put of so many blocks may take: by the rate of those before it, with slack. A store that brings nothing
        within it looks slower from then on, so that the next put may take longer."""
        seconds = num_blocks * self._block_bytes * self._seconds / max(self._bytes, 1.0)
        return min(MAX_PUT_S, MIN_PUT_S + SLACK * seconds)

    def answered(self, num_blocks: int, seconds: float) -> None:
        """It took over so many blocks, in so long."""
        self._pause = None
        self._measure(num_blocks * self._block_bytes, seconds)

    def failed(self, now: float, seconds: float) -> float | None:
        """It has not answered within `seconds`, or refused. How long it is left alone; None where it has been before."""
        before = self._pause
        pause_s = FIRST_PAUSE_S if before is None else min(2 * before.seconds, MAX_PAUSE_S)
        self._pause = _Pause(now + pause_s, pause_s)
        self._measure(0, seconds)
        return pause_s if before is None else None

    def _measure(self, num_bytes: int, seconds: float) -> None:
        """Sums of bytes and of seconds, so that small puts, which are mostly waiting, weigh little."""
        self._bytes = DECAY * self._bytes + num_bytes
        self._seconds = max(DECAY * self._seconds + seconds, 1e-9)
