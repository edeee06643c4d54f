"""What is known of a full KV block besides its bytes, by whoever keeps it: its place in its chain, and whose it is."""

from collections.abc import Sequence
from typing import Annotated, NewType

import msgspec
from blake3 import blake3

from protocol.errors import InvalidParameter
from protocol.ids import BlockHash

Tenant = NewType("Tenant", str)
"""What logs, metrics and quotas call the owner of a cache salt: 12 hex digits that tell nothing of the salt itself."""

NO_TENANT = Tenant("none")
"""Of blocks without a salt, which all requests without a salt share."""

TenantText = Annotated[str, msgspec.Meta(min_length=1, max_length=16, pattern=r"^[0-9a-z]+$")]
"""The wire type of a Tenant."""


def tenant_of(cache_salt: str | None) -> Tenant:
    if cache_salt is None:
        return NO_TENANT
    return Tenant(blake3(b"headrace-tenant\x00" + cache_salt.encode()).hexdigest(length=6))


class CachedBlock(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The full block `position` of a chain of addresses, which continues block `parent` (the chain's root, for position 0).

    Small, and nothing for the garbage collector: stores keep one for every block that they hold.
    """

    block_hash: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    parent: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    position: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
    tenant: TenantText = NO_TENANT


def check_distinct(block_hashes: Sequence[bytes], param: str) -> None:
    """Raise InvalidParameter if an address comes twice: an address names all that comes before it, so no chain has one twice."""
    if len(set(block_hashes)) < len(block_hashes):
        raise InvalidParameter("a chain names a block twice", param=param)


def chain(
    root: BlockHash, block_hashes: Sequence[BlockHash], tenant: Tenant = NO_TENANT, first: int = 0
) -> list[CachedBlock]:
    """Blocks `first`, `first + 1`, ... of a chain; `root` is the parent of the first of them."""
    parents = [root, *block_hashes]
    return [
        CachedBlock(block_hash, parent, position, tenant)
        for position, (block_hash, parent) in enumerate(zip(block_hashes, parents, strict=False), start=first)
    ]
