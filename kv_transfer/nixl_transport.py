"""NixlTransport: blocks over NIXL and UCX; between hosts, and on one host with whatever UCX finds fastest there.

What of the library's behaviour shapes this (each was seen to happen):

- It neither cancels nor times out. A read past its deadline raises TransferAbandoned; its blocks settle when the library
  says that the transfer is over: after the peer woke up, or after its connection broke. How long a partition can hold
  them back is the kernel's TCP timeout. Nothing else is proof, least of all a peer that claims to be new.
- Damaged metadata spoils an agent's name for good, so names are new in every process and metadata is checked first.
- Metadata is added in one direction only, reader adds owner: an owner that knew its readers would crash with them.
- Freeing registered memory kills readers or owner: the arena is registered once and outlives the transport.
- Its own notifications get lost and can be forged: nothing here uses them. Leases and checksums do that work.
"""

import itertools
from collections.abc import Sequence

import msgspec

from kv_transfer.arena import HostArena
from kv_transfer.nixl_agent import NixlAgent, NixlPeer
from kv_transfer.plan import coalesce
from kv_transfer.read_log import LinkUse, ReadLog, bounded
from kv_transfer.transport import (
    Capabilities,
    TransferAbandoned,
    TransportStats,
    check_block_ids,
    does_not_push,
    make_endpoint,
)
from protocol.errors import HeadraceError, LayoutMismatch, TransferError
from protocol.ids import IdText, Incarnation, TicketId
from protocol.transfer import Endpoint, Introduction, TransportKind
from protocol.wire import decode, encode

_serials = itertools.count()
"""An incarnation may make several transports (tests do); no two agents may share a name."""


class NixlPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach an agent. Descriptors do not travel: base address, block size and count give them all."""

    agent: IdText
    metadata: bytes
    address: int
    block_bytes: int


class NixlTransport:
    """Made at start. Raises ConfigError where NIXL is missing or cannot start."""

    kind: TransportKind = "nixl"
    capabilities = Capabilities(
        directions=("pull",),
        one_sided=True,
        needs_peer_progress=True,
        crosses_hosts=True,
        device_memory=True,
        owner_checks_lease=False,
        may_abandon=True,
        notices_death=True,
        best_piece_bytes=128 << 10,
    )

    def __init__(self, arena: HostArena, incarnation: Incarnation, host: str) -> None:
        self.arena = arena
        self.log = ReadLog()
        self.agent = NixlAgent(arena, incarnation, host, next(_serials))

    def endpoint(self) -> Endpoint:
        payload = NixlPayload(self.agent.name, self.agent.metadata, self.arena.address, self.arena.block_bytes)
        return make_endpoint(self.kind, encode(payload))

    async def connect(self, peer: Introduction, endpoint: Endpoint) -> "NixlLink":
        try:
            payload = decode(endpoint.payload, NixlPayload)
        except HeadraceError as error:
            raise TransferError(f"{peer.worker} sent unusable NIXL metadata: {error.message}") from error
        if payload.block_bytes != self.arena.block_bytes:
            raise LayoutMismatch(
                f"{peer.worker} has blocks of {payload.block_bytes} bytes, we of {self.arena.block_bytes}"
            )
        remote = await self.agent.add_peer(payload.agent, payload.metadata, payload.address, peer.num_wire_blocks)
        return NixlLink(self, remote, peer.worker)

    def stats(self) -> TransportStats:
        return self.log.stats()

    async def close(self) -> None:
        await self.agent.close()


class NixlLink:
    def __init__(self, transport: NixlTransport, peer: NixlPeer, owner: str) -> None:
        self._transport = transport
        self._peer = peer
        self._owner = owner
        self._use = LinkUse(transport.log, owner)

    async def read(
        self,
        ticket_id: TicketId,  # noqa: ARG002  # there is nobody to show it to: the read is one-sided
        remote_block_ids: Sequence[int],
        local_block_ids: Sequence[int],
        timeout_s: float,
    ) -> None:
        arena = self._transport.arena
        check_block_ids(remote_block_ids, self._peer.num_blocks, f"{self._owner}'s")
        check_block_ids(local_block_ids, arena.num_wire_blocks, "our")
        runs = coalesce(remote_block_ids, local_block_ids)
        with self._use.transfer(len(local_block_ids) * arena.block_bytes, len(runs)):
            transfer = self._transport.agent.read(self._peer, runs)
            try:
                await bounded(transfer.ended, timeout_s, self._owner)
            except TransferAbandoned:
                transfer.abandoned = True
                raise

    async def write(
        self,
        local_block_ids: Sequence[int],  # noqa: ARG002
        remote_block_ids: Sequence[int],  # noqa: ARG002
        timeout_s: float,  # noqa: ARG002
    ) -> None:
        raise does_not_push("nixl")

    async def close(self) -> None:
        if not self._use.closed:
            await self._use.close()
            await self._transport.agent.drop_peer(self._peer)
