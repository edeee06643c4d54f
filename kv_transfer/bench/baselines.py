"""What the machine does without us: one memcpy, and a plain socket. Contestants like the transports."""

import asyncio
import ctypes
import socket
import struct
import threading
from collections.abc import Sequence

import numpy as np

from kv_transfer.memory.arena import HostArena
from kv_transfer.transports.plan import coalesce
from protocol.errors import PeerLost
from protocol.transfer import Direction

_PORT = struct.Struct("<H")
_SIZE = struct.Struct("<Q")
_BACKLOG = 1


class Memcpy:
    """One thread copies the blocks within this process, from memory like the other station's into the arena."""

    directions: tuple[Direction, ...] = ("pull",)
    pids: tuple[int, ...] = ()

    def __init__(self, arena: HostArena) -> None:
        self._arena = arena
        self._source = np.frombuffer(arena.memory, np.uint8).copy()

    def offer(self) -> bytes:
        return b""

    async def meet(self, offer: bytes) -> None:
        """There is nobody else."""

    async def move(self, direction: Direction, source: Sequence[int], destination: Sequence[int]) -> None:  # noqa: ARG002
        size, start = self._arena.block_bytes, self._source.ctypes.data
        for run in coalesce(source, destination):
            ctypes.memmove(
                self._arena.address + run.destination * size, start + run.source * size, run.num_blocks * size
            )

    async def close(self) -> None:
        """Nothing to close."""


class RawSocket:
    """As many bytes over one TCP connection on loopback, from the start of one arena to the start of the other's, by one
    sendall and one recv_into at a time. Nothing is asked, checked or scattered."""

    directions: tuple[Direction, ...] = ("pull",)
    pids: tuple[int, ...] = ()

    def __init__(self, arena: HostArena) -> None:
        self._arena = arena
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        self._connection: socket.socket | None = None
        self._server = threading.Thread(target=self._serve, name="bench-socket", daemon=True)
        self._server.start()

    def offer(self) -> bytes:
        return _PORT.pack(self._listener.getsockname()[1])

    async def meet(self, offer: bytes) -> None:
        self._connection = socket.create_connection(("127.0.0.1", *_PORT.unpack(offer)))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def move(self, direction: Direction, source: Sequence[int], destination: Sequence[int]) -> None:  # noqa: ARG002
        await asyncio.to_thread(self._receive, len(destination) * self._arena.block_bytes)

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        await asyncio.to_thread(self._server.join)

    def _receive(self, num_bytes: int) -> None:
        assert self._connection is not None, "they have met"
        self._connection.sendall(_SIZE.pack(num_bytes))
        filled = 0
        while filled < num_bytes:
            received = self._connection.recv_into(self._arena.memory[filled:num_bytes])
            if received == 0:
                raise PeerLost("the raw socket was closed")
            filled += received

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # closed before anybody came
            return
        with connection:
            while len(asked := connection.recv(_SIZE.size, socket.MSG_WAITALL)) == _SIZE.size:
                (num_bytes,) = _SIZE.unpack(asked)
                connection.sendall(self._arena.memory[:num_bytes])
