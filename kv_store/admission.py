"""Admission: which blocks a store takes at all.

On most traces three blocks of four are never wanted again. While there is room that costs nothing; where blocks are evicted
before they could be of use, what has been wanted once only pushes out what has been wanted twice. Pure, small and bounded.
"""

from collections.abc import Sequence
from typing import Literal

from protocol.kv_blocks import CachedBlock

AdmissionMode = Literal["auto", "all", "second-touch"]

REMEMBERED = 1 << 15
"""Addresses in each of a memory's two generations; 3 MiB when it is full."""

HORIZON_S = 1800.0
"""A generation's age at which it goes: of real reuses, 99 in 100 come sooner."""

MIN_EVICTIONS = 256
ON_SHARE = 0.8
OFF_SHARE = 0.5
"""Of blocks that were evicted, those never used again: from which share on second-touch is on, and below which it is off."""

QUIET_S = 60.0
"""Without any eviction there is no pressure."""


class TouchCounts:
    """How often addresses came, of the last 32 k to 64 k different ones and of the last half to whole hour. Two generations take
    turns: when the younger is full, or old, the older goes; what comes again moves to the younger."""

    def __init__(self, remembered: int = REMEMBERED, horizon_s: float = HORIZON_S) -> None:
        self._remembered = remembered
        self._horizon_s = horizon_s
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def count(self, block_hash: bytes) -> int:
        """0 for what has never come, or has been forgotten."""
        return self._young.get(block_hash) or self._old.get(block_hash, 0)

    def touch(self, block_hash: bytes, now: float) -> int:
        """It has come once more. How often it had before."""
        if len(self._young) >= self._remembered or now - self._since >= self._horizon_s:
            self._turn(now)
        before = self.count(block_hash)
        self._young[block_hash] = before + 1
        return before

    def _turn(self, now: float) -> None:
        self._old = self._young if now - self._since < 2 * self._horizon_s else {}
        self._young = {}
        self._since = now


class Pressure:
    """Whether blocks are evicted in vain: a decaying share of evictions that had no use, with hysteresis."""

    def __init__(self) -> None:
        self._unused_share = 0.0
        self._num_evictions = 0
        self._last_at = 0.0
        self._on = False

    def evicted(self, used: bool, now: float) -> None:
        if now - self._last_at > QUIET_S:
            self._num_evictions = 0
        self._last_at = now
        self._num_evictions += 1
        weight = 1 / min(self._num_evictions, MIN_EVICTIONS)
        self._unused_share += ((0.0 if used else 1.0) - self._unused_share) * weight
        if self._num_evictions >= MIN_EVICTIONS and self._unused_share >= ON_SHARE:
            self._on = True
        elif self._unused_share < OFF_SHARE:
            self._on = False

    def is_on(self, now: float) -> bool:
        if self._on and now - self._last_at > QUIET_S:
            self._on = False
        return self._on


class Admission:
    """Not thread-safe: its store's lock guards it. A block passes "second-touch" when two requests have wanted it, or when it has
    been offered before: without word of requests, the second offer is the second touch."""

    def __init__(self, mode: AdmissionMode = "auto") -> None:
        self._mode = mode
        self._pressure = Pressure()
        self._requested = TouchCounts()
        self._offered = TouchCounts()

    def second_touch(self, now: float) -> bool:
        """Whether only blocks that were wanted twice get in."""
        return self._mode == "second-touch" or (self._mode == "auto" and self._pressure.is_on(now))

    def requested(self, blocks: Sequence[CachedBlock], now: float) -> None:
        """A request wants this chain."""
        if self._mode == "all":
            return
        for block in blocks:
            self._requested.touch(block.block_hash, now)

    def admits(self, block: CachedBlock, now: float) -> bool:
        """Whether to keep a block that is offered."""
        if self._mode == "all":
            return True
        offered_before = self._offered.touch(block.block_hash, now) > 0
        return not self.second_touch(now) or offered_before or self.was_wanted_twice(block)

    def was_wanted_twice(self, block: CachedBlock) -> bool:
        """By requests, as far as they are remembered."""
        return self._requested.count(block.block_hash) > 1

    def evicted(self, used: bool, now: float) -> None:
        """A block is in no tier any more, and had been of use here or had not."""
        self._pressure.evicted(used, now)
