"""Leases on a manual clock: each export ends exactly once, whatever happens in whatever order."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.handoff.exports import ExportTable
from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.checksum import checksums
from kv_transfer.memory.staging import HostStaging
from protocol.errors import Cancelled, InternalError, InvalidParameter, LeaseExpired
from protocol.ids import RequestId, TicketId, WorkerId, new_incarnation
from protocol.transfer import (
    BlocksReady,
    HandoffFailed,
    HandoffMessage,
    OpenHandoff,
    PrefillDone,
    ReleaseLease,
    RenewLease,
    TransferTicket,
)
from protocol.wire import FrameReader, decode
from runtime.clock import ManualClock
from runtime.node_config import TransferOptions
from tests.support.kv_owner import CONTEXT, FIRST_TOKEN, LAYOUT, PHASES

REQUEST = RequestId("req-1")
INCARNATION = new_incarnation()
TTL_S = 30.0


class Table:
    def __init__(self, stall_timeout_s: float = 5.0) -> None:
        self.clock = ManualClock(100.0)
        self.arena = HostArena(16, 64)
        for block_id in range(16):
            self.arena.block(block_id)[:] = bytes([block_id]) * 64
        self.staging = HostStaging(self.arena)
        self.released: list[RequestId] = []
        self.exports = ExportTable(
            self.staging,
            owner=WorkerId("prefill-0"),
            incarnation=INCARNATION,
            layout=LAYOUT,
            control_url="http://127.0.0.1:1",
            options=TransferOptions(lease_ttl_s=TTL_S, stall_timeout_s=stall_timeout_s),
            clock=self.clock,
            on_released=self.released.append,
        )

    async def close(self) -> None:
        await self.staging.close()
        self.arena.close()

    def finish(self, request_id: RequestId = REQUEST) -> None:
        self.exports.finish(request_id, FIRST_TOKEN, False, self.clock.now() - 0.25, PHASES)

    def attach(self, ticket: TransferTicket, skip_blocks: int = 0) -> AsyncIterator[HandoffMessage]:
        message = OpenHandoff(
            ticket_id=ticket.ticket_id,
            incarnation=ticket.incarnation,
            reader="decode-0",
            reader_incarnation="j",
            skip_blocks=skip_blocks,
        )
        return _messages(self.exports.attach(message))


async def _messages(frames: AsyncIterator[bytes]) -> AsyncIterator[HandoffMessage]:
    reader = FrameReader()
    try:
        async for chunk in frames:
            for body in reader.feed(chunk):
                yield decode(body, HandoffMessage)
    finally:
        await frames.aclose()  # type: ignore[attr-defined]  # it is an async generator


@pytest.fixture
async def table() -> AsyncIterator[Table]:
    made = Table()
    async with made.exports:
        yield made
    await made.close()


def release(ticket: TransferTicket) -> ReleaseLease:
    return ReleaseLease(ticket.ticket_id, ticket.incarnation)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def blocks_and_end(
    stream: AsyncIterator[HandoffMessage],
) -> tuple[list[tuple[int, int, int]], HandoffMessage | None]:
    """(index, block id, checksum) of what was announced, and the last message, if it was not an announcement."""
    announced: list[tuple[int, int, int]] = []
    async for message in stream:
        if not isinstance(message, BlocksReady):
            return announced, message
        assert message.first_block == (announced[-1][0] + 1 if announced else message.first_block)
        indices = range(message.first_block, message.first_block + len(message.block_ids))
        announced += zip(indices, message.block_ids, message.checksums, strict=True)
    return announced, None


@pytest.mark.parametrize("skip", [0, 1, 3, 4, 9])
async def test_a_late_reader_hears_everything_from_its_first_block(table: Table, skip: int) -> None:
    ticket = table.exports.open(REQUEST, 64, CONTEXT)
    table.exports.publish(REQUEST, 0, [7, 3])
    table.exports.publish(REQUEST, 2, [])
    table.exports.publish(REQUEST, 2, [11, 0])
    table.finish()
    ids = [7, 3, 11, 0]
    sums = checksums(table.arena, ids)
    announced, end = await blocks_and_end(table.attach(ticket, skip))
    assert announced == [(index, ids[index], sums[index]) for index in range(4)][skip:]
    assert isinstance(end, PrefillDone)
    assert (end.first_token, end.phases, end.since_computed_s) == (FIRST_TOKEN, PHASES, 0.25)


async def test_the_end_is_not_announced_before_the_last_block(table: Table) -> None:
    ticket = table.exports.open(REQUEST, 64, CONTEXT)
    stream = table.attach(ticket)
    table.exports.publish(REQUEST, 0, [1, 2, 3, 4])
    table.finish()
    announced, end = await blocks_and_end(stream)
    assert len(announced) == 4
    assert isinstance(end, PrefillDone)


async def test_a_lease_runs_out_a_ttl_after_the_prefill_or_the_last_renewal(table: Table) -> None:
    ticket = table.exports.open(REQUEST, 64, CONTEXT)
    table.clock.advance(10 * TTL_S)
    table.exports.reap()
    assert table.released == []
    table.finish()
    table.clock.advance(TTL_S - 1)
    assert table.exports.renew(RenewLease((ticket.ticket_id,), ticket.incarnation)).held[0]
    table.clock.advance(TTL_S - 1)
    table.exports.reap()
    assert table.released == []
    table.clock.advance(1)
    assert not table.exports.renew(RenewLease((ticket.ticket_id,), ticket.incarnation)).held[0]
    assert table.released == [REQUEST]
    assert not table.exports.release(release(ticket)).held
    with pytest.raises(LeaseExpired):
        table.attach(ticket)


async def test_blocks_may_be_read_only_when_announced_and_while_leased(table: Table) -> None:
    ticket = table.exports.open(REQUEST, 64, CONTEXT)
    ticket_id = TicketId(ticket.ticket_id)
    assert not table.exports.may_read(ticket_id, [1])
    table.exports.publish(REQUEST, 0, [1, 2])
    await until(lambda: table.exports.may_read(ticket_id, [2, 1]))
    assert not table.exports.may_read(ticket_id, [1, 3])
    assert not table.exports.may_read(TicketId("another"), [1])
    assert table.exports.release(release(ticket)).held
    assert not table.exports.may_read(ticket_id, [1])


async def test_one_reader_at_a_time_and_again_after_it_left(table: Table) -> None:
    ticket = table.exports.open(REQUEST, 64, CONTEXT)
    first, second = table.attach(ticket), table.attach(ticket)
    assert isinstance(await anext(first), BlocksReady)
    with pytest.raises(LeaseExpired):
        table.attach(ticket)
    refused = await anext(second)
    assert isinstance(refused, HandoffFailed)
    assert refused.error.code == "lease_expired"
    await first.aclose()  # type: ignore[attr-defined]  # it is an async generator
    assert table.released == []
    table.exports.publish(REQUEST, 0, [1])
    table.finish()
    announced, end = await blocks_and_end(table.attach(ticket))
    assert len(announced) == 1
    assert isinstance(end, PrefillDone)


async def test_an_attached_reader_hears_why_it_ended(table: Table) -> None:
    ticket = table.exports.open(REQUEST, 64, CONTEXT)
    stream = table.attach(ticket)
    await anext(stream)
    table.exports.fail(REQUEST, Cancelled("the client left"))
    end = await anext(stream)
    assert isinstance(end, HandoffFailed)
    assert end.error.code == "cancelled"
    assert table.released == [REQUEST]


async def test_tickets_of_nobody_and_of_another_life_are_refused(table: Table) -> None:
    ticket = table.exports.open(REQUEST, 64, CONTEXT)
    for ticket_id, incarnation in (("unknown", INCARNATION), (ticket.ticket_id, new_incarnation())):
        with pytest.raises(LeaseExpired):
            table.exports.attach(
                OpenHandoff(
                    ticket_id=ticket_id, incarnation=incarnation, reader="r", reader_incarnation="j", skip_blocks=0
                )
            )
        assert not table.exports.release(ReleaseLease(ticket_id, incarnation)).held
    assert table.released == []
    with pytest.raises(InvalidParameter, match="exported already"):
        table.exports.open(REQUEST, 64, CONTEXT)


async def test_a_block_that_does_not_exist_fails_its_export_alone(table: Table) -> None:
    other = table.exports.open(RequestId("req-2"), 64, CONTEXT)
    ticket = table.exports.open(REQUEST, 64, CONTEXT)
    stream = table.attach(ticket)
    table.exports.publish(REQUEST, 0, [99])
    announced, end = await blocks_and_end(stream)
    assert announced == []
    assert isinstance(end, HandoffFailed)
    assert end.error.code == InternalError.code
    await until(lambda: table.released == [REQUEST])
    assert table.exports.release(release(other)).held


async def test_silence_is_broken_by_signs_of_life() -> None:
    table = Table(stall_timeout_s=0.03)
    async with table.exports:
        ticket = table.exports.open(REQUEST, 64, CONTEXT)
        stream = table.attach(ticket, skip_blocks=2)
        for _ in range(4):
            assert await anext(stream) == BlocksReady(2, (), ())
    await table.close()


EVENTS = ["publish", "finish", "release", "fail", "attach", "detach", "renew", "expire", "settle"]


@given(st.lists(st.sampled_from(EVENTS), max_size=14))
def test_an_export_ends_exactly_once_in_any_order_of_events(events: list[str]) -> None:
    asyncio.run(_end_exactly_once(events))


async def _end_exactly_once(events: list[str]) -> None:
    table = Table()
    async with table.exports:
        stream = await _live(table, events)
        if stream is not None:
            await stream.aclose()  # type: ignore[attr-defined]  # it is an async generator
    assert table.released == [REQUEST]
    await table.close()


async def _live(table: Table, events: list[str]) -> AsyncIterator[HandoffMessage] | None:
    ticket = table.exports.open(REQUEST, 256, CONTEXT)
    published = 0
    finished = False
    stream: AsyncIterator[HandoffMessage] | None = None
    for event in events:
        match event:
            case "publish" if not finished:
                table.exports.publish(REQUEST, published, [published])
                published += 1
            case "finish" if not finished:
                table.finish()
                finished = True
            case "release":
                held = table.exports.stats().num_open == 1
                assert table.exports.release(release(ticket)).held == held
            case "fail":
                table.exports.fail(REQUEST, Cancelled("left"))
            case "attach" if stream is None and table.exports.stats().num_open:
                stream = table.attach(ticket)
                await anext(stream)
            case "detach" if stream is not None:
                await stream.aclose()  # type: ignore[attr-defined]  # it is an async generator
                stream = None
            case "renew":
                table.exports.renew(RenewLease((ticket.ticket_id,), ticket.incarnation))
            case "expire":
                table.clock.advance(TTL_S)
                table.exports.reap()
            case "settle":
                await asyncio.sleep(0.002)
        stats = table.exports.stats()
        assert stats.num_open + stats.num_released + stats.num_expired + stats.num_failed == stats.num_opened == 1
        assert len(table.released) == 1 - stats.num_open - stats.num_unsettled
    return stream
