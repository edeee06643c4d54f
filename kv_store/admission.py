"""Admission: which blocks a store takes at all.

On most traces three blocks of four are never wanted again. While there is room that costs nothing; where blocks are evicted
before they could be of use, what has been wanted once only pushes out what has been wanted twice. Pure, small and bounded.
"""

from collections.abc import Sequence
from typing import Literal

from protocol.kv_blocks import CachedBlock

AdmissionMode = Literal["auto", "all", "second-touch"]

REMEMBERED = 1 << 16
"""Addresses in each of a filter's two generations."""

BITS_PER_ADDRESS = 16
NUM_PROBES = 4
"""With 16 bits an address, a full generation says of one address in 400 that it has been seen when it has not."""

HORIZON_S = 1800.0
"""A generation's age at which it goes: of real reuses, 99 in 100 come sooner."""

MIN_EVICTIONS = 256
ON_SHARE = 0.8
OFF_SHARE = 0.5
"""Of blocks that were evicted, those never used again: from which share on second-touch is on, and below which it is off."""

QUIET_S = 60.0
"""Without any eviction there is no pressure."""


class SeenFilter:
    """Which addresses came before, of about the last 64 k to 128 k different ones, and of the last half to whole hour. Two Bloom
    filters (Bloom, 1970) that take turns: the older is emptied when the younger is full, or old. 256 KiB. It may be wrong
    about an address that is new, never about one that it still remembers."""

    def __init__(self, remembered: int = REMEMBERED, horizon_s: float = HORIZON_S) -> None:
        self._remembered = remembered
        self._horizon_s = horizon_s
        self._num_bits = remembered * BITS_PER_ADDRESS
        self._young = bytearray(self._num_bits // 8)
        self._old = bytearray(self._num_bits // 8)
        self._num_young = 0
        self._since = 0.0

    def __contains__(self, block_hash: bytes) -> bool:
        bits = self._bits(block_hash)
        return _all_set(self._young, bits) or _all_set(self._old, bits)

    def touch(self, block_hash: bytes, now: float) -> bool:
        """Whether it came before. From now on it has."""
        if self._num_young >= self._remembered or now - self._since >= self._horizon_s:
            self._turn(now)
        bits = self._bits(block_hash)
        if _all_set(self._young, bits):
            return True
        for bit in bits:
            self._young[bit >> 3] |= 1 << (bit & 7)
        self._num_young += 1
        return _all_set(self._old, bits)

    def _turn(self, now: float) -> None:
        self._old, self._young = self._young, bytearray(self._num_bits // 8)
        if now - self._since >= 2 * self._horizon_s:
            self._old = bytearray(self._num_bits // 8)
        self._num_young = 0
        self._since = now

    def _bits(self, block_hash: bytes) -> list[int]:
        """An address is a cryptographic hash: any four bytes of it are as good as a hash function of their own."""
        return [int.from_bytes(block_hash[i : i + 4], "little") % self._num_bits for i in range(0, 4 * NUM_PROBES, 4)]


def _all_set(bits: bytearray, indices: Sequence[int]) -> bool:
    return all(bits[index >> 3] >> (index & 7) & 1 for index in indices)


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
        self._wanted_once = SeenFilter()
        self._wanted_twice = SeenFilter()
        self._offered = SeenFilter()

    def second_touch(self, now: float) -> bool:
        """Whether only blocks that were wanted twice get in."""
        return self._mode == "second-touch" or (self._mode == "auto" and self._pressure.is_on(now))

    def requested(self, blocks: Sequence[CachedBlock], now: float) -> None:
        """A request wants this chain."""
        if self._mode == "all":
            return
        for block in blocks:
            if self._wanted_once.touch(block.block_hash, now):
                self._wanted_twice.touch(block.block_hash, now)

    def admits(self, block: CachedBlock, now: float) -> bool:
        """Whether to keep a block that is offered."""
        if self._mode == "all":
            return True
        offered_before = self._offered.touch(block.block_hash, now)
        return not self.second_touch(now) or offered_before or block.block_hash in self._wanted_twice

    def evicted(self, used: bool, now: float) -> None:
        """The host tier has given up a block, which had been of use here or had not."""
        self._pressure.evicted(used, now)
