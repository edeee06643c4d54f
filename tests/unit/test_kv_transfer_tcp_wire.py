"""The tcp transport's deadlines hold for a message, not for a system call."""

import socket
import threading
from collections.abc import Callable

import pytest

from kv_transfer.transports.tcp.wire import receive_all, send_all
from protocol.errors import TransferTimeout
from runtime.clock import Deadline


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        return here, listener.accept()[0]


def until_set(stop: threading.Event, act: Callable[[], object]) -> threading.Thread:
    """Let a bit through every now and then."""

    def run() -> None:
        while not stop.wait(0.0005):
            act()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_peer_that_drips_does_not_outlast_the_deadline() -> None:
    stop = threading.Event()
    here, there = connected()
    with here, there:
        dripping = until_set(stop, lambda: there.send(b"x"))
        try:
            with pytest.raises(TransferTimeout):
                receive_all(here, [memoryview(bytearray(8000))], Deadline(0.1))
        finally:
            stop.set()
            dripping.join()


def test_a_peer_that_sips_does_not_outlast_the_deadline() -> None:
    stop = threading.Event()
    here, there = connected()
    with here, there:
        sipping = until_set(stop, lambda: there.recv(64 << 10))
        try:
            with pytest.raises(TransferTimeout):
                send_all(here, [bytes(64 << 20)], Deadline(0.1))
        finally:
            stop.set()
            sipping.join()
