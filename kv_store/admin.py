"""The control routes of a node's store: what `headrace cache` asks a node, by way of its router. Behind the cluster key.

They are there on a node without a store as well, which then says so by having no tiers.
"""

from collections.abc import Sequence
from typing import Protocol

from starlette.routing import Route

from protocol.ids import BlockHash
from protocol.kv_blocks import Tenant, check_distinct
from protocol.kv_events import StorageTier
from protocol.store_admin import (
    BlocksChanged,
    BlocksLocated,
    ClearStore,
    LocateBlocks,
    PinBlocks,
    StoreReport,
    UnpinBlocks,
)
from runtime.rpc_server import get_route, message_route

PATH = "/store/v1"


class ManagedStore(Protocol):
    """A store as far as an operator is concerned. Called on the node's event loop."""

    def report(self) -> StoreReport: ...

    def locate(self, block_hashes: Sequence[BlockHash]) -> bytes:
        """For each block, where it is: protocol.store_admin's TIER_BITS and PINNED_BIT."""
        ...

    async def pin(self, block_hashes: Sequence[BlockHash], ttl_s: float) -> int:
        """Keep what is there of these blocks; how many that were."""
        ...

    def unpin(self, block_hashes: Sequence[BlockHash] | None) -> int:
        """Of these blocks, or of all; how many were pinned."""
        ...

    async def clear(self, tier: StorageTier | None, tenant: Tenant | None) -> int:
        """Forget blocks of one tier or all, of one tenant or all; how many that were, those of a device left out. Raises
        InvalidParameter for what cannot be told apart."""
        ...


def admin_routes(store: ManagedStore, cluster_key: str | None) -> list[Route]:
    async def stats() -> StoreReport:
        return store.report()

    async def locate(message: LocateBlocks) -> BlocksLocated:
        return BlocksLocated(store.locate(_addresses(message.block_hashes)).rstrip(b"\x00"))

    async def pin(message: PinBlocks) -> BlocksChanged:
        check_distinct(message.block_hashes, "block_hashes")
        return BlocksChanged(await store.pin(_addresses(message.block_hashes), message.ttl_s))

    async def unpin(message: UnpinBlocks) -> BlocksChanged:
        chosen = message.block_hashes
        return BlocksChanged(store.unpin(None if chosen is None else _addresses(chosen)))

    async def clear(message: ClearStore) -> BlocksChanged:
        tenant = None if message.tenant is None else Tenant(message.tenant)
        return BlocksChanged(await store.clear(message.tier, tenant))

    return [
        get_route(f"{PATH}/stats", stats, cluster_key),
        message_route(f"{PATH}/locate", LocateBlocks, locate, cluster_key),
        message_route(f"{PATH}/pin", PinBlocks, pin, cluster_key),
        message_route(f"{PATH}/unpin", UnpinBlocks, unpin, cluster_key),
        message_route(f"{PATH}/clear", ClearStore, clear, cluster_key),
    ]


def _addresses(block_hashes: Sequence[bytes]) -> list[BlockHash]:
    return [BlockHash(block_hash) for block_hash in block_hashes]
