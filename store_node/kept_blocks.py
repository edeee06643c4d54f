"""KeptBlocks: which blocks a store has said that it keeps, so that they are not offered to it again.

What a store has said holds for a while only, because it evicts and clears without a word; and only for the life in which
it was said, because a store that restarts may have forgotten.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from protocol.ids import Incarnation
from protocol.kv_blocks import CachedBlock
from runtime.clock import Clock

MAX_REMEMBERED = 1 << 16
REMEMBER_S = 600.0


class _Copy(NamedTuple):
    url: str
    incarnation: str
    until: float


class KeptBlocks:
    """On one event loop. Bounded: what was said longest ago goes first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._copies: OrderedDict[bytes, _Copy] = OrderedDict()
        self._lives: dict[str, str] = {}

    def note(self, blocks: Iterable[CachedBlock], url: str, incarnation: str) -> None:
        """The store at `url`, in this life of it, keeps these. With no blocks: it lives."""
        self._lives[url] = incarnation
        copy = _Copy(url, incarnation, self._clock.now() + REMEMBER_S)
        for block in blocks:
            self._copies[block.block_hash] = copy
            self._copies.move_to_end(block.block_hash)
        while len(self._copies) > MAX_REMEMBERED:
            self._copies.popitem(last=False)

    def has(self, block_hash: bytes, stores: Mapping[str, Incarnation | None]) -> bool:
        """Whether one of these stores keeps it. `stores`: control URLs, and the lives that others say they are in."""
        copy = self._copies.get(block_hash)
        if copy is None:
            return False
        in_life = copy.incarnation == self._lives[copy.url] and stores.get(copy.url) in (None, copy.incarnation)
        if in_life and copy.url in stores and self._clock.now() < copy.until:
            return True
        del self._copies[block_hash]
        return False
