"""A store without memory: says where a test has put blocks, and notes what it is told. Served by the product's own routes."""

from collections.abc import Sequence

from kv_store.tiers import Tier
from protocol.errors import InvalidParameter
from protocol.ids import BlockHash
from protocol.kv_blocks import NO_TENANT, Tenant
from protocol.kv_events import StorageTier
from protocol.store_admin import PINNED_BIT, TIER_BITS, StoreReport, TenantReport, TierReport


class FakeStore:
    """`held[tier]`: its blocks. Every block belongs to nobody."""

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.held: dict[Tier, set[bytes]] = {"host": set(), "disk": set()}
        self.pinned: dict[bytes, float] = {}

    def report(self) -> StoreReport:
        tiers = [
            TierReport(tier=tier, capacity=100, used=len(held), pinned=len(self.pinned), found=5, stored=4)
            for tier, held in self.held.items()
        ]
        tenant = TenantReport(tenant=NO_TENANT, tier="host", used=len(self.held["host"]), quota=100)
        return StoreReport(
            worker=self.worker, block_bytes=1024, tiers=tuple(tiers), lookups=4, hits=3, tenants=(tenant,)
        )

    def locate(self, block_hashes: Sequence[BlockHash]) -> bytes:
        return bytes(self._bits(block_hash) for block_hash in block_hashes)

    async def pin(self, block_hashes: Sequence[BlockHash], ttl_s: float) -> int:
        here = [block_hash for block_hash in block_hashes if self._bits(block_hash)]
        self.pinned |= dict.fromkeys(here, ttl_s)
        return len(here)

    def unpin(self, block_hashes: Sequence[BlockHash] | None) -> int:
        chosen = set(self.pinned) if block_hashes is None else self.pinned.keys() & set(block_hashes)
        for block_hash in chosen:
            del self.pinned[block_hash]
        return len(chosen)

    async def clear(self, tier: StorageTier | None, tenant: Tenant | None) -> int:
        if tier == "device" and tenant is not None:
            raise InvalidParameter("a device is cleared for all tenants or for none", param="tenant")
        chosen = [held for name, held in self.held.items() if tier in (None, name) and tenant in (None, NO_TENANT)]
        count = sum(map(len, chosen))
        for held in chosen:
            held.clear()
        return count

    def _bits(self, block_hash: bytes) -> int:
        bits = sum(TIER_BITS[tier] for tier, held in self.held.items() if block_hash in held)
        return bits | (PINNED_BIT if block_hash in self.pinned else 0)
