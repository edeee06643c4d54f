"""The transport seam: how the bytes of KV blocks get from an owner's arena into a reader's.

    Transport    one per process and kind, made at start by factory.make_transport, closed before the arena
      Link       one per peer incarnation, made by the reader from the owner's metadata

Both sides of a pair run the same kind. Readers pull. A transport moves bytes and proves nothing about them: the memory
may have been reused, so whoever reads checks the checksums.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import xxhash

from kv_transfer.arena import HostArena
from protocol.errors import ChecksumMismatch, LayoutMismatch, LeaseExpired, TransferError, TransferTimeout
from protocol.ids import Incarnation, TicketId, WorkerId
from protocol.kv_layout import KVLayout
from protocol.transfer import TransportKind, TransportMetadata

MayRead = Callable[[TicketId, Sequence[int]], bool]
"""The owner's answer to "may the holder of this ticket read these blocks now?". Called from any thread."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Facts about a transport, for choosing one and for telling the user what was chosen.

    direction             who moves the bytes: "pull" is the reader
    one_sided             the owner's process takes no part in a read
    needs_peer_progress   a read stands still while the owner's process does
    crosses_hosts         works between machines
    owner_checks_lease    the owner refuses to send blocks whose lease is gone (checksums are verified regardless)
    may_abandon           a read may time out with bytes still on their way: see ReadAbandoned
    """

    direction: Literal["pull"]
    one_sided: bool
    needs_peer_progress: bool
    crosses_hosts: bool
    owner_checks_lease: bool
    may_abandon: bool


@dataclass(frozen=True, slots=True)
class TransportStats:
    """What a reader's transport did since it was made. `num_copies`: pieces moved, after merging neighbours.
    `num_quarantined`: reads given up whose bytes may still land, now."""

    num_reads: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    num_copies: int = 0
    seconds: float = 0.0
    num_quarantined: int = 0


class ReadAbandoned(TransferTimeout):
    """The read was given up, but its bytes may still land: the local blocks are quarantined until `settled` is set."""

    def __init__(self, message: str, settled: asyncio.Event) -> None:
        super().__init__(message)
        self.settled = settled


class Link(Protocol):
    """A reader's way to one owner's arena."""

    async def read(
        self, ticket_id: TicketId, remote_block_ids: Sequence[int], local_block_ids: Sequence[int], timeout_s: float
    ) -> None:
        """Copy remote_block_ids[i] of the owner's arena into local_block_ids[i] of ours, for every i.

        Guarantee: when this returns or raises, no more bytes can land in the local blocks; the one exception is
        ReadAbandoned, which carries the event that says when that has become true. After an error the contents of the
        local blocks are undefined. Raises only TransferError: PeerLost when the owner is gone (this link is then
        broken for good), TransferTimeout or ReadAbandoned after `timeout_s` seconds.

        Must not be cancelled: a cancelled read could not keep the guarantee. Whoever loses interest lets it end.
        """
        ...

    async def close(self) -> None:
        """Give up the peer, after reads in flight have ended. Abandoned reads still settle later. Idempotent."""
        ...


class Transport(Protocol):
    """One process's end of a kind of transport: owner and reader at once."""

    @property
    def kind(self) -> TransportKind: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def local_payload(self) -> bytes:
        """What a peer needs to reach our arena: the payload of TransportMetadata."""
        ...

    async def connect(self, metadata: TransportMetadata) -> Link:
        """Reach a peer. The metadata has passed verify_metadata. Raises only TransferError."""
        ...

    def stats(self) -> TransportStats: ...

    async def close(self) -> None:
        """Stop serving peers and end all links. Idempotent. The arena must outlive this."""
        ...


def describe(
    transport: Transport, arena: HostArena, layout: KVLayout, owner: WorkerId, incarnation: Incarnation
) -> TransportMetadata:
    """What the owner answers to TransportConnect."""
    payload = transport.local_payload()
    return TransportMetadata(
        owner=owner,
        incarnation=incarnation,
        transport=transport.kind,
        layout=layout,
        num_blocks=arena.num_blocks,
        payload=payload,
        checksum=xxhash.xxh3_64_intdigest(payload),
    )


def verify_metadata(
    metadata: TransportMetadata, *, kind: TransportKind, incarnation: Incarnation, layout: KVLayout
) -> None:
    """Raise TransferError unless the metadata is whole, of the expected life of its owner, and usable here.

    Nothing of it may reach native code before: damaged metadata does lasting harm there.
    """
    if xxhash.xxh3_64_intdigest(metadata.payload) != metadata.checksum:
        raise ChecksumMismatch(f"transport metadata of {metadata.owner} arrived damaged")
    if metadata.incarnation != incarnation:
        raise LeaseExpired(f"{metadata.owner} restarted: its metadata is of incarnation {metadata.incarnation}")
    if metadata.transport != kind:
        raise LayoutMismatch(f"{metadata.owner} moves KV by {metadata.transport}, this node by {kind}")
    layout.check_compatible(metadata.layout, metadata.owner)
    if metadata.num_blocks < 1:
        raise LayoutMismatch(f"{metadata.owner} has no KV blocks")


def check_block_ids(block_ids: Sequence[int], num_blocks: int, whose: str) -> None:
    """Raise TransferError unless every id is within an arena of `num_blocks` blocks."""
    for block_id in block_ids:
        if not 0 <= block_id < num_blocks:
            raise TransferError(f"block {block_id} is not in {whose} arena of {num_blocks} blocks")
