"""Contestant: one thing that moves blocks between two stations; and the one for transports, through their seam."""

from collections.abc import Sequence
from typing import Protocol

from kv_transfer.memory.arena import HostArena
from kv_transfer.transport import Link, find_endpoint, introduce
from kv_transfer.transports.factory import make_transport
from kv_transfer.transports.ucx.transport import UcxTransport
from protocol.ids import TicketId, WorkerId, new_incarnation
from protocol.kv_layout import KVLayout
from protocol.transfer import Direction, Introduction, TransportKind
from protocol.wire import decode, encode

TIMEOUT_S = 30.0
TICKET = TicketId("benchmark")


class Contestant(Protocol):
    """Both stations have one of each kind. It offers, meets what the other's has offered, then moves blocks."""

    @property
    def directions(self) -> tuple[Direction, ...]: ...

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes of its own, beside the station."""
        ...

    def offer(self) -> bytes:
        """What the other end needs to reach this one."""
        ...

    async def meet(self, offer: bytes) -> None: ...

    async def move(self, direction: Direction, source: Sequence[int], destination: Sequence[int]) -> None:
        """Called on the initiator: the destination's station for a pull, the source's for a push."""
        ...

    async def close(self) -> None: ...


class TransportContestant:
    """A transport as the nodes use it. Its export side lends every block to everybody."""

    def __init__(self, kind: TransportKind, arena: HostArena) -> None:
        self._kind = kind
        self._arena = arena
        self._layout = layout_of(arena.block_bytes)
        self._incarnation = new_incarnation()
        self._link: Link | None = None
        self._transport = make_transport(
            kind, arena, incarnation=self._incarnation, host="127.0.0.1", may_read=lambda _ticket, _blocks: True
        )

    @property
    def directions(self) -> tuple[Direction, ...]:
        return self._transport.capabilities.directions

    @property
    def pids(self) -> tuple[int, ...]:
        return (self._transport.helper.pid,) if isinstance(self._transport, UcxTransport) else ()

    def offer(self) -> bytes:
        me = introduce(WorkerId("station"), self._incarnation, self._layout, self._arena, [self._transport])
        return encode(me)

    async def meet(self, offer: bytes) -> None:
        peer = decode(offer, Introduction)
        self._link = await self._transport.connect(peer, find_endpoint(peer, self._kind))

    async def move(self, direction: Direction, source: Sequence[int], destination: Sequence[int]) -> None:
        assert self._link is not None, "they have met"
        if direction == "pull":
            await self._link.read(TICKET, source, destination, TIMEOUT_S)
        else:
            await self._link.write(source, destination, TIMEOUT_S)

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()
        await self._transport.close()


def layout_of(block_bytes: int) -> KVLayout:
    """Some layout with blocks of this many bytes."""
    return KVLayout(
        model="benchmark",
        revision="none",
        dtype="float16",
        num_layers=1,
        num_kv_heads=block_bytes // (2 * 2 * 16 * 64),
        head_dim=64,
        block_size=16,
        rope="none",
    )
