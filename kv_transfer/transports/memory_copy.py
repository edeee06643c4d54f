"""Copies runs of blocks from one mapped region into an arena, on a worker thread.

ctypes lets go of the GIL during memmove, so a copy of any size leaves the event loop and the engine running.
"""

import ctypes
from collections.abc import Sequence

from kv_transfer.memory.arena import HostArena
from kv_transfer.transports.plan import CopyRun


def copy_runs(source_address: int, arena: HostArena, runs: Sequence[CopyRun]) -> None:
    """`source_address` is where block 0 of the source starts in this process. The ids have been checked."""
    size = arena.block_bytes
    for run in runs:
        ctypes.memmove(
            arena.address + run.destination * size, source_address + run.source * size, run.num_blocks * size
        )
