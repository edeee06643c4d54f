"""What each transport refuses: strangers at the tcp port, files that are not the arena, a NIXL that is not there."""

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest

from kv_transfer.transport import make_endpoint
from kv_transfer.transports.nixl.library import load_nixl
from kv_transfer.transports.shm import ShmPayload
from kv_transfer.transports.tcp.wire import TcpPayload, TcpRead, TcpReply, receive_frame
from protocol.errors import ConfigError, LayoutMismatch, LeaseExpired, PeerLost, TransferError
from protocol.ids import TicketId
from protocol.wire import decode, encode, encode_frame
from runtime.clock import Deadline
from tests.support.kv_owner import NUM_BLOCKS, NUM_SCRATCH_BLOCKS, Owner, running_owner
from tests.support.kv_reader import running_reader


@pytest.fixture
async def tcp_owner() -> AsyncIterator[Owner]:
    async with running_owner("tcp") as owner:
        yield owner


@contextlib.contextmanager
def stranger(owner: Owner) -> Iterator[socket.socket]:
    payload = decode(owner.transport.endpoint().payload, TcpPayload)
    with socket.create_connection((payload.host, payload.port), timeout=5) as connection:
        yield connection


def read_request(ticket_id: str, *runs: tuple[int, int]) -> bytes:
    return encode_frame(TcpRead(ticket_id, runs))


async def test_strangers_get_a_typed_reply_and_the_door(tcp_owner: Owner) -> None:
    ticket = tcp_owner.hand_off("req-1", 32, [4, 5])
    while not tcp_owner.exports.may_read(TicketId(ticket.ticket_id), [4, 5]):
        await _moment()
    hostile = {
        "another ticket": read_request("someone-elses", (4, 2)),
        "blocks of others": read_request(ticket.ticket_id, (4, 3)),
        "out of range": read_request(ticket.ticket_id, (NUM_BLOCKS + NUM_SCRATCH_BLOCKS - 1, 2)),
        "huge count": read_request(ticket.ticket_id, (0, 1 << 24)),
        "the same again and again": read_request(ticket.ticket_id, *[(0, NUM_BLOCKS)] * 2000),
        "no runs": encode_frame({"ticket_id": ticket.ticket_id, "runs": []}),
        "negative": encode_frame({"ticket_id": ticket.ticket_id, "runs": [[-1, 1]]}),
        "not a message": encode_frame([1, 2, 3]),
        "huge frame": b"\xff\xff\xff\xff",
        "http": b"GET / HTTP/1.1\r\n\r\n" * 8,
    }
    for what, request in hostile.items():
        with stranger(tcp_owner) as connection:
            connection.sendall(request)
            reply = receive_frame(connection, TcpReply, Deadline(5))
            assert reply.error is not None, what
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b"", what
    async with running_reader("tcp") as reader:
        await reader.importer.fetch(ticket, [0, 1], 0, 10.0)
        assert reader.arena.block(1) == tcp_owner.arena.block(5)


async def test_random_bytes_do_not_harm_the_server(tcp_owner: Owner) -> None:
    generator = random.Random(5)
    for _ in range(50):
        with stranger(tcp_owner) as connection, contextlib.suppress(OSError):
            connection.sendall(generator.randbytes(generator.randrange(1, 200)))
    async with running_reader("tcp") as reader:
        await reader.importer.fetch(tcp_owner.hand_off("req-1", 32, [4, 5]), [0, 1], 0, 10.0)


async def test_a_released_ticket_reads_nothing(tcp_owner: Owner) -> None:
    ticket = tcp_owner.open("req-1", 32)
    async with running_reader("tcp") as reader:
        link = await reader.connect(tcp_owner.introduction())
        with pytest.raises(LeaseExpired):
            await link.read(TicketId(ticket.ticket_id), [0], [0], 5.0)
        with pytest.raises(TransferError):
            await link.read(TicketId(ticket.ticket_id), [NUM_BLOCKS + NUM_SCRATCH_BLOCKS], [0], 5.0)
        with pytest.raises(TransferError):
            await link.read(TicketId(ticket.ticket_id), [0], [NUM_BLOCKS + NUM_SCRATCH_BLOCKS], 5.0)
        await link.close()
        with pytest.raises(PeerLost):
            await link.read(TicketId(ticket.ticket_id), [0], [0], 5.0)


