"""Owners that lie: announcements of what is not there, introductions of somebody else, servers that hang or babble.

Whatever they do costs them an error of a known type. The process lives, the next honest request is served, and every lease,
task and block is where it was.
"""

import asyncio
import contextlib
import itertools
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest

from kv_transfer.handoff.imports import FetchFailed
from kv_transfer.transport import make_endpoint
from protocol.errors import ChecksumMismatch, LeaseExpired, PeerLost, TransferError, TransferTimeout
from protocol.transfer import (
    BlocksReady,
    HandoffFailed,
    Introduction,
)
from protocol.wire import MAX_FRAME_BYTES, WIRE_VERSION, Hello, encode_frame
from tests.support.kv_owner import LAYOUT, NUM_BLOCKS, running_owner
from tests.support.kv_reader import ReaderNode, refusal, running_reader
from tests.support.lying_owner import LyingOwner, lying_owner, raw_server

STALL_S = 0.5


@pytest.fixture
async def liar() -> AsyncIterator[LyingOwner]:
    async with lying_owner() as owner:
        yield owner


@pytest.fixture
async def reader() -> AsyncIterator[ReaderNode]:
    async with running_reader("inproc", stall_timeout_s=STALL_S) as node:
        yield node


# ---- what an owner may say of its blocks

