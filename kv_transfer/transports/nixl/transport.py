"""NixlTransport: blocks over NIXL and UCX; between hosts, and on one host with whatever UCX finds fastest there.

What of the library's behaviour shapes this (each was seen to happen):

- It neither cancels nor times out. A transfer past its deadline raises TransferAbandoned; its blocks settle when the
  library says that it is over: after the peer woke up, or after its connection broke. How long a partition can hold
  them back is the kernel's TCP timeout. Nothing else is proof, least of all a peer that claims to be new.
- Damaged metadata spoils an agent's name for good, so names are new in every process and metadata is checked first.
- Of two agents that know each other one may crash when the other dies. Hence two agents in every process: peers know the
  passive one (passive.py), which knows nobody; the active one (agent.py) knows peers, and nobody knows it.
- Freeing registered memory kills readers or owner: the arena is registered once and outlives the transport.
- Its own notifications get lost and can be forged: nothing here uses them. Leases and checksums do that work.
- It does not survive fork(). Its sockets also lack CLOEXEC: Python's subprocess closes them in the child all the same, a
  library's own system() does not.
"""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Annotated

import msgspec

from kv_transfer.memory.device_arena import Arena
from kv_transfer.transport import (
    Capabilities,
    TransferAbandoned,
    TransportStats,
    check_block_ids,
    make_endpoint,
    open_payload,
)
from kv_transfer.transports.nixl.agent import NixlAgent
from kv_transfer.transports.nixl.blocks import Memory, NixlBlocks
from kv_transfer.transports.nixl.library import load_nixl
from kv_transfer.transports.nixl.passive import PassiveAgent
from kv_transfer.transports.nixl.transfer import CHUNK_BYTES, NixlPeer, NixlTransfer, Operation, plan_copy
from kv_transfer.transports.read_log import LinkUse, ReadLog, bounded
from protocol.errors import LayoutMismatch, TransferError
from protocol.ids import IdText, Incarnation, TicketId
from protocol.transfer import Direction, Endpoint, Introduction, TransportKind
from protocol.wire import encode

_serials = itertools.count()
"""An incarnation may make several transports (tests do); no two agents may share a name."""

Address = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class NixlPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach a passive agent. Descriptors do not travel: base address, block size and count give them all."""

    agent: IdText
    metadata: bytes
    memory: Memory
    device_id: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
    address: Address
    block_bytes: Address


class NixlTransport:
    """Made at start. Raises ConfigError where NIXL is missing or cannot start."""

    kind: TransportKind = "nixl"
    capabilities = Capabilities(
        directions=("pull", "push"),
        one_sided=True,
        needs_peer_progress=True,
        crosses_hosts=True,
        device_memory=True,
        owner_checks_lease=False,
        may_abandon=True,
        notices_death=True,
        best_piece_bytes=128 << 10,
    )

    def __init__(self, arena: Arena, incarnation: Incarnation, host: str) -> None:
        self.arena = arena
        self.log = ReadLog()
        self.chunk_blocks = max(1, CHUNK_BYTES // arena.block_bytes)
        memory: Memory = "VRAM" if arena.memory_kind == "cuda" else "DRAM"
        self.blocks = NixlBlocks(memory, arena.device_id, arena.address, arena.block_bytes, arena.num_wire_blocks)
        api = load_nixl(host)
        name = f"headrace-{incarnation}-{next(_serials)}"
        self.passive = PassiveAgent(api, name, self.blocks)
        self.agent = NixlAgent(api, f"{name}-active", self.blocks, keep_alive=arena.memory)

    def endpoint(self) -> Endpoint:
        blocks, passive = self.blocks, self.passive
        payload = NixlPayload(
            passive.name, passive.metadata, blocks.memory, blocks.device_id, blocks.address, blocks.block_bytes
        )
        return make_endpoint(self.kind, encode(payload))

    async def connect(self, peer: Introduction, endpoint: Endpoint) -> "NixlLink":
        payload = open_payload(peer, endpoint, NixlPayload)
        if payload.block_bytes != self.arena.block_bytes:
            raise LayoutMismatch(
                f"{peer.worker} has blocks of {payload.block_bytes} bytes, we of {self.arena.block_bytes}"
            )
        if not payload.agent.startswith(f"headrace-{peer.incarnation}-"):
            raise TransferError(f"{peer.worker} sent the NIXL metadata of {payload.agent}, which is not its own")
        blocks = NixlBlocks(
            payload.memory, payload.device_id, payload.address, payload.block_bytes, peer.num_wire_blocks
        )
        return NixlLink(self, await self.agent.add_peer(payload.agent, payload.metadata, blocks), peer.worker)

    def stats(self) -> TransportStats:
        return self.log.stats()

    async def close(self) -> None:
        await self.agent.close()
        await asyncio.to_thread(self.passive.close)


class NixlLink:
    def __init__(self, transport: NixlTransport, peer: NixlPeer, peer_name: str) -> None:
        self._transport = transport
        self._peer = peer
        self._peer_name = peer_name
        self._use = LinkUse(transport.log, peer_name)

    async def read(
        self,
        ticket_id: TicketId,  # noqa: ARG002  # there is nobody to show it to: the read is one-sided
        remote_block_ids: Sequence[int],
        local_block_ids: Sequence[int],
        timeout_s: float,
    ) -> None:
        self._check(local_block_ids, remote_block_ids)
        await self._move("READ", remote_block_ids, local_block_ids, timeout_s)

    async def write(self, local_block_ids: Sequence[int], remote_block_ids: Sequence[int], timeout_s: float) -> None:
        """After TransferAbandoned, until it is settled, our blocks may still be read and the peer's still be written:
        neither side may use its own for anything else."""
        self._check(local_block_ids, remote_block_ids)
        await self._move("WRITE", local_block_ids, remote_block_ids, timeout_s)

    async def close(self) -> None:
        if not self._use.closed:
            await self._use.close()
            await self._transport.agent.drop_peer(self._peer)

    def _check(self, local_block_ids: Sequence[int], remote_block_ids: Sequence[int]) -> None:
        check_block_ids(remote_block_ids, self._peer.blocks.num_blocks, f"{self._peer_name}'s")
        check_block_ids(local_block_ids, self._transport.blocks.num_blocks, "our")

    async def _move(
        self, operation: Operation, sources: Sequence[int], destinations: Sequence[int], timeout_s: float
    ) -> None:
        transport = self._transport
        plan = plan_copy(sources, destinations, transport.chunk_blocks)
        direction: Direction = "pull" if operation == "READ" else "push"
        with self._use.transfer(len(sources) * transport.arena.block_bytes, plan.num_pieces, direction):
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            transfer = NixlTransfer(operation, self._peer, plan, transport.chunk_blocks, ended)
            transport.agent.start(transfer)
            try:
                await bounded(ended, timeout_s, self._peer_name)
            except TransferAbandoned:
                transfer.abandoned = True
                raise
