"""Clearing: what was stored or under way when it began is found in no tier when it ends.

Blocks that are being written into host slots are dropped when they arrive (Clears). What is on its way to disk gets there
first and is then forgotten, on the same thread; meanwhile nothing is promoted, or it would come back from there.
"""

import asyncio
import contextlib

from kv_store.disk_worker import DiskWorker
from kv_store.host_tier import HostTier
from kv_store.promotion import Promoter
from kv_store.tiers import Tier
from protocol.kv_blocks import Tenant

PIECE_BLOCKS = 512
"""Forgotten at once: a millisecond or two for whoever waits for the lock or the loop."""


async def clear(
    host: HostTier, worker: DiskWorker | None, promoter: Promoter | None, tier: Tier | None, tenant: Tenant | None
) -> int:
    """How many blocks. What is stored meanwhile may go as well."""
    count = 0
    with promoter.resting() if promoter is not None and tier is None else contextlib.nullcontext():
        if tier != "disk":
            host.clear_begins(tenant)
            count += await _clear_host(host, tenant)
        if tier != "host" and worker is not None:
            count += await worker.clear(tenant)
    return count


async def _clear_host(host: HostTier, tenant: Tenant | None) -> int:
    count = 0
    blocks = [stored.block for stored in await asyncio.to_thread(host.snapshot)]
    hashes = [block.block_hash for block in blocks if tenant is None or block.tenant == tenant]
    for first in range(0, len(hashes), PIECE_BLOCKS):
        count += host.forget(hashes[first : first + PIECE_BLOCKS])
        await asyncio.sleep(0)
    return count
