"""Owner and Member: who publishes to the index, as the process itself says it and as the others read it.

A *life* is the number that the index gives to one registration of one process. It is higher than all that were given before,
also by a server that has lost its data since (see scripts). Places name the life, so whatever an earlier life
published is void the moment the owner has a new one.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from protocol.ids import IdText, Incarnation, WorkerId
from protocol.kv_layout import KVLayout
from protocol.transfer import Fingerprint, Url

MemberRole = Literal["prefill", "decode", "store"]
MAX_LIFE = (1 << 32) - 1
MAX_BUCKETS = 1 << 14
MAX_OWNER_BYTES = 2048
"""With its seal."""

MIN_CHUNK_TOKENS = 256

Life = Annotated[int, msgspec.Meta(ge=1, le=MAX_LIFE)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Constant for one process. `fingerprint` is its KVLayout's: only owners of the same one can read each other's blocks.
    `capacity_blocks`: of all its tiers together. `num_buckets`: into how many sets its own entries are divided, in
    each shard, so that each stays small."""

    worker_id: IdText
    incarnation: IdText
    role: MemberRole
    control_url: Url
    fingerprint: Fingerprint
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    capacity_blocks: Count
    num_buckets: Annotated[int, msgspec.Meta(ge=1, le=MAX_BUCKETS)] = 1

    @property
    def chunk_blocks(self) -> int:
        """Blocks that one entry covers: at least MIN_CHUNK_TOKENS tokens' worth."""
        return -(-MIN_CHUNK_TOKENS // self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An owner that is alive, as far as the index knows. `used_blocks` as of its last heartbeat."""

    worker_id: WorkerId
    incarnation: Incarnation
    life: int
    role: MemberRole
    control_url: str
    fingerprint: str
    capacity_blocks: int
    used_blocks: int


def owner_of(
    worker_id: WorkerId,
    incarnation: Incarnation,
    role: MemberRole,
    control_url: str,
    layout: KVLayout,
    capacity_blocks: int,
) -> Owner:
    """How a process of this layout introduces itself."""
    chunks = capacity_blocks // -(-MIN_CHUNK_TOKENS // layout.block_size)
    return Owner(
        worker_id=worker_id,
        incarnation=incarnation,
        role=role,
        control_url=control_url,
        fingerprint=layout.fingerprint,
        block_size=layout.block_size,
        capacity_blocks=capacity_blocks,
        num_buckets=num_buckets_for(chunks),
    )


def num_buckets_for(num_chunks: int, num_shards: int = 16) -> int:
    """As many as keep the mean bucket at 64 members or less: servers hold sets of up to 128 short members in one compact piece, at a
    third of the memory of a large set."""
    wanted = max(1, -(-num_chunks // (num_shards * 64)))
    return min(MAX_BUCKETS, 1 << (wanted - 1).bit_length())
