"""Two tiers, one trace: a device's cache, which forgets by LRU, above a host tier; by how the host tier is written.

write back      a block is offered to the host tier when the device forgets it
write through   as soon as it is computed
second touch    either, but only what two requests have wanted is taken
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from kv_store.admission import Admission, AdmissionMode
from kv_store.directory import TierDirectory
from kv_store.policy.factory import PolicyName, make_policy
from kv_store.replay.one_tier import serve
from kv_store.replay.trace import TraceRequest
from protocol.kv_blocks import CachedBlock
from runtime.clock import ManualClock

WriteMode = Literal["back", "through"]


@dataclass(frozen=True, slots=True)
class TwoTiers:
    device_blocks: int
    host_blocks: int
    policy: PolicyName
    write: WriteMode = "back"
    admission: AdmissionMode = "auto"


class TwoTiersResult(msgspec.Struct, frozen=True):
    """`hit_rate`: leading blocks that one of the tiers had, of all wanted; `host_write_rate`: blocks written to the host tier, of
    all wanted."""

    device_blocks: int
    host_blocks: int
    policy: PolicyName
    write: WriteMode
    admission: AdmissionMode
    hit_rate: float
    host_write_rate: float


def replay_two_tiers(requests: Sequence[TraceRequest], tiers: TwoTiers) -> TwoTiersResult:
    clock = ManualClock()
    device = TierDirectory(tiers.device_blocks, make_policy("lru", tiers.device_blocks), clock=clock)
    host = TierDirectory(tiers.host_blocks, make_policy(tiers.policy, tiers.host_blocks), clock=clock)
    admission = Admission(tiers.admission)
    num_hits = num_wanted = num_written = 0
    for request in requests:
        clock.advance(request.time_s - clock.now())
        blocks = request.blocks
        num_wanted += len(blocks)
        num_hits += _num_found(blocks, device, host)
        admission.requested(blocks, clock.now())
        host.requested(blocks)
        held = host.hold([block.block_hash for block in blocks])
        host.used(held)
        _, _, forgotten = serve(device, blocks)
        offered = forgotten if tiers.write == "back" else blocks
        num_written += _offer(host, admission, offered, clock.now())
        host.let_go(held)
    return TwoTiersResult(
        tiers.device_blocks,
        tiers.host_blocks,
        tiers.policy,
        tiers.write,
        tiers.admission,
        num_hits / max(num_wanted, 1),
        num_written / max(num_wanted, 1),
    )


def _num_found(blocks: Sequence[CachedBlock], device: TierDirectory, host: TierDirectory) -> int:
    for index, block in enumerate(blocks):
        if not device.is_ready(block.block_hash) and not host.is_ready(block.block_hash):
            return index
    return len(blocks)


def _offer(host: TierDirectory, admission: Admission, blocks: Sequence[CachedBlock], now: float) -> int:
    """How many of them were written to the host tier. The head of a chain comes first, whatever order the device forgot it in."""
    new = [block for block in sorted(blocks, key=_position) if block.block_hash not in host]
    reservation = host.reserve([block for block in new if admission.admits(block, now)])
    host.commit(reservation.entries, [0] * len(reservation.entries))
    for entry in reservation.evicted:
        admission.evicted(entry.num_uses > 0, now)
    return len(reservation.entries)


def _position(block: CachedBlock) -> int:
    return block.position
