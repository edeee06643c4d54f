"""The ucx transport's helper process: what it survives, what it refuses, and that it does not outlive its node."""

import asyncio
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import msgspec
import psutil
import pytest

from kv_transfer.transport import Link, TransferAbandoned, make_endpoint
from kv_transfer.transports.ucx.library import require_ucxx, set_environment
from kv_transfer.transports.ucx.transport import UcxTransport
from kv_transfer.transports.ucx.wire import UcxPayload, UcxRequest, open_request, seal_request
from protocol.errors import ConfigError, HeadraceError, LeaseExpired, PeerLost, TransferError
from protocol.ids import TicketId
from protocol.wire import decode, encode
from tests.support.kv_owner import NUM_BLOCKS, NUM_SCRATCH_BLOCKS, Owner, running_owner
from tests.support.kv_reader import ReaderNode, running_reader
from tests.support.signals import send_signal

installed = pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="needs the extra `ucx`")


@pytest.fixture
async def owner() -> AsyncIterator[Owner]:
    async with running_owner("ucx") as node:
        yield node


@pytest.fixture
async def reader() -> AsyncIterator[ReaderNode]:
    async with running_reader("ucx") as node:
        yield node


def ucx(node: Owner | ReaderNode) -> UcxTransport:
    assert isinstance(node.transport, UcxTransport)
    return node.transport


def helper_pid(node: Owner | ReaderNode) -> int:
    return ucx(node).helper.pid


async def announced(owner: Owner, request_id: str, block_ids: list[int]) -> TicketId:
    """A ticket that lends these blocks."""
    ticket = owner.hand_off(request_id, 16 * len(block_ids), block_ids)
    while not owner.exports.may_read(TicketId(ticket.ticket_id), block_ids):
        await asyncio.sleep(0.005)
    return TicketId(ticket.ticket_id)


async def works_again(owner: Owner, reader: ReaderNode) -> Link:
    """Helpers that have died are replaced within a few seconds, and a new meeting finds them."""
    deadline = time.monotonic() + 20
    ticket_id = await announced(owner, f"again-{time.monotonic_ns()}", [7])
    while True:
        try:
            link = await reader.connect(owner.introduction())
            await link.read(ticket_id, [7], [1], 2.0)
        except TransferError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
        else:
            assert reader.arena.block(1) == owner.arena.block(7)
            return link


@installed
async def test_only_what_a_ticket_lends_is_sent(owner: Owner, reader: ReaderNode) -> None:
    ticket_id = await announced(owner, "req-1", [4, 5])
    link = await reader.connect(owner.introduction())
    await link.read(ticket_id, [5, 4], [0, 1], 5.0)
    assert [reader.arena.block(block) for block in (0, 1)] == [owner.arena.block(block) for block in (5, 4)]
    for wrong_ticket, block in ((ticket_id, 6), (TicketId("another"), 4)):
        with pytest.raises(LeaseExpired):
            await link.read(wrong_ticket, [block], [2], 5.0)
    with pytest.raises(TransferError):
        await link.read(ticket_id, [NUM_BLOCKS + NUM_SCRATCH_BLOCKS], [2], 5.0)
    await link.read(TicketId("anybody"), [NUM_BLOCKS], [NUM_BLOCKS], 5.0)
    await link.close()
    with pytest.raises(PeerLost):
        await link.read(ticket_id, [4], [0], 5.0)


@installed
async def test_a_helper_that_died_is_replaced_on_either_side(owner: Owner, reader: ReaderNode) -> None:
    link = await works_again(owner, reader)
    for victim in (owner, reader):
        pid = helper_pid(victim)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PeerLost):
            while True:
                await link.read(TicketId("anybody"), [NUM_BLOCKS], [NUM_BLOCKS], 5.0)
        await link.close()
        link = await works_again(owner, reader)
        assert helper_pid(victim) != pid
    await link.close()


@installed
async def test_a_read_given_up_keeps_its_blocks_until_the_peer_goes_on(owner: Owner, reader: ReaderNode) -> None:
    link = await works_again(owner, reader)
    send_signal(helper_pid(owner), signal.SIGSTOP)
    with pytest.raises(TransferAbandoned) as given_up:
        await link.read(TicketId("anybody"), [NUM_BLOCKS], [NUM_BLOCKS], 0.2)
    assert reader.transport.stats().num_quarantined == 1
    assert not given_up.value.settled.is_set()
    os.kill(helper_pid(owner), signal.SIGCONT)
    async with asyncio.timeout(5):
        await given_up.value.settled.wait()
    assert reader.transport.stats().num_quarantined == 0
    await link.read(TicketId("anybody"), [NUM_BLOCKS], [NUM_BLOCKS], 5.0)
    await link.close()


