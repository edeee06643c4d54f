"""Owners that push: the same guarantees as with reads, and blocks at both ends that stay put until the last write ended."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from kv_transfer.handoff.imports import FetchFailed, Importer
from kv_transfer.meeting.peers import Reader
from kv_transfer.routes import HANDOFF_PATH
from kv_transfer.transports.inproc import Faults, InprocTransport
from protocol.errors import ChecksumMismatch, LeaseExpired, PeerLost, TransferError
from protocol.ids import ContextHash, RequestId, TicketId, WorkerId, new_incarnation
from protocol.transfer import OpenHandoff, PrefillDone, PushTarget, ReleaseLease, TransferTicket, TransportKind
from runtime.clock import MonotonicClock
from runtime.node_config import TransferOptions
from tests.support.kv_owner import FIRST_TOKEN, LAYOUT, Owner, running_owner
from tests.support.kv_reader import ReaderNode, running_reader

KINDS: list[TransportKind] = ["inproc", "nixl"]


@asynccontextmanager
async def pair(kind: TransportKind, stall_timeout_s: float = 2.0) -> AsyncIterator[tuple[Owner, ReaderNode]]:
    async with (
        running_owner(kind) as owner,
        running_reader(kind, direction="push", stall_timeout_s=stall_timeout_s) as reader,
    ):
        yield owner, reader


async def until_released(owner: Owner, request_id: str) -> None:
    async with asyncio.timeout(5):
        while request_id not in owner.released:
            await asyncio.sleep(0.005)


def assert_arrived(owner: Owner, reader: ReaderNode, remote: list[int], local: list[int]) -> None:
    for theirs, ours in zip(remote, local, strict=True):
        assert reader.arena.block(ours) == owner.arena.block(theirs)


@pytest.mark.parametrize("kind", KINDS)
async def test_blocks_are_pushed_while_the_prefill_computes(kind: TransportKind) -> None:
    async with pair(kind) as (owner, reader):
        ticket = owner.open("req-1", 64)
        fetching = asyncio.create_task(reader.importer.fetch(ticket, [10, 11, 12, 13], 1, 10.0))
        for index in range(4):
            owner.exports.publish(RequestId("req-1"), index, [20 + 2 * index])
            async with asyncio.timeout(5):
                while index and reader.arena.block(10 + index) != owner.arena.block(20 + 2 * index):
                    await asyncio.sleep(0.005)
            assert not fetching.done()
        owner.finish("req-1")
        result = await fetching
        assert isinstance(result.end, PrefillDone)
        assert (result.end.first_token, result.num_blocks_moved) == (FIRST_TOKEN, 3)
        assert reader.arena.block(10) == bytes(LAYOUT.block_bytes), "what the reader holds does not move"
        assert owner.transport.stats().num_bytes == 3 * LAYOUT.block_bytes
        assert reader.transport.stats().num_bytes == 0
        await until_released(owner, "req-1")
        assert owner.exports.stats().num_unsettled == 0


async def test_damage_on_the_way_is_noticed() -> None:
    async with pair("inproc") as (owner, reader):
        assert isinstance(owner.transport, InprocTransport)
        owner.transport.faults = Faults(corrupt=True)
        with pytest.raises(FetchFailed) as failed:
            await reader.importer.fetch(owner.hand_off("req-1", 32, [0, 1]), [4, 5], 0, 10.0)
        assert isinstance(failed.value.reason, ChecksumMismatch)
        async with asyncio.timeout(5):
            await failed.value.settled.wait()
        await until_released(owner, "req-1")


async def test_who_lent_what_landed_damaged_hears_of_it() -> None:
    async with pair("inproc") as (owner, reader):
        assert isinstance(owner.transport, InprocTransport)
        owner.transport.faults = Faults(corrupt=True)
        doubts: list[int] = []
        given_back = asyncio.Event()
        ticket = owner.exports.lend(
            RequestId("req-1"),
            num_tokens=3 * LAYOUT.block_size,
            context_hash=ContextHash(bytes(16)),
            block_ids=[0, 1, 2],
            give_back=given_back.set,
            on_doubt=doubts.append,
        )
        with pytest.raises(FetchFailed) as failed:
            await reader.importer.fetch_prefix(ticket, [4, 5, 6], 0, 10.0)
        async with asyncio.timeout(5):
            await failed.value.settled.wait()
            await given_back.wait()
        assert doubts == [failed.value.num_valid_blocks]


async def test_a_write_that_fails_is_the_end_of_the_hand_off_and_of_the_lease() -> None:
    async with pair("inproc") as (owner, reader):
        assert isinstance(owner.transport, InprocTransport)
        owner.transport.faults = Faults(fail=PeerLost("injected"))
        with pytest.raises(FetchFailed, match="injected") as failed:
            await reader.importer.fetch(owner.hand_off("req-1", 32, [0, 1]), [4, 5], 0, 10.0)
        async with asyncio.timeout(5):
            await failed.value.settled.wait()
        await until_released(owner, "req-1")
        owner.transport.faults = Faults()
        await reader.importer.fetch(owner.hand_off("req-2", 32, [0, 1]), [4, 5], 0, 10.0)
        assert_arrived(owner, reader, [0, 1], [4, 5])


@pytest.mark.parametrize("ending", ["cancelled", "failed"])
async def test_blocks_at_both_ends_stay_put_until_the_last_write_has_ended(ending: str) -> None:
    async with pair("inproc", stall_timeout_s=5.0) as (owner, reader):
        assert isinstance(owner.transport, InprocTransport)
        await reader.importer.fetch(owner.hand_off("met", 32, [0, 1]), [4, 5], 0, 10.0)
        await until_released(owner, "met")
        wake = threading.Event()
        owner.transport.faults = Faults(stall=wake)
        ticket = owner.hand_off("req-1", 32, [0, 1])
        fetching = asyncio.create_task(reader.importer.fetch(ticket, [4, 5], 0, 10.0))
        await asyncio.sleep(0.2)
        if ending == "failed":
            owner.exports.fail(RequestId("req-1"), TransferError("the engine stumbled"))
            with pytest.raises(FetchFailed, match="stumbled"):
                await fetching
        else:
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
        settled = reader.importer.settled(TicketId(ticket.ticket_id))
        await asyncio.sleep(0.3)
        assert not settled.is_set()
        assert owner.released == ["met"]
        assert owner.exports.stats().num_unsettled == 1
        assert reader.importer.stats().num_unsettled == 1
        wake.set()
        async with asyncio.timeout(5):
            await settled.wait()
        assert owner.released == ["met", "req-1"]
        assert reader.importer.stats().num_unsettled == 0


async def test_a_write_that_was_given_up_holds_both_ends_until_it_settles() -> None:
    options = TransferOptions(transport="inproc", stall_timeout_s=0.2)
    async with (
        running_owner("inproc", options=options) as owner,
        running_reader("inproc", direction="push") as reader,
    ):
        assert isinstance(owner.transport, InprocTransport)
        await reader.importer.fetch(owner.hand_off("met", 32, [0, 1]), [4, 5], 0, 10.0)
        await until_released(owner, "met")
        wake = threading.Event()
        owner.transport.faults = Faults(stall=wake)
        with pytest.raises(FetchFailed) as failed:
            await reader.importer.fetch(owner.hand_off("req-1", 32, [0, 1]), [4, 5], 0, 10.0)
        await asyncio.sleep(0.3)
        assert not failed.value.settled.is_set()
        assert owner.released == ["met"]
        wake.set()
        async with asyncio.timeout(5):
            await failed.value.settled.wait()
        assert owner.released == ["met", "req-1"]


async def frames_of(owner: Owner, ticket: TransferTicket, push: PushTarget, incarnation: str) -> bytes:
    message = OpenHandoff(
        ticket_id=ticket.ticket_id,
        incarnation=ticket.incarnation,
        reader="decode-0",
        reader_incarnation=incarnation,
        skip_blocks=0,
        push=push,
    )
    return b"".join([frame async for frame in owner.exports.attach(message)])


async def test_targets_that_cannot_be_are_refused() -> None:
    async with pair("inproc") as (owner, reader):
        await reader.importer.fetch(owner.hand_off("met", 32, [0, 1]), [4, 5], 0, 10.0)
        before = bytes(reader.arena.memory)
        incarnation = owner.pushers.known[0].introduction.incarnation
        bad = {
            "2 different blocks": PushTarget("inproc", (4,)),
            "different": PushTarget("inproc", (4, 4)),
            "arena": PushTarget("inproc", (4, 1 << 20)),
            "does not push": PushTarget("tcp", (4, 5)),
        }
        for number, (message, target) in enumerate(bad.items()):
            ticket = owner.hand_off(f"req-{number}", 32, [2, 3])
            assert message.encode() in await frames_of(owner, ticket, target, incarnation)
        ticket = owner.hand_off("stranger", 32, [2, 3])
        assert b"introduced itself" in await frames_of(owner, ticket, PushTarget("inproc", (4, 5)), "another-life")
        assert bytes(reader.arena.memory) == before


async def test_a_ticket_is_pushed_once() -> None:
    async with pair("inproc", stall_timeout_s=5.0) as (owner, reader):
        assert isinstance(owner.transport, InprocTransport)
        await reader.importer.fetch(owner.hand_off("met", 32, [0, 1]), [4, 5], 0, 10.0)
        wake = threading.Event()
        owner.transport.faults = Faults(stall=wake)
        ticket = owner.hand_off("req-1", 32, [2, 3])
        message = OpenHandoff(
            ticket_id=ticket.ticket_id,
            incarnation=ticket.incarnation,
            reader="decode-0",
            reader_incarnation=owner.pushers.known[0].introduction.incarnation,
            skip_blocks=0,
            push=PushTarget("inproc", (8, 9)),
        )
        stream = owner.exports.attach(message)
        await anext(stream)
        pulling = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        pulling.cancel()
        await asyncio.gather(pulling, return_exceptions=True)
        await stream.aclose()  # type: ignore[attr-defined]  # it is an async generator
        for again in (message, msgspec.structs.replace(message, push=None)):
            with pytest.raises(LeaseExpired):
                owner.exports.attach(again)
        wake.set()
        release = ReleaseLease(ticket.ticket_id, ticket.incarnation)
        async with asyncio.timeout(5):
            while owner.exports.release(release).writing:
                await asyncio.sleep(0.005)
        await until_released(owner, "req-1")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_broken_link_is_mended(kind: TransportKind) -> None:
    async with pair(kind) as (owner, reader):
        await reader.importer.fetch(owner.hand_off("met", 32, [0, 1]), [4, 5], 0, 10.0)
        incarnation = owner.pushers.known[0].introduction.incarnation
        await (await owner.pushers.link("decode-0", incarnation, kind)).close()
        await reader.importer.fetch(owner.hand_off("req-1", 32, [2, 3]), [6, 7], 0, 10.0)
        assert_arrived(owner, reader, [0, 1, 2, 3], [4, 5, 6, 7])


async def test_a_push_ends_with_its_stream_and_its_blocks_come_back_when_the_last_write_has_ended() -> None:
    patient = TransferOptions(transport="inproc", stall_timeout_s=20.0)
    async with (
        running_owner("inproc", options=patient) as owner,
        running_reader("inproc", direction="push") as reader,
    ):
        assert isinstance(owner.transport, InprocTransport)
        await reader.importer.fetch(owner.hand_off("met", 32, [0, 1]), [4, 5], 0, 10.0)
        await until_released(owner, "met")
        wake = threading.Event()
        owner.transport.faults = Faults(stall=wake)
        ticket = owner.open("req-1", 64)
        owner.exports.publish(RequestId("req-1"), 0, [20, 21])
        message = OpenHandoff(
            ticket_id=ticket.ticket_id,
            incarnation=ticket.incarnation,
            reader="decode-0",
            reader_incarnation=owner.pushers.known[0].introduction.incarnation,
            skip_blocks=0,
            push=PushTarget("inproc", (8, 9, 10, 11)),
        )
        async with reader.client.stream(owner.url + HANDOFF_PATH, message, 2.0) as stream:
            await anext(stream)
            await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            while not owner.exports.stats().num_failed:
                await asyncio.sleep(0.005)
        assert owner.exports.stats().num_unsettled == 1
        assert owner.released == ["met"]
        wake.set()
        await until_released(owner, "req-1")


async def test_closing_does_not_wait_for_the_word_of_an_owner_that_still_writes() -> None:
    patient = TransferOptions(transport="inproc", stall_timeout_s=20.0)
    async with (
        running_owner("inproc", options=patient) as owner,
        running_reader("inproc", direction="push") as reader,
    ):
        assert isinstance(owner.transport, InprocTransport)
        wake = threading.Event()
        importer = Importer(
            client=reader.client,
            transports=reader.transports,
            staging=reader.staging,
            reader=Reader(WorkerId("decode-0"), new_incarnation(), LAYOUT),
            options=TransferOptions(transport="inproc", direction="push", stall_timeout_s=5.0),
            clock=MonotonicClock(),
        )
        async with asyncio.timeout(5):
            async with importer:
                await importer.fetch(owner.hand_off("met", 32, [0, 1]), [4, 5], 0, 10.0)
                owner.transport.faults = Faults(stall=wake)
                ticket = owner.hand_off("req-1", 32, [0, 1])
                fetching = asyncio.create_task(importer.fetch(ticket, [4, 5], 0, 10.0))
                await asyncio.sleep(0.2)
                fetching.cancel()
                await asyncio.gather(fetching, return_exceptions=True)
        assert not importer.settled(TicketId(ticket.ticket_id)).is_set()
        wake.set()
        await until_released(owner, "req-1")
