"""What the benchmark and its stations say to each other: one message each way, over a local socket that keeps message
boundaries. Every command is answered by its own reply or by Failed."""

from typing import Annotated

import msgspec

from protocol.errors import ErrorInfo
from protocol.transfer import Direction, TransportKind

MAX_MESSAGE_BYTES = 192 << 10


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Make an arena of `num_blocks` blocks filled with bytes drawn from `seed`, and every contestant's end. Answered by
    Opened."""

    transports: tuple[TransportKind, ...]
    baselines: bool
    block_bytes: int
    num_blocks: int
    seed: int


class Meet(msgspec.Struct, frozen=True, tag="meet"):
    """Connect every contestant to the other station's. Answered by Done."""

    offers: dict[str, bytes]


class Move(msgspec.Struct, frozen=True, tag="move"):
    """Move blocks for `seconds`, at least `at_least` times, and compute the checksums of what has landed if the initiator
    is the reader and `checksums` says so. Answered by Moved."""

    contestant: str
    direction: Direction
    source: tuple[int, ...]
    destination: tuple[int, ...]
    checksums: bool
    seconds: float
    at_least: int


class Wipe(msgspec.Struct, frozen=True, tag="wipe"):
    """Fill these blocks with zeros. Answered by Done."""

    block_ids: tuple[int, ...]


class Sum(msgspec.Struct, frozen=True, tag="sum"):
    """Answered by Sums."""

    block_ids: tuple[int, ...]


class Idle(msgspec.Struct, frozen=True, tag="idle"):
    """Make a transport, do nothing with it, and say what that costs. Before Open. Answered by Idled."""

    transport: TransportKind
    seconds: float


Command = Open | Meet | Move | Wipe | Sum | Idle


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """`offers`: what the other station needs to meet each contestant. `missing`: why others are not there. `directions`: of
    each contestant. `pids`: helper processes, whose CPU time counts."""

    offers: dict[str, bytes]
    directions: dict[str, tuple[Direction, ...]]
    missing: dict[str, str]
    pids: tuple[int, ...]


class Moved(msgspec.Struct, frozen=True, tag="moved"):
    """Of each transfer."""

    seconds: tuple[float, ...]


class Sums(msgspec.Struct, frozen=True, tag="sums"):
    checksums: tuple[int, ...]


class Idled(msgspec.Struct, frozen=True, tag="idled"):
    """CPU seconds a second, of all processes that the transport keeps; None where it is missing."""

    cpu_share: Annotated[float, msgspec.Meta(ge=0)] | None


class Done(msgspec.Struct, frozen=True, tag="done"):
    pass


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    error: ErrorInfo


Reply = Opened | Moved | Sums | Idled | Done | Failed
