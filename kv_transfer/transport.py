"""The transport seam: how the bytes of KV blocks get from one process's arena into another's.

    Transport    one per process and kind, made at start by factory.make_transport, closed before the arena
      Link       one per peer incarnation and initiator, made from what the peer said when it introduced itself

Both sides of a pair run the same kind. The initiator, who has the link, moves the bytes: a reader that pulls or an owner
that pushes. A transport moves bytes and proves nothing about them: the memory may have been reused, so whoever reads
checks the checksums.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import xxhash

from kv_transfer.memory.device_arena import Arena
from protocol.errors import (
    ChecksumMismatch,
    HeadraceError,
    LayoutMismatch,
    LeaseExpired,
    PeerLost,
    TransferError,
    TransferTimeout,
)
from protocol.ids import Incarnation, TicketId, WorkerId
from protocol.kv_layout import KVLayout
from protocol.transfer import Direction, Endpoint, Introduction, MissingTransport, TransportKind
from protocol.wire import decode

Payload = TypeVar("Payload")

log = logging.getLogger(__name__)

MayRead = Callable[[TicketId, Sequence[int]], bool]
"""The owner's answer to "may the holder of this ticket read these blocks now?". Called from any thread."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Facts about a transport, for choosing one and for telling the user what was chosen.

    directions            who may move the bytes: "pull" is the reader, "push" the owner
    one_sided             the other process takes no part in a transfer
    needs_peer_progress   a transfer stands still while the other process does
    crosses_hosts         works between machines
    device_memory         reaches the memory of a GPU without a copy in host memory
    owner_checks_lease    the owner refuses to send blocks whose lease is gone (checksums are verified regardless)
    may_abandon           a transfer may time out with bytes still on their way: see TransferAbandoned
    notices_death         the death of the other process ends a transfer, at once
    best_piece_bytes      pieces of at least this size move at full speed
    """

    directions: tuple[Direction, ...]
    one_sided: bool
    needs_peer_progress: bool
    crosses_hosts: bool
    device_memory: bool
    owner_checks_lease: bool
    may_abandon: bool
    notices_death: bool
    best_piece_bytes: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Totals of transfers that we initiated. `num_copies`: pieces moved, after merging neighbours. `num_quarantined`:
    transfers given up whose bytes may still land, now."""

    num_transfers: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    num_copies: int = 0
    seconds: float = 0.0
    num_quarantined: int = 0


@dataclass(frozen=True, slots=True)
class TransportStats(Moved):
    """What an initiator's transport did since it was made; probes do not count. `by_peer` is the same by the peer's name
    and the direction, for peers that are linked or were until lately."""

    by_peer: Mapping[tuple[str, Direction], Moved] = field(default_factory=dict)


class TransferAbandoned(TransferTimeout):
    """The transfer was given up, but its bytes may still land: the blocks at its destination, and those at the source
    of a write, are not to be reused before `settled` is set."""

    def __init__(self, message: str, settled: asyncio.Event) -> None:
        super().__init__(message)
        self.settled = settled


class Link(Protocol):
    """An initiator's way to one peer's arena.

    Guarantee of `read` and `write`: when they return or raise, no more bytes move; the one exception is
    TransferAbandoned, which carries the event that says when that has become true. After an error the contents of the
    destination are undefined. They raise only TransferError: PeerLost when the peer is gone (this link is then broken for
    good), TransferTimeout or TransferAbandoned after `timeout_s` seconds.

    They must not be cancelled: a cancelled transfer could not keep the guarantee. Whoever loses interest lets it end.
    """

    async def read(
        self, ticket_id: TicketId, remote_block_ids: Sequence[int], local_block_ids: Sequence[int], timeout_s: float
    ) -> None:
        """Copy remote_block_ids[i] of the peer's arena into local_block_ids[i] of ours, for every i."""
        ...

    async def write(self, local_block_ids: Sequence[int], remote_block_ids: Sequence[int], timeout_s: float) -> None:
        """Copy local_block_ids[i] of our arena into remote_block_ids[i] of the peer's, for every i. Raises
        TransferError where "push" is not among the directions of the transport."""
        ...

    async def close(self) -> None:
        """Give up the peer, after transfers in flight have ended. Abandoned ones still settle later. Idempotent."""
        ...