async def test_a_connection_closed_while_idle_is_replaced(tcp_owner: Owner) -> None:
    ticket = tcp_owner.hand_off("req-1", 32, [4, 5])
    ticket_id = TicketId(ticket.ticket_id)
    while not tcp_owner.exports.may_read(ticket_id, [4, 5]):
        await _moment()
    async with running_reader("tcp") as reader:
        link = await reader.connect(tcp_owner.introduction())
        await link.read(ticket_id, [4], [0], 5.0)
        for connection in list(tcp_owner.transport._server._connections):  # type: ignore[attr-defined]
            connection.shutdown(socket.SHUT_RDWR)
        await link.read(ticket_id, [5], [1], 5.0)
        assert reader.arena.block(1) == tcp_owner.arena.block(5)
        await link.close()


async def test_shm_refuses_what_is_not_the_announced_arena() -> None:
    async with running_owner("shm") as owner, running_reader("shm") as reader:
        peer = owner.introduction()
        good = decode(peer.endpoints[0].payload, ShmPayload)
        with tempfile.TemporaryFile() as other_file:
            lies: list[tuple[type[TransferError], ShmPayload]] = [
                (PeerLost, msgspec.structs.replace(good, token=bytes(16))),
                (PeerLost, msgspec.structs.replace(good, fd=other_file.fileno())),
                (PeerLost, msgspec.structs.replace(good, fd=100_000)),
                (PeerLost, msgspec.structs.replace(good, pid=2**22 + 1)),
                (PeerLost, msgspec.structs.replace(good, host="another boot")),
                (LayoutMismatch, msgspec.structs.replace(good, file_bytes=good.file_bytes - 1)),
            ]
            for error, payload in lies:
                with pytest.raises(error):
                    await reader.transport.connect(peer, make_endpoint("shm", encode(payload)))
        link = await reader.connect(peer)
        await link.read(TicketId("any"), [3], [0], 5.0)
        assert reader.arena.block(0) == owner.arena.block(3)
        await link.close()
        with pytest.raises(PeerLost):
            await link.read(TicketId("any"), [3], [0], 5.0)


def test_without_nixl_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nixl_cu12", "nixl_cu12._api", "nixl_cu13", "nixl_cu13._api", "nixl", "nixl._api"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install nixl-cu12") as failed:
        load_nixl("127.0.0.1")
    assert failed.value.param == "transfer.transport"


def test_ucx_keeps_to_loopback_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    load_nixl("0.0.0.0")  # noqa: S104  # the name of an address, nothing is bound
    assert "UCX_NET_DEVICES" not in os.environ
    load_nixl("127.0.0.1")
    assert os.environ["UCX_NET_DEVICES"] == "lo"
    monkeypatch.setenv("UCX_NET_DEVICES", "eth7")
    load_nixl("127.0.0.1")
    assert os.environ["UCX_NET_DEVICES"] == "eth7"


def test_a_home_that_cannot_be_read_is_named() -> None:
    if os.getuid() != 0:
        pytest.skip("needs another user's HOME to be unreadable, which takes root to set up")
    script = (
        "import os\n"
        "from kv_transfer.memory.arena import HostArena\nfrom kv_transfer.transports.factory import make_transport\n"
        "import nixl_cu12._api\n"
        "os.makedirs(os.environ['HOME'], 0o700, exist_ok=True)\nos.setuid(65534)\n"
        "try:\n    make_transport('nixl', HostArena(1, 4096), incarnation='i', host='127.0.0.1')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        found = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "HOME": f"{folder}/private"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert found.stdout.startswith("ConfigError"), found
    assert "Set HOME" in found.stdout


async def _moment() -> None:
    await asyncio.sleep(0.005)
