"""UcxTransport: blocks over UCX by way of ucxx (what became of ucx-py), between hosts and on one.

UCX lives in a helper process (process.py says why); this is the node's side of it. Reads are two-sided: the owner's
helper asks its node whether the ticket holds, and sends. UCX cannot stop a receive that has begun, so a read that is given
up leaves its blocks in quarantine; where that lasts, because the peer stands still, the helper is ended and started anew,
after which nothing can land.
"""

import asyncio
from collections.abc import Sequence

from kv_transfer.memory.arena import HostArena
from kv_transfer.transport import (
    Capabilities,
    MayRead,
    TransferAbandoned,
    TransportStats,
    check_block_ids,
    does_not_push,
    lends,
    make_endpoint,
    open_payload,
)
from kv_transfer.transports.plan import CopyRun, coalesce
from kv_transfer.transports.read_log import LinkUse, ReadLog, bounded
from kv_transfer.transports.ucx.helper import UcxHelper, UcxPeer
from kv_transfer.transports.ucx.wire import MAX_RUNS, UcxPayload
from protocol.ids import TicketId
from protocol.transfer import Endpoint, Introduction, TransportKind
from protocol.wire import encode
from runtime.clock import Deadline

FENCE_AFTER_S = 10.0
"""How long a read that was given up may hold its blocks before the helper is ended. It costs all other reads in flight."""


class UcxTransport:
    """Made at start. Raises ConfigError where ucxx is missing or cannot start."""

    kind: TransportKind = "ucx"
    capabilities = Capabilities(
        directions=("pull",),
        one_sided=False,
        needs_peer_progress=True,
        crosses_hosts=True,
        device_memory=False,
        owner_checks_lease=True,
        may_abandon=True,
        notices_death=True,
        best_piece_bytes=256 << 10,
    )

    def __init__(self, arena: HostArena, host: str, may_read: MayRead, fence_after_s: float = FENCE_AFTER_S) -> None:
        self.arena = arena
        self.log = ReadLog()
        self.fence_after_s = fence_after_s
        self.helper = UcxHelper(arena, host, lambda ticket_id, runs: lends(arena, may_read, ticket_id, runs))

    def endpoint(self) -> Endpoint:
        """Of the present helper: after its end, peers that meet us again hear of the next."""
        return make_endpoint(self.kind, encode(self.helper.payload))

    async def connect(self, peer: Introduction, endpoint: Endpoint) -> "UcxLink":
        payload = open_payload(peer, endpoint, UcxPayload)
        return UcxLink(self, self.helper.connect(payload), peer)

    def stats(self) -> TransportStats:
        return self.log.stats()

    async def close(self) -> None:
        await self.helper.close()


class UcxLink:
    def __init__(self, transport: UcxTransport, peer: UcxPeer, introduction: Introduction) -> None:
        self._transport = transport
        self._peer = peer
        self._owner = introduction.worker
        self._num_blocks = introduction.num_wire_blocks
        self._use = LinkUse(transport.log, introduction.worker)

    async def read(
        self, ticket_id: TicketId, remote_block_ids: Sequence[int], local_block_ids: Sequence[int], timeout_s: float
    ) -> None:
        arena = self._transport.arena
        check_block_ids(remote_block_ids, self._num_blocks, f"{self._owner}'s")
        check_block_ids(local_block_ids, arena.num_wire_blocks, "our")
        runs = coalesce(remote_block_ids, local_block_ids)
        deadline = Deadline(timeout_s)
        with self._use.transfer(len(local_block_ids) * arena.block_bytes, len(runs)):
            for start in range(0, len(runs), MAX_RUNS):
                await self._read_some(ticket_id, runs[start : start + MAX_RUNS], deadline.remaining_s)

    async def write(self, local_block_ids: Sequence[int], remote_block_ids: Sequence[int], timeout_s: float) -> None:  # noqa: ARG002
        raise does_not_push("ucx")

    async def close(self) -> None:
        if not self._use.closed:
            await self._use.close()
            self._transport.helper.disconnect(self._peer)

    async def _read_some(self, ticket_id: TicketId, runs: list[CopyRun], timeout_s: float) -> None:
        ended = self._transport.helper.read(self._peer, ticket_id, runs)
        try:
            await bounded(ended, timeout_s, self._owner)
        except TransferAbandoned:
            loop = asyncio.get_running_loop()
            fence = loop.call_later(self._transport.fence_after_s, self._transport.helper.fence, self._peer)
            ended.add_done_callback(lambda _: fence.cancel())
            raise
