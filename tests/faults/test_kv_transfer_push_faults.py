"""Owners that die or stop while they push: the reader's blocks come back when no byte can land in them any more."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from kv_transfer.handoff.imports import FetchFailed
from kv_transfer.transport import Link
from protocol.errors import PeerLost, TransferTimeout
from protocol.ids import RequestId
from protocol.transfer import OpenHandoff, PushTarget, ReleaseLease, TransportKind
from runtime.node_config import TransferOptions
from tests.support.kv_owner import OwnerProcess, running_owner
from tests.support.kv_reader import ReaderNode, running_reader

KIND: TransportKind = "nixl"
STALL_S = 0.6


@pytest.fixture
def owner() -> Iterator[OwnerProcess]:
    process = OwnerProcess(KIND)
    try:
        yield process
    finally:
        process.stop()


@pytest.fixture
async def reader() -> AsyncIterator[ReaderNode]:
    async with running_reader(KIND, direction="push", stall_timeout_s=STALL_S) as node:
        yield node


async def fail_in_the_middle(reader: ReaderNode, owner: OwnerProcess, number: int) -> FetchFailed:
    """Send the owner a signal when two of four blocks have been pushed."""
    ticket = owner.ask("open", "req-1", 64)
    owner.ask("publish", "req-1", 0, [5, 6])
    fetching = asyncio.create_task(reader.importer.fetch(ticket, [0, 1, 2, 3], 0, 10.0))
    async with asyncio.timeout(10):
        while not any(reader.arena.block(1)):
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    owner.signal(number)
    with pytest.raises(FetchFailed) as failed:
        await fetching
    return failed.value


async def settle(event: asyncio.Event) -> None:
    async with asyncio.timeout(10):
        await event.wait()


async def test_blocks_come_back_when_the_owner_has_been_killed(owner: OwnerProcess, reader: ReaderNode) -> None:
    failure = await fail_in_the_middle(reader, owner, signal.SIGKILL)
    assert isinstance(failure.reason, PeerLost)
    assert failure.num_valid_blocks == 2
    assert not failure.settled.is_set()
    await settle(failure.settled)
    assert reader.importer.stats().num_unsettled == 0


async def test_blocks_come_back_when_the_owner_was_started_again(owner: OwnerProcess, reader: ReaderNode) -> None:
    failure = await fail_in_the_middle(reader, owner, signal.SIGKILL)
    owner.process.join()
    successor = OwnerProcess(KIND, port=owner.port, seed=2)
    try:
        await settle(failure.settled)
        again = await reader.importer.fetch(successor.hand_off("req-2", 32, [0, 1]), [0, 1], 0, 10.0)
        assert again.num_blocks_moved == 2
    finally:
        successor.stop()


async def test_blocks_do_not_come_back_while_the_owner_stands_still(owner: OwnerProcess, reader: ReaderNode) -> None:
    failure = await fail_in_the_middle(reader, owner, signal.SIGSTOP)
    assert isinstance(failure.reason, TransferTimeout)
    await asyncio.sleep(3 * STALL_S)
    assert not failure.settled.is_set()
    assert reader.importer.stats().num_unsettled == 1
    owner.signal(signal.SIGCONT)
    await settle(failure.settled)
    again = await reader.importer.fetch(owner.hand_off("req-2", 32, [0, 1]), [8, 9], 0, 10.0)
    assert again.num_blocks_moved == 2
    assert reader.importer.stats().num_unsettled == 0


async def test_blocks_come_back_when_the_owner_stood_still_and_was_killed_then(
    owner: OwnerProcess, reader: ReaderNode
) -> None:
    failure = await fail_in_the_middle(reader, owner, signal.SIGSTOP)
    assert isinstance(failure.reason, TransferTimeout)
    await asyncio.sleep(2 * STALL_S)
    assert not failure.settled.is_set()
    owner.signal(signal.SIGKILL)
    await settle(failure.settled)
    assert reader.importer.stats().num_unsettled == 0


async def test_an_owner_that_stops_in_good_order_is_not_taken_for_dead(
    reader: ReaderNode, caplog: pytest.LogCaptureFixture
) -> None:
    """Its last write ends, and its readers hear so, before it cuts anything."""
    options = TransferOptions(transport=KIND, direction="push", stall_timeout_s=STALL_S)
    async with running_owner(KIND, options=options) as owner:
        ticket = owner.open("req-1", 64)
        owner.exports.publish(RequestId("req-1"), 0, [5, 6])
        fetching = asyncio.create_task(reader.importer.fetch(ticket, [0, 1, 2, 3], 0, 10.0))
        async with asyncio.timeout(10):
            while not any(reader.arena.block(1)):
                await asyncio.sleep(0.005)
        await owner.exports.stop()
        with pytest.raises(FetchFailed) as failed:
            await fetching
        await settle(failed.value.settled)
    assert "died while it pushed" not in caplog.text


async def test_what_is_released_before_its_push_has_begun_is_not_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a stream's first words and the push that it asked for a message of another connection may come."""
    asked_for: list[str] = []

    async def link(worker: str, _incarnation: str, _kind: TransportKind) -> Link:
        asked_for.append(worker)
        raise PeerLost("nobody is pushed to here")

    async with running_owner("inproc") as owner:
        monkeypatch.setattr(owner.pushers, "link", link)
        ticket = owner.hand_off("req-1", 32, [5, 6])
        while not owner.exports.stats().num_bytes_announced:
            await asyncio.sleep(0.005)
        push = PushTarget("inproc", (0, 1))
        frames = owner.exports.attach(
            OpenHandoff(
                ticket_id=ticket.ticket_id,
                incarnation=ticket.incarnation,
                reader="decode-0",
                reader_incarnation="1",
                skip_blocks=0,
                push=push,
            )
        )
        await anext(frames)
        assert not owner.exports.release(ReleaseLease(ticket.ticket_id, ticket.incarnation)).writing
        assert [frame async for frame in frames] == []
        await asyncio.sleep(0.05)
    assert asked_for == []
