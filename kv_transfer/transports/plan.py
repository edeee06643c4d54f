"""The copy plan: which blocks move where, in as few pieces as possible. Pure.

Blocks that are consecutive on both sides move as one piece. Every transport pays per piece, not per byte, for all but
the largest pieces.
"""

from collections.abc import Sequence
from typing import NamedTuple


class CopyRun(NamedTuple):
    """Blocks source .. source + num_blocks - 1 go to destination .. destination + num_blocks - 1."""

    source: int
    destination: int
    num_blocks: int


def coalesce(source_ids: Sequence[int], destination_ids: Sequence[int]) -> list[CopyRun]:
    """Runs, in order of source id, that move source_ids[i] to destination_ids[i] for every i, each once.

    Raises ValueError if the two differ in length, an id is negative, or two blocks would land in the same place.
    """
    if len(source_ids) != len(destination_ids):
        raise ValueError(f"{len(source_ids)} blocks cannot go to {len(destination_ids)} places")
    if len(set(destination_ids)) != len(destination_ids):
        raise ValueError("two blocks would land in the same place")
    if any(block_id < 0 for block_id in (*source_ids, *destination_ids)):
        raise ValueError("a block id is negative")
    runs: list[CopyRun] = []
    for source, destination in sorted(zip(source_ids, destination_ids, strict=True)):
        if runs:
            last = runs[-1]
            if (source, destination) == (last.source + last.num_blocks, last.destination + last.num_blocks):
                runs[-1] = CopyRun(last.source, last.destination, last.num_blocks + 1)
                continue
        runs.append(CopyRun(source, destination, 1))
    return runs