@installed
async def test_a_peer_that_never_goes_on_is_fenced_off(owner: Owner, reader: ReaderNode) -> None:
    ucx(reader).fence_after_s = 0.3
    link = await works_again(owner, reader)
    stopped, ours = helper_pid(owner), helper_pid(reader)
    send_signal(stopped, signal.SIGSTOP)
    try:
        with pytest.raises(TransferAbandoned) as given_up:
            await link.read(TicketId("anybody"), [NUM_BLOCKS], [NUM_BLOCKS], 0.2)
        async with asyncio.timeout(5):
            await given_up.value.settled.wait()
        assert not psutil.pid_exists(ours), "the process that could have written is gone"
    finally:
        os.kill(stopped, signal.SIGCONT)
    await link.close()
    await (await works_again(owner, reader)).close()


@installed
async def test_a_damaged_address_ends_a_helper_and_not_the_node(owner: Owner, reader: ReaderNode) -> None:
    good = decode(owner.transport.endpoint().payload, UcxPayload)
    pid = helper_pid(reader)
    bad = make_endpoint("ucx", encode(msgspec.structs.replace(good, address=b"not an address of UCX")))
    link = await reader.transport.connect(owner.introduction(), bad)
    with pytest.raises(PeerLost):
        await link.read(TicketId("anybody"), [NUM_BLOCKS], [NUM_BLOCKS], 5.0)
    await link.close()
    await (await works_again(owner, reader)).close()
    assert helper_pid(reader) != pid


@installed
async def test_a_request_without_the_key_is_not_answered(
    owner: Owner, reader: ReaderNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    good = decode(owner.transport.endpoint().payload, UcxPayload)
    forged = make_endpoint("ucx", encode(msgspec.structs.replace(good, key=bytes(32))))
    link = await reader.transport.connect(owner.introduction(), forged)
    with pytest.raises(TransferAbandoned):
        await link.read(TicketId("anybody"), [NUM_BLOCKS], [NUM_BLOCKS], 0.5)
    assert "not sealed" in caplog.text
    await (await works_again(owner, reader)).close()


@installed
def test_a_helper_does_not_outlive_its_node() -> None:
    script = (
        "from kv_transfer.memory.arena import HostArena\nfrom kv_transfer.transports.factory import make_transport\n"
        "transport = make_transport('ucx', HostArena(1, 4096), incarnation='i', host='127.0.0.1')\n"
        "print(transport.helper.pid, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as node:
        assert node.stdout is not None
        helper = psutil.Process(int(node.stdout.readline()))
        node.kill()
    assert helper.wait(5) is None or not helper.is_running()


def test_seals_show_every_change() -> None:
    request = UcxRequest("ticket", ((1, 2),), 6, b"address")
    sealed = seal_request(bytes(32), request)
    assert open_request(bytes(32), sealed) == request
    for damaged in (sealed[:-1], bytes([sealed[0] ^ 1]) + sealed[1:], sealed[:-1] + bytes([sealed[-1] ^ 1]), b""):
        with pytest.raises(HeadraceError):
            open_request(bytes(32), damaged)
    with pytest.raises(HeadraceError):
        open_request(bytes([1] * 32), sealed)


def test_without_ucxx_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="pip install") as failed:
        require_ucxx()
    assert failed.value.param == "transfer.transport"


def test_what_the_user_chose_for_ucx_is_kept() -> None:
    environment = {"UCX_NET_DEVICES": "eth7", "UCX_TCP_TX_SEG_SIZE": "64k"}
    set_environment(environment, "127.0.0.1")
    assert environment["UCX_NET_DEVICES"] == "eth7"
    assert environment["UCX_TCP_TX_SEG_SIZE"] == "64k"
    loopback, network = dict[str, str](), dict[str, str]()
    set_environment(loopback, "127.0.0.1")
    set_environment(network, "10.0.0.1")
    assert loopback["UCX_NET_DEVICES"] == "lo"
    assert "UCX_NET_DEVICES" not in network