class Transport(Protocol):
    """One process's end of a kind of transport: initiator and target at once."""

    @property
    def kind(self) -> TransportKind: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def endpoint(self) -> Endpoint:
        """What a peer needs to reach our arena."""
        ...

    async def connect(self, peer: Introduction, endpoint: Endpoint) -> Link:
        """Reach a peer at one of its endpoints, of our kind. Both have passed the checks below. Raises only
        TransferError."""
        ...

    def stats(self) -> TransportStats: ...

    async def close(self) -> None:
        """Stop serving peers and end all links. Idempotent. The arena must outlive this."""
        ...


class OutOfReach(PeerLost):
    """This kind of transport cannot join these two processes, and no setting would change that."""


async def close_link(link: Link) -> None:
    """Close a link that is not needed any more, or is broken: how that goes is nobody's trouble."""
    try:
        await link.close()
    except TransferError as error:
        log.info("a link did not close cleanly: %s", error.message)


def does_not_push(kind: TransportKind) -> TransferError:
    return TransferError(f"the {kind} transport does not push")


def make_endpoint(kind: TransportKind, payload: bytes) -> Endpoint:
    return Endpoint(transport=kind, payload=payload, checksum=xxhash.xxh3_64_intdigest(payload))


def introduce(
    worker: WorkerId,
    incarnation: Incarnation,
    layout: KVLayout,
    arena: Arena,
    transports: Iterable[Transport],
    *,
    missing: Iterable[MissingTransport] = (),
    scratch_seed: bytes = b"",
) -> Introduction:
    """What a process says of itself when it meets a peer."""
    return Introduction(
        worker=worker,
        incarnation=incarnation,
        layout=layout,
        num_blocks=arena.num_blocks,
        num_scratch_blocks=arena.num_scratch_blocks,
        endpoints=tuple(transport.endpoint() for transport in transports),
        missing=tuple(missing),
        scratch_seed=scratch_seed,
    )


def find_endpoint(peer: Introduction, kind: TransportKind) -> Endpoint:
    """The peer's endpoint of this kind, whole. Raises TransferError.

    Nothing of it may reach native code before: damaged metadata does lasting harm there.
    """
    for endpoint in peer.endpoints:
        if endpoint.transport == kind:
            if xxhash.xxh3_64_intdigest(endpoint.payload) != endpoint.checksum:
                raise ChecksumMismatch(f"the {kind} metadata of {peer.worker} arrived damaged")
            return endpoint
    raise nothing_in_common(peer, [kind])


def nothing_in_common(peer: Introduction, ours: Sequence[TransportKind]) -> LayoutMismatch:
    offered = ", ".join(endpoint.transport for endpoint in peer.endpoints) or "nothing"
    return LayoutMismatch(
        f"{peer.worker} moves KV by {offered}, this node by {', '.join(ours)}; set transfer.transport to the same on both"
    )


def open_payload(peer: Introduction, endpoint: Endpoint, payload_type: type[Payload]) -> Payload:
    """What a transport has put into its endpoint. Raises TransferError if it is something else."""
    try:
        return decode(endpoint.payload, payload_type)
    except HeadraceError as error:
        raise TransferError(f"{peer.worker} sent unusable {endpoint.transport} metadata: {error.message}") from error


def check_introduction(peer: Introduction, *, incarnation: Incarnation, layout: KVLayout) -> None:
    """Raise TransferError unless the peer is in the expected life and its blocks are usable here."""
    if peer.incarnation != incarnation:
        raise LeaseExpired(f"{peer.worker} restarted: it is in incarnation {peer.incarnation}")
    layout.check_compatible(peer.layout, peer.worker)
    if peer.num_blocks < 1:
        raise LayoutMismatch(f"{peer.worker} has no KV blocks")


def check_block_ids(block_ids: Sequence[int], num_blocks: int, whose: str) -> None:
    """Raise TransferError unless every id is within an arena of `num_blocks` blocks."""
    for block_id in block_ids:
        if not 0 <= block_id < num_blocks:
            raise TransferError(f"block {block_id} is not in {whose} arena of {num_blocks} blocks")


def lends(arena: Arena, may_read: MayRead, ticket_id: TicketId, runs: Sequence[tuple[int, int]]) -> bool:
    """Whether an owner lends all these blocks, (first, count) each. Scratch blocks are lent to everybody."""
    lent = [block for first, count in runs for block in range(first, first + count) if block < arena.num_blocks]
    return not lent or may_read(ticket_id, lent)
