"""Where an owner pushes it writes into another process's memory: only where that process said, once, and it is believed only
as far as the checksums go."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from kv_transfer.handoff.imports import FetchFailed
from kv_transfer.routes import HANDOFF_PATH, PROBE_PATH
from protocol.errors import ChecksumMismatch, HeadraceError, LeaseExpired, PeerLost, TransferError
from protocol.transfer import (
    BlocksReady,
    HandoffFailed,
    HandoffMessage,
    Introduction,
    OpenHandoff,
    ProbePush,
    ProbeResult,
    PushTarget,
    TransferTicket,
)
from protocol.wire import decode
from tests.support.kv_owner import LAYOUT, NUM_BLOCKS, NUM_SCRATCH_BLOCKS, Owner, running_owner
from tests.support.kv_reader import ReaderNode, running_reader
from tests.support.lying_owner import LyingOwner, lying_owner

NUM_WIRE_BLOCKS = NUM_BLOCKS + NUM_SCRATCH_BLOCKS
KV_BYTES = NUM_BLOCKS * LAYOUT.block_bytes


@pytest.fixture
async def owner() -> AsyncIterator[Owner]:
    async with running_owner("inproc") as node:
        yield node


@pytest.fixture
async def reader() -> AsyncIterator[ReaderNode]:
    async with running_reader("inproc", direction="push", stall_timeout_s=0.5) as node:
        yield node


@pytest.fixture
async def liar() -> AsyncIterator[LyingOwner]:
    async with lying_owner() as node:
        yield node


async def introduce(owner: Owner, reader: ReaderNode) -> Introduction:
    """The reader becomes known to the owner by an honest hand-off of two blocks, into the last two of its arena."""
    ticket = owner.hand_off("req-0", 32, [0, 1])
    await reader.importer.fetch(ticket, [NUM_BLOCKS - 2, NUM_BLOCKS - 1], 0, 5.0)
    (known,) = owner.pushers.known
    return known.introduction


def opening(ticket: TransferTicket, known: Introduction, push: PushTarget) -> OpenHandoff:
    return OpenHandoff(
        ticket_id=ticket.ticket_id,
        incarnation=ticket.incarnation,
        reader=known.worker,
        reader_incarnation=known.incarnation,
        skip_blocks=0,
        push=push,
    )


async def outcome(reader: ReaderNode, owner: Owner, message: OpenHandoff) -> HandoffMessage:
    """The last word of a hand-off."""
    last: HandoffMessage | None = None
    async with reader.client.stream(owner.url + HANDOFF_PATH, message, 5.0) as frames:
        async for body in frames:
            last = decode(body, HandoffMessage)
    assert last is not None
    return last


TARGETS = {
    "too few blocks": (0,),
    "too many blocks": (0, 1, 2),
    "no blocks": (),
    "one block twice": (3, 3),
    "a block outside of the reader's arena": (0, NUM_WIRE_BLOCKS),
    "a block far outside": (0, 1 << 24),
    "a million blocks": tuple(range(1 << 20)),
}


@pytest.mark.parametrize("what", TARGETS)
async def test_a_push_that_cannot_be_is_refused_and_writes_nothing(owner: Owner, reader: ReaderNode, what: str) -> None:
    known = await introduce(owner, reader)
    before = bytes(reader.arena.memory[:KV_BYTES])
    ticket = owner.hand_off("req-1", 32, [4, 5])
    last = await outcome(reader, owner, opening(ticket, known, PushTarget("inproc", TARGETS[what])))
    assert isinstance(last, HandoffFailed), last
    assert isinstance(last.error.to_error(), TransferError)
    assert bytes(reader.arena.memory[:KV_BYTES]) == before
    await still_fine(owner, reader)


@pytest.mark.parametrize(
    "changes",
    [
        {"reader": "decode-9"},
        {"reader_incarnation": "another-life"},
        {"push": PushTarget("tcp", (0, 1))},
        {"push": PushTarget("nixl", (0, 1))},
    ],
    ids=["an unknown reader", "an earlier life", "a transport that does not push", "a transport that is not there"],
)
async def test_a_push_to_nobody_is_refused(owner: Owner, reader: ReaderNode, changes: dict[str, object]) -> None:
    known = await introduce(owner, reader)
    ticket = owner.hand_off("req-1", 32, [4, 5])
    message = msgspec.structs.replace(opening(ticket, known, PushTarget("inproc", (0, 1))), **changes)
    last = await outcome(reader, owner, message)
    assert isinstance(last, HandoffFailed), last
    assert isinstance(last.error.to_error(), PeerLost if "push" not in changes else TransferError)
    await still_fine(owner, reader)


async def test_a_push_that_is_asked_for_again_is_refused(owner: Owner, reader: ReaderNode) -> None:
    known = await introduce(owner, reader)
    ticket = owner.hand_off("req-1", 32, [4, 5])
    message = opening(ticket, known, PushTarget("inproc", (0, 1)))
    async with reader.client.stream(owner.url + HANDOFF_PATH, message, 5.0) as frames:
        async for body in frames:
            if isinstance(decode(body, HandoffMessage), BlocksReady):
                await asyncio.sleep(0)
    assert reader.arena.block(1) == owner.arena.block(5)
    reader.arena.block(1)[:] = bytes(LAYOUT.block_bytes)
    for again in (message, msgspec.structs.replace(message, push=PushTarget("inproc", (1, 2)))):
        with pytest.raises(LeaseExpired, match="pushed already"):
            await outcome(reader, owner, again)
    assert bytes(reader.arena.block(1)) == bytes(LAYOUT.block_bytes)


@pytest.mark.parametrize("block_id", [0, NUM_BLOCKS - 1, NUM_BLOCKS, NUM_WIRE_BLOCKS, 1 << 24])
async def test_a_probe_writes_where_probes_end_and_nowhere_else(
    owner: Owner, reader: ReaderNode, block_id: int
) -> None:
    known = await introduce(owner, reader)
    before = bytes(reader.arena.memory)
    for block_ids in ((block_id,), (NUM_WIRE_BLOCKS - 1, block_id)):
        message = ProbePush(reader=known.worker, incarnation=known.incarnation, transport="inproc", block_ids=block_ids)
        with pytest.raises(HeadraceError):
            await reader.client.call(owner.url + PROBE_PATH, message, ProbeResult, 5.0)
    assert bytes(reader.arena.memory) == before
    await still_fine(owner, reader)


async def test_what_is_said_to_have_landed_is_looked_at(liar: LyingOwner, reader: ReaderNode) -> None:
    liar.say(liar.ready(0, [0, 1]), liar.done())
    with pytest.raises(FetchFailed) as failed:
        await reader.importer.fetch(liar.ticket(), [0, 1], 0, 5.0)
    assert isinstance(failed.value.reason, ChecksumMismatch)
    async with asyncio.timeout(5):
        await failed.value.settled.wait()
    assert reader.importer.stats().num_unsettled == 0


async def test_blocks_of_an_owner_that_says_it_still_writes_stay_in_quarantine(
    liar: LyingOwner, reader: ReaderNode
) -> None:
    liar.writes = True
    liar.say(liar.ready(0, [0, 1]), liar.done())
    with pytest.raises(FetchFailed) as failed:
        await reader.importer.fetch(liar.ticket(), [0, 1], 0, 5.0)
    await asyncio.sleep(0.5)
    assert not failed.value.settled.is_set()
    assert reader.importer.stats().num_unsettled == 1
    liar.writes = False
    async with asyncio.timeout(5):
        await failed.value.settled.wait()
    assert reader.importer.stats().num_unsettled == 0


async def still_fine(owner: Owner, reader: ReaderNode) -> None:
    result = await reader.importer.fetch(owner.hand_off("req-9", 32, [6, 7]), [10, 11], 0, 5.0)
    assert result.num_blocks_moved == 2
    assert reader.arena.block(11) == owner.arena.block(7)
    assert owner.exports.stats().num_unsettled == 0
