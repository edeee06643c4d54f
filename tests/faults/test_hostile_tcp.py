"""Strangers at the tcp transport's door: a connection that says nothing is not held for long."""

import socket
from collections.abc import Iterator

import pytest

from kv_transfer.memory.arena import HostArena
from kv_transfer.transports.tcp.server import TcpServer
from kv_transfer.transports.tcp.wire import TcpRead, TcpReply, receive_frame
from protocol.wire import encode_frame
from runtime.clock import Deadline

BLOCK_BYTES = 512


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TcpServer]:
    monkeypatch.setattr("kv_transfer.transports.tcp.server.FIRST_FRAME_TIMEOUT_S", 0.1)
    arena = HostArena(4, BLOCK_BYTES, 0)
    serving = TcpServer(arena, "127.0.0.1", lambda _ticket_id, _block_ids: True)
    try:
        yield serving
    finally:
        serving.close()
        arena.close()


@pytest.mark.parametrize("sent", [b"", b"\x00\x00", b"\x10\x00\x00\x00some"])
def test_who_does_not_ask_soon_is_let_go(server: TcpServer, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as stranger:
        stranger.sendall(sent)
        assert stranger.recv(1) == b""


def test_who_has_asked_may_take_its_time_to_ask_again(server: TcpServer) -> None:
    request = encode_frame(TcpRead("ticket", ((0, 1),)))
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as reader:
        for _ in range(2):
            reader.sendall(request)
            assert receive_frame(reader, TcpReply, Deadline(10)).num_bytes == BLOCK_BYTES
            assert len(reader.recv(BLOCK_BYTES, socket.MSG_WAITALL)) == BLOCK_BYTES
            with pytest.raises(TimeoutError):
                reader.settimeout(0.3)
                reader.recv(1)
            reader.settimeout(10)
