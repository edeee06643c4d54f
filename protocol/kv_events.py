"""Node -> router: what a worker's prefix cache gained and lost, numbered without gaps within an incarnation.

A consumer that sees a gap, or a new incarnation, forgets the worker's blocks and asks for a snapshot. Removing an
address that is not known and storing one that is known are no errors.
"""

from typing import Annotated, Literal

import msgspec

from protocol.ids import IdText

StorageTier = Literal["device", "host", "disk"]
MAX_EVENT_BLOCKS = 1 << 17
BlockHashes = Annotated[tuple[bytes, ...], msgspec.Meta(max_length=MAX_EVENT_BLOCKS)]


class BlocksStored(msgspec.Struct, frozen=True, tag="stored"):
    block_hashes: BlockHashes
    tier: StorageTier = "device"


class BlocksRemoved(msgspec.Struct, frozen=True, tag="removed"):
    block_hashes: BlockHashes
    tier: StorageTier = "device"


class AllBlocksCleared(msgspec.Struct, frozen=True, tag="cleared"):
    """The cache is empty now. A snapshot is this, followed by BlocksStored."""


KVEvent = BlocksStored | BlocksRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, frozen=True):
    """Events `first_event`, `first_event + 1`, ... of this incarnation."""

    incarnation: IdText
    first_event: Annotated[int, msgspec.Meta(ge=0)]
    events: Annotated[tuple[KVEvent, ...], msgspec.Meta(max_length=1 << 16)]
