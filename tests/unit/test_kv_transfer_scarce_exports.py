"""Exports from scarce wire blocks: they are one reader's at a time, and nobody's once they have landed."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from kv_transfer.handoff.exports import ExportTable
from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.device_staging import DeviceStaging
from protocol.ids import RequestId, TicketId, new_incarnation
from protocol.transfer import BlocksLanded, BlocksReady, HandoffMessage, OpenHandoff, PrefillDone
from protocol.wire import FrameReader, decode
from runtime.clock import ManualClock
from runtime.node_config import TransferOptions
from tests.support.fake_device import FakeDevice
from tests.support.kv_owner import CONTEXT, FIRST_TOKEN, LAYOUT, OWNER, PHASES

NUM_WIRE_BLOCKS = 16
REQUEST = RequestId("req-1")


class Table:
    """One request of six blocks, whose prefill is done."""

    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.arena = HostArena(NUM_WIRE_BLOCKS, 64)
        memory = np.random.default_rng(1).integers(0, 256, (32, 64), np.uint8)
        self.device = FakeDevice(memory, self.arena.tensor().view(NUM_WIRE_BLOCKS, 64).numpy())
        self.staging = DeviceStaging(self.device, self.arena)
        self.exports = ExportTable(
            self.staging,
            owner=OWNER,
            incarnation=new_incarnation(),
            layout=LAYOUT,
            control_url="http://127.0.0.1:1",
            options=TransferOptions(),
            clock=self.clock,
            on_released=lambda _request_id: None,
        )

    def prefill(self) -> None:
        self.ticket = self.exports.open(REQUEST, 6 * LAYOUT.block_size, CONTEXT)
        self.exports.publish(REQUEST, 0, range(20, 26))
        self.exports.finish(REQUEST, FIRST_TOKEN, False, 99.0, PHASES)

    def attach(self, skip_blocks: int = 0) -> AsyncIterator[HandoffMessage]:
        ticket = self.ticket
        message = OpenHandoff(
            ticket_id=ticket.ticket_id,
            incarnation=ticket.incarnation,
            reader="decode-0",
            reader_incarnation="r",
            skip_blocks=skip_blocks,
        )
        return _messages(self.exports.attach(message))

    def landed(self, num_blocks: int) -> bool:
        return self.exports.landed(BlocksLanded(self.ticket.ticket_id, self.ticket.incarnation, num_blocks)).held

    def readable(self, wire_ids: list[int]) -> list[bool]:
        return [self.exports.may_read(TicketId(self.ticket.ticket_id), [wire_id]) for wire_id in wire_ids]


async def _messages(frames: AsyncIterator[bytes]) -> AsyncIterator[HandoffMessage]:
    reader = FrameReader()
    try:
        async for chunk in frames:
            for body in reader.feed(chunk):
                yield decode(body, HandoffMessage)
    finally:
        await frames.aclose()  # type: ignore[attr-defined]  # it is an async generator


async def hear(stream: AsyncIterator[HandoffMessage], num_blocks: int) -> list[int]:
    """Wire ids of the next announcements."""
    heard: list[int] = []
    while len(heard) < num_blocks:
        message = await anext(stream)
        assert isinstance(message, BlocksReady)
        assert message.scarce or not message.block_ids
        heard += message.block_ids
    return heard


@pytest.fixture
async def table() -> AsyncIterator[Table]:
    made = Table()
    async with made.exports:
        made.prefill()
        yield made
    await made.staging.close()
    assert made.staging.num_free == NUM_WIRE_BLOCKS
    made.arena.close()


async def test_what_has_landed_may_not_be_read_any_more(table: Table) -> None:
    stream = table.attach()
    wire_ids = await hear(stream, 6)
    assert table.readable(wire_ids) == [True] * 6
    assert table.landed(4)
    assert table.readable(wire_ids) == [False] * 4 + [True] * 2
    assert table.staging.num_free == NUM_WIRE_BLOCKS - 2
    assert isinstance(await anext(stream), PrefillDone)


async def test_a_broken_stream_gives_everything_back(table: Table) -> None:
    stream = table.attach()
    wire_ids = await hear(stream, 4)
    await stream.aclose()  # type: ignore[attr-defined]  # it is an async generator
    assert table.readable(wire_ids) == [False] * len(wire_ids)
    async with asyncio.timeout(5):
        while table.staging.num_free < NUM_WIRE_BLOCKS:  # a copy under way ends first
            await asyncio.sleep(0.001)


async def test_who_heard_everything_may_still_read(table: Table) -> None:
    stream = table.attach()
    wire_ids = await hear(stream, 6)
    assert [type(message) async for message in stream] == [PrefillDone]
    assert table.readable(wire_ids) == [True] * 6


async def test_a_second_reader_hears_everything_anew(table: Table) -> None:
    first = table.attach()
    await hear(first, 6)
    assert [type(message) async for message in first] == [PrefillDone]
    second = table.attach(skip_blocks=2)
    wire_ids = await hear(second, 4)
    assert isinstance(await anext(second), PrefillDone)
    assert [bytes(table.arena.block(wire_id)) for wire_id in wire_ids] == [table.device.block(i) for i in range(22, 26)]
    assert table.readable(wire_ids) == [True] * 4
    assert table.staging.num_free == NUM_WIRE_BLOCKS - 4


async def test_a_finished_prefill_that_nobody_fetches_expires(table: Table) -> None:
    table.clock.advance(TransferOptions().lease_ttl_s)
    table.exports.reap()
    assert table.exports.stats().num_expired == 1
    assert not table.landed(1)
