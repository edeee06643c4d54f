"""BackingStore: what keeps blocks when the device forgets them, as far as the engine is concerned.

Both questions are asked on the engine's thread, between steps: they are answered from memory, within microseconds. Everything
that takes time is an event and a command (BlocksOffered and Engine.saved, Reserved and Engine.resume).
"""

from collections.abc import Sequence
from typing import Protocol

from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock


class BackingStore(Protocol):
    def num_loadable(self, block_hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of this chain it holds near by. A hint: loading may still bring fewer."""
        ...

    def wanted(self, blocks: Sequence[CachedBlock]) -> list[bool]:
        """Of blocks that will be forgotten (or, where `eager`, have just been computed): which it lacks and would keep. They are
        offered next, unless they are gone already, and the answer only counts what was lost."""
        ...

    @property
    def eager(self) -> bool:
        """Write-through: offer blocks as soon as they are computed, not only when they are about to be forgotten."""
        ...


class NoBacking:
    """What the device forgets is gone."""

    eager = False

    def num_loadable(self, block_hashes: Sequence[BlockHash]) -> int:  # noqa: ARG002  # it holds nothing
        return 0

    def wanted(self, blocks: Sequence[CachedBlock]) -> list[bool]:
        return [False] * len(blocks)
