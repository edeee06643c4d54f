"""Quotas: how much of a tier each tenant may fill. A value, made at start."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol.kv_blocks import NO_TENANT, Tenant


@dataclass(frozen=True, slots=True)
class Quotas:
    """`share`: of a tier, for any tenant that `blocks_by_tenant` does not name. Every tenant has one block at least. Requests without
    a salt are nobody's in particular: unless `blocks_by_tenant` names NO_TENANT, no share binds them together."""

    share: float = 1.0
    blocks_by_tenant: Mapping[Tenant, int] = field(default_factory=dict)

    def limit(self, tenant: Tenant, num_slots: int) -> int:
        """Blocks that it may hold of a tier of so many."""
        share = 1.0 if tenant == NO_TENANT else self.share
        blocks = self.blocks_by_tenant.get(tenant, int(num_slots * share))
        return max(1, min(blocks, num_slots))
