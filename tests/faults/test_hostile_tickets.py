"""Tickets that are forged, replayed, run out or of another request get nothing, and take nothing from those that are right."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest

from kv_transfer.handoff.imports import FetchFailed
from kv_transfer.routes import HANDOFF_PATH
from protocol.errors import LayoutMismatch, LeaseExpired, TransferError
from protocol.ids import TicketId
from protocol.transfer import (
    LeaseState,
    OpenHandoff,
    ReleaseLease,
    RenewLease,
    TransferTicket,
    TransportKind,
)
from protocol.wire import encode
from runtime.auth import authorization_header
from runtime.clock import ManualClock
from tests.support.kv_owner import CLUSTER_KEY, LAYOUT, NUM_BLOCKS, Owner, running_owner
from tests.support.kv_reader import ReaderNode, refusal, running_reader

STALL_S = 0.5
READ_BY: list[TransportKind] = ["inproc", "tcp"]


@pytest.fixture
async def reader() -> AsyncIterator[ReaderNode]:
    async with running_reader("inproc", stall_timeout_s=STALL_S) as node:
        yield node


def forgeries(ticket: TransferTicket) -> dict[str, TransferTicket]:
    replace = msgspec.structs.replace
    return {
        "guessed": replace(ticket, ticket_id="t" * 32),
        "cut short": replace(ticket, ticket_id=ticket.ticket_id[:-1]),
        "of an earlier life": replace(ticket, incarnation="0" * 16),
        "of another layout": replace(ticket, layout_fingerprint="f" * 32),
        "of a longer context": replace(ticket, num_tokens=ticket.num_tokens + LAYOUT.block_size),
    }


async def test_forged_tickets_get_nothing_and_harm_nobody(reader: ReaderNode) -> None:
    async with running_owner("inproc") as owner:
        ticket = owner.hand_off("req-1", 32, [4, 5])
        for what, forged in forgeries(ticket).items():
            if what == "guessed":
                assert owner.exports.renew(RenewLease((forged.ticket_id,), forged.incarnation)).held == (False,)
                assert not owner.exports.release(ReleaseLease(forged.ticket_id, forged.incarnation)).held
            if what == "of a longer context":
                continue  # its right ticket id would release the right lease: see below
            error = await refusal(reader, forged)
            assert isinstance(error, LayoutMismatch if "layout" in what else LeaseExpired), what
            if "layout" not in what:
                assert owner.exports.stats().num_open == 1, what
            else:
                ticket = owner.hand_off("req-2", 32, [4, 5])  # who knows the id may give it back
        assert (await reader.importer.fetch(ticket, [0, 1], 0, 5.0)).num_blocks_moved == 2
        assert reader.arena.block(1) == owner.arena.block(5)


async def test_a_ticket_for_a_longer_context_than_was_computed_is_refused(reader: ReaderNode) -> None:
    async with running_owner("inproc") as owner:
        longer = forgeries(owner.hand_off("req-1", 16, [4]))["of a longer context"]
        assert "finished after 1 of 2" in (await refusal(reader, longer)).message
        await nothing_open(owner)


async def test_a_ticket_is_good_once(reader: ReaderNode) -> None:
    async with running_owner("inproc") as owner, running_reader("inproc", stall_timeout_s=STALL_S) as second:
        ticket = owner.open("req-1", 32)
        first = asyncio.create_task(reader.importer.fetch(ticket, [0, 1], 0, 5.0))
        owner.exports.publish("req-1", 0, [4])  # type: ignore[arg-type]  # an id
        while reader.transport.stats().num_transfers == 0:
            await asyncio.sleep(0.005)
        copy = msgspec.structs.replace(ticket, control_url=ticket.control_url)
        stolen = asyncio.create_task(refusal(second, copy))
        error = await stolen
        assert isinstance(error, LeaseExpired)
        assert "another reader" in error.message
        with pytest.raises(FetchFailed):  # the thief gave it back: whoever holds a ticket may
            await first
        assert isinstance(await refusal(reader, ticket), LeaseExpired)
        await nothing_open(owner)


@pytest.mark.parametrize("kind", READ_BY)
async def test_a_ticket_reads_the_blocks_of_its_own_request_only(kind: TransportKind) -> None:
    async with running_owner(kind) as owner, running_reader(kind) as reader:
        mine, yours = owner.hand_off("req-1", 32, [4, 5]), owner.hand_off("req-2", 32, [6, 7])
        while not owner.exports.may_read(TicketId(yours.ticket_id), [6, 7]):
            await asyncio.sleep(0.005)
        link = await reader.connect(owner.introduction())
        before = bytes(reader.arena.block(0))
        for block_ids in ([6], [4, 6], [5, 7], [0], [63]):
            with pytest.raises(LeaseExpired):
                await link.read(TicketId(mine.ticket_id), block_ids, list(range(len(block_ids))), 5.0)
        for block_ids in ([-1], [NUM_BLOCKS * 2], [1 << 40]):
            with pytest.raises((TransferError, ValueError)):
                await link.read(TicketId(mine.ticket_id), block_ids, [0], 5.0)
        assert bytes(reader.arena.block(0)) == before
        await link.read(TicketId(mine.ticket_id), [4], [0], 5.0)
        assert reader.arena.block(0) == owner.arena.block(4)
        await link.close()


async def test_an_expired_ticket_is_refused_by_every_route(reader: ReaderNode) -> None:
    clock = ManualClock()
    async with running_owner("inproc", clock=clock) as owner:
        ticket = owner.hand_off("req-1", 32, [4, 5])
        while owner.exports.stats().num_bytes_announced == 0:
            await asyncio.sleep(0.005)
        clock.advance(ticket.ttl_s + 1)
        assert isinstance(await refusal(reader, ticket), LeaseExpired)
        assert owner.exports.renew(RenewLease((ticket.ticket_id,), ticket.incarnation)).held == (False,)
        assert owner.exports.release(ReleaseLease(ticket.ticket_id, ticket.incarnation)) == LeaseState(held=False)
        assert owner.released == ["req-1"]


async def test_ten_thousand_attempts_to_attach_leave_nothing(reader: ReaderNode) -> None:
    async with running_owner("inproc") as owner:
        ticket = owner.open("req-1", 32)
        owner.exports.publish("req-1", 0, [4, 5])  # type: ignore[arg-type]  # an id
        message = OpenHandoff(
            ticket_id=ticket.ticket_id,
            incarnation=ticket.incarnation,
            reader="decode-0",
            reader_incarnation="i",
            skip_blocks=0,
        )
        attached = owner.exports.attach(message)
        await anext(attached)
        refused = 0
        for attempt in range(10_000):
            guess = msgspec.structs.replace(message, ticket_id=f"guess-{attempt}") if attempt % 2 else message
            try:
                frames = owner.exports.attach(guess)
            except LeaseExpired:
                refused += 1
            else:
                await frames.aclose()  # type: ignore[attr-defined]  # a generator
        assert refused == 10_000
        await attached.aclose()  # type: ignore[attr-defined]  # a generator
        owner.finish("req-1")
        assert (await reader.importer.fetch(ticket, [0, 1], 0, 5.0)).num_blocks_moved == 2
        await nothing_open(owner)


async def test_a_reader_that_does_not_read_keeps_no_blocks() -> None:
    """It opens the stream and lets it fill up. The lease runs out on it, and others are served meanwhile."""
    clock = ManualClock()
    async with running_owner("inproc", clock=clock) as owner, running_reader("inproc") as honest:
        slow = owner.open("req-1", 32)
        owner.exports.publish("req-1", 0, [4, 5])  # type: ignore[arg-type]  # an id
        opening = OpenHandoff(
            ticket_id=slow.ticket_id,
            incarnation=slow.incarnation,
            reader="slow",
            reader_incarnation="i",
            skip_blocks=0,
        )
        headers = authorization_header(CLUSTER_KEY)
        async with (
            aiohttp.ClientSession(headers=headers, read_bufsize=1) as session,
            session.post(owner.url + HANDOFF_PATH, data=encode(opening)) as response,
        ):
            assert response.status == 200
            owner.finish("req-1")
            other = owner.hand_off("req-2", 32, [6, 7])
            assert (await honest.importer.fetch(other, [0, 1], 0, 5.0)).num_blocks_moved == 2
            clock.advance(slow.ttl_s + 1)
            owner.exports.reap()
            assert sorted(owner.released) == ["req-1", "req-2"]
        await nothing_open(owner)


async def nothing_open(owner: Owner) -> None:
    async with asyncio.timeout(5):
        while owner.exports.stats().num_open:
            await asyncio.sleep(0.01)
