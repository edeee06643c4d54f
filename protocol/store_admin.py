"""Router -> node: what an operator asks a node's KV store, or tells it. One message, one reply, under /store/v1 of every node.

A node without a store answers too, with no tiers, so that silence always means a node in trouble.
"""

from typing import Annotated, Literal

import msgspec

from protocol.ids import IdText
from protocol.kv_blocks import TenantText
from protocol.kv_events import StorageTier
from protocol.transfer import HashBytes
from protocol.workers import Count

MAX_CHAIN_BLOCKS = 1 << 17
"""A prompt of a million tokens in the smallest blocks."""

MAX_TTL_S = 30 * 86_400.0
MAX_TENANTS = 512

ChainHashes = Annotated[tuple[HashBytes, ...], msgspec.Meta(max_length=MAX_CHAIN_BLOCKS)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
BreakerState = Literal["closed", "open", "probing"]

TIER_BITS: dict[StorageTier, int] = {"device": 1, "host": 2, "disk": 4}
PINNED_BIT = 8


class TierReport(msgspec.Struct, frozen=True, kw_only=True):
    """One tier, in blocks: what is there now (`pinned` and `held` by readers are among `used`), and what has happened since its
    node started. `found`: leading blocks that requests were told of; `unused`: of the evicted, those never read."""

    tier: StorageTier
    capacity: Count
    used: Count
    pinned: Count = 0
    held: Count = 0
    found: Count = 0
    stored: Count = 0
    evicted: Count = 0
    unused: Count = 0
    damaged: Count = 0


class TenantReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one cache salt has in one tier, in blocks. `quota`: as much as it may have; `refused`: beyond that."""

    tenant: TenantText
    tier: StorageTier
    used: Count
    quota: Count
    refused: Count = 0


class IndexReport(msgspec.Struct, frozen=True, kw_only=True):
    """How the node stands with the Redis index. Now: `entries` of its own there, changes that are `queued` for it, the oldest
    for `lag_s`; not `registered`: nothing can be published. Since its start: `lookups`, of which `found` somebody, `late` were
    over the budget and `skipped` while the breaker was open; `drift`: entries that were wrong, and mended."""

    breaker: BreakerState
    retry_in_s: Seconds = 0.0
    registered: bool = True
    lag_s: Seconds = 0.0
    queued: Count = 0
    entries: Count = 0
    members: Count = 0
    lookups: Count = 0
    found: Count = 0
    late: Count = 0
    skipped: Count = 0
    errors: Count = 0
    drift: Count = 0


class StoreReport(msgspec.Struct, frozen=True, kw_only=True):
    """A node's whole store. `lookups` are requests that asked it, `hits` those that it had a block of, `missed` the blocks that
    it had not. `refused`: blocks that it did not take in, by reason. `tenants`: the largest of them. No `index`: the node was
    not told of one."""

    worker: IdText
    block_bytes: Count
    tiers: Annotated[tuple[TierReport, ...], msgspec.Meta(max_length=3)]
    lookups: Count = 0
    hits: Count = 0
    missed: Count = 0
    refused: Annotated[dict[str, Count], msgspec.Meta(max_length=16)] = {}
    tenants: Annotated[tuple[TenantReport, ...], msgspec.Meta(max_length=MAX_TENANTS)] = ()
    index: IndexReport | None = None


class LocateBlocks(msgspec.Struct, frozen=True):
    block_hashes: ChainHashes


class BlocksLocated(msgspec.Struct, frozen=True):
    """`tiers[i]`: TIER_BITS of the tiers that hold block i, and PINNED_BIT. Shorter than the question where the rest is in no
    tier."""

    tiers: Annotated[bytes, msgspec.Meta(max_length=MAX_CHAIN_BLOCKS)]


class PinBlocks(msgspec.Struct, frozen=True):
    """Keep what is there of these blocks for so long. Pinning again sets the time anew."""

    block_hashes: ChainHashes
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_TTL_S)]


class UnpinBlocks(msgspec.Struct, frozen=True):
    """None: every block that is pinned."""

    block_hashes: ChainHashes | None


class ClearStore(msgspec.Struct, frozen=True):
    """Forget what nobody reads at this moment: of one tier or all, of one tenant or all."""

    tier: StorageTier | None
    tenant: TenantText | None


class BlocksChanged(msgspec.Struct, frozen=True):
    """The answer to PinBlocks, UnpinBlocks and ClearStore: how many blocks it was done to. A block that two tiers hold counts
    twice."""

    num_blocks: Count
