"""Checksums of the blocks of an arena.

What is much belongs on a worker thread; of what is little, the way there costs more than the reading
(kv_transfer.memory.staging says how much that is).
"""

from collections.abc import Iterable

from kv_transfer.memory.arena import HostArena
from protocol.checksum import checksum


def checksums(arena: HostArena, block_ids: Iterable[int]) -> tuple[int, ...]:
    """One checksum per block, in order. Raises IndexError for an id outside of the arena."""
    return tuple(checksum(arena.block(block_id)) for block_id in block_ids)
