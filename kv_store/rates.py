"""Rates: what moving a block costs here, by kind of move. Measured, and None until it has been."""

from kv_store.observer import Move

DECAY = 0.8
"""By batch: the last five weigh two thirds."""


STALE_AFTER_S = 30.0
"""What was slow half a minute ago need not be slow any more."""


class Rates:
    """Decaying averages over whole batches, each with all of its blocks and all of its time. Not thread-safe."""

    def __init__(self) -> None:
        self._blocks: dict[Move, float] = {}
        self._seconds: dict[Move, float] = {}
        self._noted_at: dict[Move, float] = {}

    def note(self, move: Move, num_blocks: int, seconds: float, now: float) -> None:
        if num_blocks:
            self._noted_at[move] = now
            self._blocks[move] = self._blocks.get(move, 0.0) * DECAY + num_blocks
            self._seconds[move] = self._seconds.get(move, 0.0) * DECAY + seconds

    def seconds_per_block(self, move: Move) -> float | None:
        blocks = self._blocks.get(move)
        return self._seconds[move] / blocks if blocks else None

    def is_stale(self, move: Move, now: float) -> bool:
        """Whether it was measured, but not lately."""
        return move in self._noted_at and now - self._noted_at[move] >= STALE_AFTER_S
