"""The clairvoyant bound: what a cache of so many blocks could hit if it knew the trace's future. No policy can beat it.

The rule is Belady's MIN (1966), with the right not to keep: once a request is served, of all blocks that are here or were just
wanted, those stay whose next want comes soonest; of one request's, the first. It is the optimum for single blocks of one
size. A chain's head is wanted whenever its tail is, so what stays is always made of whole prefixes, and the contiguous
hits that we count are as many as the single ones that it maximizes.
"""

import heapq
from collections.abc import Sequence

from kv_store.replay.trace import TraceRequest


def clairvoyant_hit_rate(requests: Sequence[TraceRequest], capacity_blocks: int) -> float:
    next_wants = _next_wants(requests)
    held: dict[bytes, int] = {}
    farthest: list[tuple[int, int, bytes]] = []
    num_hits = num_wanted = 0
    for request, wants in zip(requests, next_wants, strict=True):
        num_wanted += len(request.blocks)
        for block in request.blocks:
            if block.block_hash not in held:
                break
            num_hits += 1
        for block, want in zip(request.blocks, wants, strict=True):
            if want is None:
                held.pop(block.block_hash, None)
            else:
                held[block.block_hash] = want
                heapq.heappush(farthest, (-want, -block.position, block.block_hash))
        while len(held) > capacity_blocks:
            want, _, block_hash = heapq.heappop(farthest)
            if held.get(block_hash) == -want:
                del held[block_hash]
    return num_hits / max(num_wanted, 1)


def _next_wants(requests: Sequence[TraceRequest]) -> list[list[int | None]]:
    """For every request and each of its blocks: the number of the next request that wants it."""
    upcoming: dict[bytes, int] = {}
    wants: list[list[int | None]] = []
    for number in range(len(requests) - 1, -1, -1):
        blocks = requests[number].blocks
        wants.append([upcoming.get(block.block_hash) for block in blocks])
        upcoming.update((block.block_hash, number) for block in blocks)
    wants.reverse()
    return wants