TOO_LONG = struct.pack("<I", MAX_FRAME_BYTES + 1)
ANNOUNCEMENTS: dict[str, list[bytes]] = {
    "a block outside of the arena": [encode_frame(BlocksReady(0, (0, NUM_BLOCKS), (1, 2)))],
    "a block far outside": [encode_frame(BlocksReady(0, (0, 1 << 24), (1, 2)))],
    "a block that no wire carries": [
        encode_frame({"type": "ready", "first_block": 0, "block_ids": [1 << 25], "checksums": [1]})
    ],
    "a negative block": [encode_frame({"type": "ready", "first_block": 0, "block_ids": [-1], "checksums": [1]})],
    "a block id that is text": [
        encode_frame({"type": "ready", "first_block": 0, "block_ids": ["1"], "checksums": [1]})
    ],
    "one block twice": [encode_frame(BlocksReady(0, (0, 0), (1, 1)))],
    "more checksums than blocks": [encode_frame(BlocksReady(0, (0, 1), (1, 2, 3)))],
    "fewer checksums than blocks": [encode_frame(BlocksReady(0, (0, 1), (1,)))],
    "more blocks than the context has": [encode_frame(BlocksReady(0, (0, 1, 2), (1, 2, 3)))],
    "a million blocks": [encode_frame(BlocksReady(0, tuple(range(1 << 20)), (0,) * (1 << 20)))],
    "blocks from the middle on": [encode_frame(BlocksReady(1, (1,), (1,)))],
    "the first block twice": [encode_frame(BlocksReady(0, (), ())), encode_frame(BlocksReady(0, (0,), (1,))) * 2],
    "a checksum that is wrong": [encode_frame(BlocksReady(0, (0, 1), (1, 2)))],
    "a negative checksum": [encode_frame({"type": "ready", "first_block": 0, "block_ids": [0], "checksums": [-1]})],
    "a message of another kind": [encode_frame({"type": "surprise"})],
    "no message": [encode_frame(None)],
    "nesting without end": [struct.pack("<I", 5000) + b"\x91" * 5000],
    "bytes that are no msgpack": [struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1"],
    "a frame that is too long": [TOO_LONG],
    "half a frame": [struct.pack("<I", 100) + b"half"],
    "nothing": [],
    "an unknown error": [
        encode_frame({"type": "failed", "error": {"code": "x" * 65, "message": "", "retryable": True}})
    ],
}


@pytest.mark.parametrize("what", ANNOUNCEMENTS)
async def test_an_owner_that_lies_is_not_believed(liar: LyingOwner, reader: ReaderNode, what: str) -> None:
    liar.say(*ANNOUNCEMENTS[what], liar.done())
    others = slice(2 * LAYOUT.block_bytes, NUM_BLOCKS * LAYOUT.block_bytes)
    before = bytes(reader.arena.memory[others])
    error = await refusal(reader, liar.ticket())
    assert type(error) in (TransferError, PeerLost, ChecksumMismatch), repr(error)
    assert bytes(reader.arena.memory[others]) == before, "bytes landed beside the reader's blocks"
    liar.say(liar.ready(0, [0, 1]), liar.done())
    assert (await reader.importer.fetch(liar.ticket("req-2"), [0, 1], 0, 5.0)).num_blocks_moved == 2
    assert reader.importer.stats().num_unsettled == 0


async def test_an_owner_that_ends_before_its_blocks_are_announced(liar: LyingOwner, reader: ReaderNode) -> None:
    liar.say(liar.ready(0, [0]), liar.done())
    assert "after 1 of 2" in (await refusal(reader, liar.ticket())).message


async def test_an_owner_that_never_ends_is_given_up_at_the_deadline(liar: LyingOwner, reader: ReaderNode) -> None:
    async def babble() -> AsyncIterator[bytes]:
        while True:
            yield encode_frame(BlocksReady(0, (), ())) * 1000
            await asyncio.sleep(0)  # it shares this loop

    liar.frames = babble
    fetching = asyncio.create_task(refusal(reader, liar.ticket(), deadline_s=1.0))
    async with running_owner("inproc") as honest:
        result = await reader.importer.fetch(honest.hand_off("req-2", 32, [4, 5]), [2, 3], 0, 5.0)
        assert result.num_blocks_moved == 2
    assert isinstance(await fetching, TransferTimeout)


async def test_an_owner_that_repeats_its_end_is_read_once(liar: LyingOwner, reader: ReaderNode) -> None:
    liar.say(liar.ready(0, [0, 1]), liar.done(), liar.done(), liar.done())
    assert (await reader.importer.fetch(liar.ticket(), [0, 1], 0, 5.0)).num_blocks_moved == 2


async def test_an_owner_that_takes_the_lease_back_while_it_is_read_is_noticed(
    liar: LyingOwner, reader: ReaderNode
) -> None:
    async def slow() -> AsyncIterator[bytes]:
        for _ in itertools.count():
            yield encode_frame(BlocksReady(0, (), ()))
            await asyncio.sleep(0.05)

    liar.frames = slow
    liar.holds = False
    assert isinstance(await refusal(reader, liar.ticket(ttl_s=0.2)), LeaseExpired)


# ---- what an owner may say of itself


def _endpoint(good: Introduction, **changes: object) -> Introduction:
    return msgspec.structs.replace(good, endpoints=(msgspec.structs.replace(good.endpoints[0], **changes),))


INTRODUCTIONS: dict[str, Callable[[Introduction], object]] = {
    "damaged": lambda good: _endpoint(good, payload=good.endpoints[0].payload[:-1]),
    "of another life": lambda good: msgspec.structs.replace(good, incarnation="another"),
    "of another layout": lambda good: msgspec.structs.replace(
        good, layout=msgspec.structs.replace(LAYOUT, num_layers=3)
    ),
    "without a way": lambda good: msgspec.structs.replace(good, endpoints=()),
    "with a hundred ways": lambda good: msgspec.structs.replace(good, endpoints=good.endpoints * 100),
    "with an oversized endpoint": lambda good: _endpoint(good, payload=bytes((1 << 20) + 1)),
    "to an arena that is not there": lambda good: msgspec.structs.replace(
        good, endpoints=(make_endpoint("inproc", b"nowhere"),)
    ),
    "of no blocks": lambda good: msgspec.structs.replace(good, num_blocks=0, num_scratch_blocks=0),
    "of more blocks than can be": lambda good: msgspec.structs.replace(good, num_blocks=1 << 30),
    "that is none": lambda _: {"worker": "x"},
}


@pytest.mark.parametrize("what", INTRODUCTIONS)
async def test_an_owner_that_introduces_itself_wrongly_is_not_met(
    liar: LyingOwner, reader: ReaderNode, what: str
) -> None:
    honest = liar.introduction
    assert isinstance(honest, Introduction)
    liar.introduction = INTRODUCTIONS[what](honest)
    await refusal(reader, liar.ticket())
    liar.introduction = honest
    assert (await reader.importer.fetch(liar.ticket("req-2"), [0, 1], 0, 5.0)).num_blocks_moved == 2


@pytest.mark.parametrize(
    ("hello", "expected"),
    [
        (Hello(99, "prefill-0", "i", LAYOUT.fingerprint), TransferError),
        (Hello(WIRE_VERSION, "prefill-0", "another-life", LAYOUT.fingerprint), LeaseExpired),
        (Hello(WIRE_VERSION, "prefill-0", "", "0" * 32), TransferError),
        ({"wire_version": "2"}, TransferError),
        (b"", TransferError),
        (b"x" * (9 << 20), TransferError),
    ],
    ids=["another wire", "another life", "another layout", "of wrong types", "empty", "endless"],
)
async def test_an_owner_that_greets_wrongly_is_not_met(
    liar: LyingOwner, reader: ReaderNode, hello: object, expected: type[TransferError]
) -> None:
    honest, liar.hello = liar.hello, hello
    assert isinstance(await refusal(reader, liar.ticket()), expected)
    liar.hello = honest
    assert (await reader.importer.fetch(liar.ticket("req-2"), [0, 1], 0, 5.0)).num_blocks_moved == 2


# ---- where a ticket may point


Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


async def hang(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read(-1)


async def close_at_once(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    return


def answering(*pieces: bytes, then_hang: bool = False) -> "Answer":
    return Answer(pieces, then_hang)


class Answer:
    def __init__(self, pieces: tuple[bytes, ...], then_hang: bool) -> None:
        self._pieces = pieces
        self._then_hang = then_hang

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in self._pieces:
            writer.write(piece)
            await writer.drain()
        if self._then_hang:
            await reader.read(-1)


async def endless_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for i in itertools.count():
        writer.write(b"x-%d: %s\r\n" % (i, b"y" * 1000))
        await writer.drain()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
    for _ in itertools.count():
        writer.write(b"\x00")
        await writer.drain()
        await asyncio.sleep(0.05)


PLACES: dict[str, Server] = {
    "hangs": hang,
    "closes at once": close_at_once,
    "speaks another protocol": answering(b"220 mail.example ESMTP\r\n" * 10),
    "answers garbage": answering(b"HTTP/1.1 200 OK\r\ncontent-length: 400\r\n\r\n" + b"\xff" * 400),
    "answers a page": answering(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>"),
    "answers nothing": answering(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "fails": answering(b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n"),
    "fails in the middle": answering(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n\x04"),
    "fails with an endless error": answering(
        b"HTTP/1.1 500 Oh\r\ntransfer-encoding: chunked\r\n\r\n", *[b"10000\r\n" + bytes(0x10000) + b"\r\n"] * 200
    ),
    "falls silent after the head": answering(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n", then_hang=True),
    "never ends its head": endless_head,
    "sends a byte now and then": drip,
}


@pytest.mark.parametrize("place", PLACES)
async def test_a_ticket_that_points_elsewhere_ends_in_time(reader: ReaderNode, liar: LyingOwner, place: str) -> None:
    async with raw_server(PLACES[place]) as url:
        ticket = msgspec.structs.replace(liar.ticket(), control_url=url)
        await refusal(reader, ticket, deadline_s=2.0)
    assert (await reader.importer.fetch(liar.ticket("req-2"), [0, 1], 0, 5.0)).num_blocks_moved == 2


async def test_a_redirect_is_not_followed(reader: ReaderNode, liar: LyingOwner) -> None:
    """The key would travel with it."""
    heard: list[bytes] = []

    async def listen(stream: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        heard.append(await stream.read(1000))

    async with raw_server(listen) as elsewhere:
        head = f"HTTP/1.1 307 There\r\nlocation: {elsewhere}/kv/handoff\r\ncontent-length: 0\r\n\r\n"
        async with raw_server(answering(head.encode())) as url:
            ticket = msgspec.structs.replace(liar.ticket(), control_url=url)
            assert isinstance(await refusal(reader, ticket), PeerLost)
    assert heard == []


async def test_an_owner_that_fails_says_why_and_no_more(liar: LyingOwner, reader: ReaderNode) -> None:
    error = {"code": "overloaded", "message": "m" * 2001, "retryable": True}
    liar.say(encode_frame({"type": "failed", "error": error}))
    assert isinstance(await refusal(reader, liar.ticket()), TransferError)
    liar.say(encode_frame(HandoffFailed(LeaseExpired("gone").to_info())))
    assert isinstance(await refusal(reader, liar.ticket("req-2")), LeaseExpired)


async def test_every_refused_ticket_is_given_back(liar: LyingOwner, reader: ReaderNode) -> None:
    for i in range(5):
        liar.say(*ANNOUNCEMENTS["one block twice"])
        await refusal(reader, liar.ticket(f"req-{i}"))
    async with asyncio.timeout(5):
        while len(liar.released) < 5:
            await asyncio.sleep(0.01)
    with contextlib.suppress(FetchFailed):
        await reader.importer.fetch(liar.ticket("req-9"), [0, 1], 0, 5.0)
