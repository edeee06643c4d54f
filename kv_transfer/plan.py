"""The copy plan: which blocks move where, in as few pieces as possible. Pure.

Blocks that are consecutive on both sides move as one piece. Every transport pays per piece, not per byte, for all but
the largest pieces.
"""

from collections.abc import Sequence
from typing import NamedTuple


class CopyRun(NamedTuple):
    """Blocks remote .. remote + num_blocks - 1 go to local .. local + num_blocks - 1."""

    remote: int
    local: int
    num_blocks: int


def coalesce(remote_ids: Sequence[int], local_ids: Sequence[int]) -> list[CopyRun]:
    """Runs, in order of remote id, that move remote_ids[i] to local_ids[i] for every i, each once.

    Raises ValueError if the two differ in length, an id is negative, or two blocks would land in the same place.
    """
    if len(remote_ids) != len(local_ids):
        raise ValueError(f"{len(remote_ids)} remote blocks cannot go to {len(local_ids)} local ones")
    if len(set(local_ids)) != len(local_ids):
        raise ValueError("two blocks would land in the same place")
    if any(block_id < 0 for block_id in (*remote_ids, *local_ids)):
        raise ValueError("a block id is negative")
    runs: list[CopyRun] = []
    for remote, local in sorted(zip(remote_ids, local_ids, strict=True)):
        if runs:
            last = runs[-1]
            if (remote, local) == (last.remote + last.num_blocks, last.local + last.num_blocks):
                runs[-1] = CopyRun(last.remote, last.local, last.num_blocks + 1)
                continue
        runs.append(CopyRun(remote, local, 1))
    return runs
