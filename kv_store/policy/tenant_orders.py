"""TenantOrders: who goes next of all blocks of a tier, and of those of one tenant that may not have more.

All together go by the tier's policy. A tenant that a quota limits has an order of its own besides, from its first block to its
last: it is asked for at every batch that such a tenant saves, and looking for its blocks among everybody's would make
its neighbours wait. Within a tenant the least recently used goes first.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from kv_store.policy.lru import LRUPolicy
from kv_store.policy.policy import EvictionPolicy
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, Tenant


class TenantOrders:
    """Of one tier, around its `policy`, and as cheap: amortised O(log n) a block, however many tenants there are."""

    def __init__(self, policy: EvictionPolicy, is_limited: Callable[[Tenant], bool]) -> None:
        self._policy = policy
        self._is_limited = is_limited
        self._orders: dict[Tenant, LRUPolicy] = {}

    @property
    def num_orders(self) -> int:
        """Limited tenants with blocks here: never more than blocks."""
        return len(self._orders)

    def wanted(self, blocks: Sequence[CachedBlock], num_held: int, now: float) -> Iterator[None]:
        """As of EvictionPolicy: it happens step by step, as it is iterated."""
        yield from self._policy.wanted(blocks, num_held, now)
        for tenant, own in _by_tenant(blocks[:num_held]):
            order = self._orders.get(tenant)
            if order is not None:
                yield
                yield from order.wanted(own, len(own), now)

    def added(self, blocks: Sequence[CachedBlock], now: float) -> None:
        self._policy.added(blocks, now)
        for tenant, own in _by_tenant(blocks):
            if tenant not in self._orders:
                if not self._is_limited(tenant):
                    continue
                self._orders[tenant] = LRUPolicy()
            self._orders[tenant].added(own, now)

    def removed(self, blocks: Sequence[CachedBlock]) -> None:
        self._policy.removed([BlockHash(block.block_hash) for block in blocks])
        for tenant, own in _by_tenant(blocks):
            order = self._orders.get(tenant)
            if order is not None:
                order.removed([BlockHash(block.block_hash) for block in own])
                if not len(order):
                    del self._orders[tenant]

    def victims(
        self, count: int, now: float, may_evict: Callable[[BlockHash], bool], tenant: Tenant | None = None
    ) -> list[BlockHash]:
        """As of EvictionPolicy; with `tenant`, a limited one, of its blocks only."""
        if tenant is None:
            return self._policy.victims(count, now, may_evict)
        order = self._orders.get(tenant)
        return [] if order is None else order.victims(count, now, may_evict)


def _by_tenant(blocks: Sequence[CachedBlock]) -> Iterator[tuple[Tenant, list[CachedBlock]]]:
    """Neighbours of one tenant together; a chain has one."""
    for tenant, own in groupby(blocks, key=lambda block: block.tenant):
        yield Tenant(tenant), list(own)
