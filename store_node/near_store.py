"""NearStore: a node's own KVStore as the NearSource of its requests (kv_transfer.lending.near)."""

from collections.abc import Sequence

from kv_store.store import KVStore
from kv_transfer.lending.near import NearPlan, OnLoaded
from protocol.ids import BlockHash


class NearStore:
    def __init__(self, store: KVStore) -> None:
        self._store = store

    async def load(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[int], on_loaded: OnLoaded) -> int:
        return await self._store.load(block_hashes, block_ids, on_loaded)

    def plan(self, block_hashes: Sequence[BlockHash]) -> NearPlan:
        plan = self._store.plan(block_hashes)
        return NearPlan(plan.compute_first_blocks, plan.load_blocks)
