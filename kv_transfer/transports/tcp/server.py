"""TcpServer: the owner's end of the tcp transport. Sends blocks straight from the arena to who holds a valid ticket.

A listening thread and one thread per connection, with blocking sockets: bytes never touch the event loop. What a
stranger sends costs it the connection, with a typed reply, and nobody else anything.
"""

import logging
import socket
import threading

from kv_transfer.memory.arena import HostArena
from kv_transfer.transport import MayRead, lends
from kv_transfer.transports.tcp.wire import ConnectionEnded, TcpRead, TcpReply, receive_frame, send_all
from protocol.errors import HeadraceError, LeaseExpired, Overloaded, TransferError, TransferTimeout
from protocol.ids import TicketId
from protocol.wire import encode_frame
from runtime.clock import Deadline

MAX_CONNECTIONS = 128
FIRST_FRAME_TIMEOUT_S = 5.0
"""A peer of ours connects when it has something to read; others must not hold a connection for nothing."""

IDLE_TIMEOUT_S = 60.0
SEND_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


class TcpServer:
    """Listens from construction to `close`."""

    def __init__(self, arena: HostArena, host: str, may_read: MayRead) -> None:
        self._arena = arena
        self._may_read = may_read
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._listener = socket.create_server((host, 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="kv-tcp-accept", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Cut every connection and wait for the threads. Blocking."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            open_connections = dict(self._connections)
        _shutdown(self._listener)
        self._acceptor.join()
        self._listener.close()
        for connection in open_connections:
            _shutdown(connection)
        for thread in open_connections.values():
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("cannot accept a KV connection: %s", error)
                threading.Event().wait(0.1)  # out of descriptors: give some a chance to close
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="kv-tcp", daemon=True)
            with self._lock:
                refused = self._closing or len(self._connections) >= MAX_CONNECTIONS
                if not refused:
                    self._connections[connection] = thread
            if refused:
                _refuse(connection)
            else:
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            timeout_s = FIRST_FRAME_TIMEOUT_S
            while True:
                self._answer(connection, receive_frame(connection, TcpRead, Deadline(timeout_s)))
                timeout_s = IDLE_TIMEOUT_S
        except (ConnectionEnded, TransferTimeout):
            return
        except HeadraceError as error:
            log.info("closing a KV connection: %s", error.message)
            _reply_error(connection, error)
        except OSError as error:
            log.info("a KV connection broke: %s", error)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def _answer(self, connection: socket.socket, request: TcpRead) -> None:
        num_blocks = self._arena.num_wire_blocks
        if any(first + count > num_blocks for first, count in request.runs):
            raise TransferError(f"asked for blocks outside of an arena of {num_blocks}")
        if sum(count for _, count in request.runs) > num_blocks:
            raise TransferError("asked for more blocks than there are")
        if not lends(self._arena, self._may_read, TicketId(request.ticket_id), request.runs):
            raise LeaseExpired("this ticket does not lend these blocks, or no longer")
        size = self._arena.block_bytes
        header = encode_frame(TcpReply(sum(count for _, count in request.runs) * size))
        blocks = [self._arena.memory[first * size : (first + count) * size] for first, count in request.runs]
        send_all(connection, [header, *blocks], Deadline(SEND_TIMEOUT_S))


def _reply_error(connection: socket.socket, error: HeadraceError) -> None:
    try:
        send_all(connection, [encode_frame(TcpReply(0, error.to_info()))], Deadline(1.0))
        _shutdown(connection)
    except TransferError:
        log.debug("the peer did not wait for the reason")


def _refuse(connection: socket.socket) -> None:
    _reply_error(connection, Overloaded(f"this node serves {MAX_CONNECTIONS} KV connections already"))
    connection.close()


def _shutdown(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        log.debug("the connection was gone already: %s", error)
