"""A node -> whoever operates it: how its KV moves, for GET /kv/links. The one message that travels as JSON."""

import msgspec

from protocol.ids import IdText
from protocol.transfer import Direction, MissingTransport, TransportKind, Url


class WayReport(msgspec.Struct, frozen=True, kw_only=True):
    """One way that was tried when two nodes met. Without numbers it could not be measured, and `problem` says why."""

    transport: TransportKind
    direction: Direction
    latency_s: float | None = None
    bytes_per_s: float | None = None
    problem: str = ""


class LinkReport(msgspec.Struct, frozen=True, kw_only=True):
    """How KV comes from one owner. `why`: the choice in one sentence with its numbers; `warning`: something much faster is
    within reach. `unusable` are transports that both nodes were told to run, and what is in their way. `bytes_moved` is of
    this node's reads from that peer; what is pushed is counted by who pushes."""

    peer: IdText
    incarnation: IdText
    control_url: Url
    transport: TransportKind
    direction: Direction
    why: str
    warning: str | None
    ways: tuple[WayReport, ...]
    unusable: tuple[MissingTransport, ...]
    bytes_moved: int
    age_s: float


class ReaderReport(msgspec.Struct, frozen=True, kw_only=True):
    """A reader that has introduced itself; `pushed_by` are the transports of links into its memory."""

    peer: IdText
    incarnation: IdText
    pushed_by: tuple[TransportKind, ...]
    bytes_pushed: int
    silent_s: float


class TransportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a transport that runs here can do; see kv_transfer.transport.Capabilities."""

    transport: TransportKind
    directions: tuple[Direction, ...]
    one_sided: bool
    needs_peer_progress: bool
    crosses_hosts: bool
    device_memory: bool
    owner_checks_lease: bool
    may_abandon: bool
    notices_death: bool
    best_piece_bytes: int


class LinksReport(msgspec.Struct, frozen=True, kw_only=True):
    """`missing`: transports that this node was told to run and cannot."""

    worker: IdText
    transports: tuple[TransportReport, ...]
    missing: tuple[MissingTransport, ...]
    links: tuple[LinkReport, ...]
    readers: tuple[ReaderReport, ...]
