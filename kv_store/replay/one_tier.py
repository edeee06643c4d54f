"""One tier, one policy, one trace: the directory that production uses, on the trace's clock."""

from collections.abc import Sequence

import msgspec

from kv_store.directory import TierDirectory
from kv_store.policy.factory import PolicyName, make_policy
from kv_store.replay.trace import TraceRequest
from protocol.kv_blocks import CachedBlock
from runtime.clock import ManualClock


class OneTierResult(msgspec.Struct, frozen=True):
    """`hit_rate`: leading blocks that were held, of all that were wanted. `write_rate`: blocks written, of all wanted."""

    policy: PolicyName
    capacity_blocks: int
    hit_rate: float
    write_rate: float


def replay_one_tier(requests: Sequence[TraceRequest], policy: PolicyName, capacity_blocks: int) -> OneTierResult:
    clock = ManualClock()
    directory = TierDirectory(capacity_blocks, make_policy(policy, capacity_blocks), clock=clock)
    num_hits = num_wanted = num_written = 0
    for request in requests:
        clock.advance(request.time_s - clock.now())
        num_ready, written, _ = serve(directory, request.blocks)
        num_wanted += len(request.blocks)
        num_hits += num_ready
        num_written += written
    return OneTierResult(policy, capacity_blocks, num_hits / max(num_wanted, 1), num_written / max(num_wanted, 1))


def serve(directory: TierDirectory, blocks: Sequence[CachedBlock]) -> tuple[int, int, list[CachedBlock]]:
    """A request reads what is there and writes the rest. How many blocks it found, how many it wrote, and what was evicted."""
    for _ in directory.requested(blocks):
        pass
    found = directory.hold([block.block_hash for block in blocks])
    num_ready = len(found)
    directory.used(found)
    num_written, evicted = write(directory, blocks[num_ready:])
    directory.let_go(found)
    return num_ready, num_written, evicted


def write(directory: TierDirectory, blocks: Sequence[CachedBlock]) -> tuple[int, list[CachedBlock]]:
    """How many were written, and what was evicted for them."""
    reservation = directory.reserve(blocks)
    directory.commit(reservation.entries, [0] * len(reservation.entries))
    return len(reservation.entries), [entry.block for entry in reservation.evicted]
