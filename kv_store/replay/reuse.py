"""ReuseSummary: what a trace says before any cache is chosen."""

from collections.abc import Sequence

import msgspec
import numpy as np

from kv_store.replay.trace import TraceRequest

QUANTILES = (0.5, 0.9, 0.99)


class ReuseSummary(msgspec.Struct, frozen=True):
    """`unlimited_hit_rate`: of a cache that never evicts. `never_again_share`: of distinct blocks. `gap_s`: the
    quantiles QUANTILES of the time from one want of a block to its next; None where no block comes back."""

    num_requests: int
    duration_s: float
    num_wanted_blocks: int
    num_distinct_blocks: int
    unlimited_hit_rate: float
    never_again_share: float
    gap_s: tuple[float, ...] | None


def summarize_reuse(requests: Sequence[TraceRequest]) -> ReuseSummary:
    last: dict[bytes, float] = {}
    again: set[bytes] = set()
    gaps: list[float] = []
    num_wanted = 0
    for request in requests:
        num_wanted += len(request.blocks)
        for block in request.blocks:
            before = last.get(block.block_hash)
            if before is not None:
                gaps.append(request.time_s - before)
                again.add(block.block_hash)
            last[block.block_hash] = request.time_s
    return ReuseSummary(
        num_requests=len(requests),
        duration_s=requests[-1].time_s if requests else 0.0,
        num_wanted_blocks=num_wanted,
        num_distinct_blocks=len(last),
        unlimited_hit_rate=len(gaps) / max(num_wanted, 1),
        never_again_share=1.0 - len(again) / max(len(last), 1),
        gap_s=tuple(float(gap) for gap in np.quantile(gaps, QUANTILES)) if gaps else None,
    )
