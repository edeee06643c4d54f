"""TcpTransport: blocks over plain sockets, between any two hosts, with no native dependency.

The owner's TcpServer sends straight from its arena; the reader receives straight into its own, on worker threads, over
a pool of connections per peer. A read that runs out of time closes its socket before it says so, so bytes never land
late. The bytes travel in the clear, guarded by the ticket: for a trusted network.
"""

import asyncio
import functools
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kv_transfer.memory.arena import HostArena
from kv_transfer.transport import (
    Capabilities,
    MayRead,
    TransportStats,
    check_block_ids,
    does_not_push,
    make_endpoint,
    open_payload,
)
from kv_transfer.transports.plan import CopyRun, coalesce
from kv_transfer.transports.read_log import LinkUse, ReadLog
from kv_transfer.transports.tcp.server import TcpServer
from kv_transfer.transports.tcp.wire import (
    MAX_RUNS,
    ConnectionEnded,
    TcpPayload,
    TcpRead,
    TcpReply,
    receive_all,
    receive_frame,
    send_all,
)
from protocol.errors import HeadraceError, PeerLost, TransferError, TransferTimeout
from protocol.ids import TicketId
from protocol.transfer import Endpoint, Introduction, TransportKind
from protocol.wire import encode, encode_frame
from runtime.clock import Deadline

NUM_THREADS = 4


class TcpTransport:
    """Listens from construction. `host` is bound, `advertise_host` is what peers connect to."""

    kind: TransportKind = "tcp"
    capabilities = Capabilities(
        directions=("pull",),
        one_sided=False,
        needs_peer_progress=True,
        crosses_hosts=True,
        device_memory=False,
        owner_checks_lease=True,
        may_abandon=False,
        notices_death=True,
        best_piece_bytes=64 << 10,
    )

    def __init__(self, arena: HostArena, host: str, advertise_host: str, may_read: MayRead) -> None:
        self.arena = arena
        self.log = ReadLog()
        self.executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="kv-tcp-read")
        self._advertise_host = advertise_host
        self._server = TcpServer(arena, host, may_read)

    def endpoint(self) -> Endpoint:
        return make_endpoint(self.kind, encode(TcpPayload(self._advertise_host, self._server.port)))

    async def connect(self, peer: Introduction, endpoint: Endpoint) -> "TcpLink":
        payload = open_payload(peer, endpoint, TcpPayload)
        return TcpLink(self, peer, payload)

    def stats(self) -> TransportStats:
        return self.log.stats()

    async def close(self) -> None:
        await asyncio.to_thread(self._server.close)
        self.executor.shutdown(wait=False)


class TcpLink:
    """Connections to one peer's server; opened as reads need them, kept for the next."""

    def __init__(self, transport: TcpTransport, peer: Introduction, address: TcpPayload) -> None:
        self._transport = transport
        self._peer = peer.worker
        self._num_blocks = peer.num_wire_blocks
        self._address = (address.host, address.port)
        self._idle: list[socket.socket] = []
        self._use = LinkUse(transport.log, peer.worker)

    async def read(
        self, ticket_id: TicketId, remote_block_ids: Sequence[int], local_block_ids: Sequence[int], timeout_s: float
    ) -> None:
        arena = self._transport.arena
        check_block_ids(remote_block_ids, self._num_blocks, f"{self._peer}'s")
        check_block_ids(local_block_ids, arena.num_wire_blocks, "our")
        runs = coalesce(remote_block_ids, local_block_ids)
        with self._use.transfer(len(local_block_ids) * arena.block_bytes, len(runs)):
            deadline = Deadline(timeout_s)
            work = functools.partial(self._read_all, ticket_id, runs, deadline)
            await asyncio.get_running_loop().run_in_executor(self._transport.executor, work)

    async def write(
        self,
        local_block_ids: Sequence[int],  # noqa: ARG002
        remote_block_ids: Sequence[int],  # noqa: ARG002
        timeout_s: float,  # noqa: ARG002
    ) -> None:
        raise does_not_push("tcp")

    async def close(self) -> None:
        await self._use.close()
        while self._idle:
            self._idle.pop().close()

    def _read_all(self, ticket_id: TicketId, runs: list[CopyRun], deadline: Deadline) -> None:
        try:
            for start in range(0, len(runs), MAX_RUNS):
                self._read_some(ticket_id, runs[start : start + MAX_RUNS], deadline)
        except TransferError:
            raise
        except HeadraceError as error:
            raise TransferError(
                f"{self._peer} does not follow the tcp transport's protocol: {error.message}"
            ) from error

    def _read_some(self, ticket_id: TicketId, runs: list[CopyRun], deadline: Deadline) -> None:
        request = encode_frame(TcpRead(ticket_id, tuple((run.source, run.num_blocks) for run in runs)))
        while self._idle:
            connection = self._idle.pop()
            try:
                self._exchange(connection, request, runs, deadline)
            except ConnectionEnded:  # the owner closed it while it was idle
                continue
            return
        self._exchange(self._open(deadline), request, runs, deadline)

    def _open(self, deadline: Deadline) -> socket.socket:
        try:
            connection = socket.create_connection(self._address, timeout=max(deadline.remaining_s, 1e-3))
        except TimeoutError as error:
            raise TransferTimeout(f"{self._peer} does not accept connections for KV") from error
        except OSError as error:
            raise PeerLost(f"{self._peer} cannot be reached for KV at {self._address}: {error}") from error
        connection.settimeout(None)  # from here on wire.py sets limits
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _exchange(self, connection: socket.socket, request: bytes, runs: list[CopyRun], deadline: Deadline) -> None:
        """One request and its reply. The connection goes back to the pool, or is closed if anything went wrong."""
        arena = self._transport.arena
        size = arena.block_bytes
        clean = False
        try:
            try:
                send_all(connection, [request], deadline)
            except PeerLost as error:
                raise ConnectionEnded(f"{self._peer} closed the connection") from error
            reply = receive_frame(connection, TcpReply, deadline)
            if reply.error is not None:
                raise reply.error.to_error()
            if reply.num_bytes != sum(run.num_blocks for run in runs) * size:
                raise TransferError(f"{self._peer} offers {reply.num_bytes} bytes, which is not what was asked for")
            receive_all(
                connection,
                [arena.memory[run.destination * size : (run.destination + run.num_blocks) * size] for run in runs],
                deadline,
            )
            clean = True
        finally:
            if clean:
                self._idle.append(connection)
            else:
                connection.close()
