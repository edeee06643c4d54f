"""Hand-offs of nodes whose KV is on a device that no transport reaches: bounded staging memory on one end or on both."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Literal

import numpy as np
import pytest

from kv_transfer.handoff.imports import FetchFailed
from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.device_staging import DeviceStaging
from kv_transfer.transports.inproc import InprocTransport
from protocol.checksum import checksum
from protocol.errors import Cancelled, ChecksumMismatch, PeerLost, TransferTimeout
from protocol.ids import RequestId
from protocol.transfer import TransportKind
from runtime.node_config import TransferOptions
from tests.support.fake_device import FakeDevice
from tests.support.kv_owner import LAYOUT, NUM_SCRATCH_BLOCKS, Owner, running_owner
from tests.support.kv_reader import ReaderNode, running_reader

NUM_DEVICE_BLOCKS = 64
NUM_WIRE_BLOCKS = 8
TOKENS = LAYOUT.block_size
KINDS: list[TransportKind] = ["inproc", "shm", "tcp", "nixl"]


def device_staging(seed: int, delay_s: float = 0.0) -> tuple[FakeDevice, DeviceStaging]:
    arena = HostArena(NUM_WIRE_BLOCKS, LAYOUT.block_bytes, NUM_SCRATCH_BLOCKS)
    noise = np.random.default_rng(seed).integers(0, 256, (NUM_DEVICE_BLOCKS, LAYOUT.block_bytes), np.uint8)
    device = FakeDevice(noise, arena.tensor().view(NUM_WIRE_BLOCKS, -1).numpy(), delay_s)
    return device, DeviceStaging(device, arena)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


class Pair:
    """An owner and a reader, both with their KV on a device."""

    def __init__(self, kind: TransportKind) -> None:
        self.kind = kind
        self.lent, self.owner_staging = device_staging(1)
        self.taken, self.reader_staging = device_staging(2)
        self.owner: Owner
        self.reader: ReaderNode

    def assert_arrived(self, remote: list[int], local: list[int]) -> None:
        for theirs, ours in zip(remote, local, strict=True):
            assert self.taken.block(ours) == self.lent.block(theirs)

    async def at_rest(self) -> None:
        """Every lease has ended, and every wire block is back on both ends."""
        await until(lambda: self.owner.exports.stats().num_open == 0)
        await until(lambda: self.reader.importer.stats().num_unsettled == 0)
        for staging in (self.owner_staging, self.reader_staging):
            await until(lambda staging=staging: staging.num_free == NUM_WIRE_BLOCKS)  # type: ignore[misc]


async def running_pair(kind: TransportKind) -> AsyncIterator[Pair]:
    pair = Pair(kind)
    async with (
        running_owner(kind, staging=pair.owner_staging) as pair.owner,
        running_reader(kind, staging=pair.reader_staging, stall_timeout_s=1.0) as pair.reader,
    ):
        yield pair


@pytest.fixture(params=KINDS)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async for made in running_pair(request.param):
        yield made


@pytest.fixture
async def inproc() -> AsyncIterator[Pair]:
    async for made in running_pair("inproc"):
        yield made


async def test_a_context_of_many_times_the_staging_memory(pair: Pair) -> None:
    remote, local = list(range(40)), list(range(63, 23, -1))
    ticket = pair.owner.hand_off("req-1", 40 * TOKENS, remote)
    result = await pair.reader.importer.fetch(ticket, local, 0, 10.0)
    assert result.num_blocks_moved == 40
    pair.assert_arrived(remote, local)
    await pair.at_rest()


async def test_blocks_move_while_the_prefill_computes(pair: Pair) -> None:
    request_id = RequestId("req-1")
    ticket = pair.owner.open(request_id, 20 * TOKENS)
    fetching = asyncio.create_task(pair.reader.importer.fetch(ticket, list(range(20)), 0, 10.0))
    for first in range(0, 20, 5):
        remote = list(range(30 + first, 35 + first))
        pair.owner.exports.publish(request_id, first, remote)
        await until(lambda remote=remote, first=first: pair.taken.block(first + 4) == pair.lent.block(remote[-1]))  # type: ignore[misc]
        assert not fetching.done()
    pair.owner.finish(request_id)
    await fetching
    pair.assert_arrived(list(range(30, 50)), list(range(20)))
    await pair.at_rest()


async def test_many_hand_offs_at_once_share_the_staging_memory(pair: Pair) -> None:
    """Eight contexts, each larger than what a side may have of it."""
    contexts = [list(range(8 * i, 8 * i + 8)) for i in range(8)]
    tickets = [pair.owner.hand_off(f"req-{i}", 8 * TOKENS, ids) for i, ids in enumerate(contexts)]
    fetches = zip(tickets, contexts, strict=True)
    await asyncio.gather(*(pair.reader.importer.fetch(ticket, ids, 0, 20.0) for ticket, ids in fetches))
    pair.assert_arrived(list(range(64)), list(range(64)))
    await pair.at_rest()


async def test_only_what_the_reader_lacks_is_staged(inproc: Pair) -> None:
    before = inproc.taken.block(20)
    ticket = inproc.owner.hand_off("req-1", 6 * TOKENS, list(range(6)))
    result = await inproc.reader.importer.fetch(ticket, list(range(20, 26)), 4, 10.0)
    assert result.num_blocks_moved == 2
    assert inproc.taken.block(20) == before
    inproc.assert_arrived([4, 5], [24, 25])
    await inproc.at_rest()


async def test_exports_without_a_reader_take_no_staging_memory(inproc: Pair) -> None:
    """Or those that nobody can read yet would keep the one that somebody waits for from its turn."""
    for i in range(10):
        inproc.owner.hand_off(f"later-{i}", 4 * TOKENS, [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3])
    ticket = inproc.owner.hand_off("now", 8 * TOKENS, list(range(50, 58)))
    await inproc.reader.importer.fetch(ticket, list(range(8)), 0, 10.0)
    inproc.assert_arrived(list(range(50, 58)), list(range(8)))
    for i in range(10):
        inproc.owner.exports.fail(RequestId(f"later-{i}"), Cancelled("not wanted"))
    await inproc.at_rest()


async def test_damage_on_the_way_is_noticed_on_the_device(inproc: Pair) -> None:
    assert isinstance(inproc.owner.transport, InprocTransport)
    inproc.owner.transport.faults.corrupt = True
    ticket = inproc.owner.hand_off("req-1", 12 * TOKENS, list(range(12)))
    with pytest.raises(FetchFailed) as failed:
        await inproc.reader.importer.fetch(ticket, list(range(12)), 0, 10.0)
    assert isinstance(failed.value.reason, ChecksumMismatch)
    assert failed.value.num_valid_blocks == 0
    await inproc.at_rest()


async def test_reused_staging_memory_is_noticed(inproc: Pair) -> None:
    """What the owner's next request would write there."""
    assert isinstance(inproc.owner.transport, InprocTransport)
    stall = inproc.owner.transport.faults.stall = threading.Event()
    ticket = inproc.owner.hand_off("req-1", 2 * TOKENS, [0, 1])
    fetching = asyncio.create_task(inproc.reader.importer.fetch(ticket, [10, 11], 0, 10.0))
    await until(lambda: inproc.owner_staging.num_free == NUM_WIRE_BLOCKS - 2)
    await asyncio.sleep(0.05)
    inproc.owner.arena.memory[:] = bytes(len(inproc.owner.arena.memory))
    stall.set()
    with pytest.raises(FetchFailed) as failed:
        await fetching
    assert isinstance(failed.value.reason, ChecksumMismatch)
    await inproc.at_rest()


async def test_a_cancelled_fetch_gives_everything_back(pair: Pair) -> None:
    request_id = RequestId("req-1")
    ticket = pair.owner.open(request_id, 40 * TOKENS)
    pair.owner.exports.publish(request_id, 0, list(range(30)))
    fetching = asyncio.create_task(pair.reader.importer.fetch(ticket, list(range(40)), 0, 10.0))
    await until(lambda: pair.reader.transport.stats().num_transfers > 1)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    async with asyncio.timeout(5):
        await pair.reader.importer.settled(ticket.ticket_id).wait()
    await until(lambda: pair.owner.released == [request_id])
    await pair.at_rest()


async def test_an_abandoned_read_keeps_its_wire_blocks_until_it_has_settled(inproc: Pair) -> None:
    assert isinstance(inproc.owner.transport, InprocTransport)
    stall = inproc.owner.transport.faults.stall = threading.Event()
    ticket = inproc.owner.hand_off("req-1", 2 * TOKENS, [0, 1])
    with pytest.raises(FetchFailed) as failed:
        await inproc.reader.importer.fetch(ticket, [10, 11], 0, 10.0)
    assert isinstance(failed.value.reason, TransferTimeout)
    assert not failed.value.settled.is_set()
    assert inproc.reader_staging.num_free == NUM_WIRE_BLOCKS - 2
    inproc.owner.transport.faults.stall = None
    other = inproc.owner.hand_off("req-2", 6 * TOKENS, [2, 3, 4, 5, 6, 7])
    await inproc.reader.importer.fetch(other, [20, 21, 22, 23, 24, 25], 0, 10.0)
    inproc.assert_arrived([2, 3, 4, 5, 6, 7], [20, 21, 22, 23, 24, 25])
    stall.set()
    async with asyncio.timeout(5):
        await failed.value.settled.wait()
    await inproc.at_rest()


async def test_who_waits_for_room_behind_abandoned_reads_gives_up_in_time(inproc: Pair) -> None:
    """And its KV blocks, into which nothing was read, do not wait for the others' bytes."""
    assert isinstance(inproc.owner.transport, InprocTransport)
    stall = inproc.owner.transport.faults.stall = threading.Event()
    tickets = [inproc.owner.hand_off(f"req-{i}", 2 * TOKENS, [2 * i, 2 * i + 1]) for i in range(4)]
    fetches = [inproc.reader.importer.fetch(ticket, [2 * i, 2 * i + 1], 0, 1.5) for i, ticket in enumerate(tickets)]
    failures = await asyncio.gather(*fetches, return_exceptions=True)
    assert all(isinstance(failure, FetchFailed) for failure in failures)
    settled = [failure.settled for failure in failures if isinstance(failure, FetchFailed)]
    await asyncio.wait_for(settled[3].wait(), 1)
    assert not any(event.is_set() for event in settled[:3])
    stall.set()
    await asyncio.gather(*(asyncio.wait_for(event.wait(), 5) for event in settled))
    await inproc.at_rest()


async def test_an_owner_that_pushes_streams_through_its_staging_memory() -> None:
    device, staging = device_staging(1)
    async with (
        running_owner("inproc", staging=staging) as owner,
        running_reader("inproc", direction="push") as reader,
    ):
        ticket = owner.hand_off("req-1", 40 * TOKENS, list(range(40)))
        await reader.importer.fetch(ticket, list(range(40)), 0, 10.0)
        assert all(reader.arena.block(i) == device.block(i) for i in range(40))
        await until(lambda: staging.num_free == NUM_WIRE_BLOCKS)


async def test_an_owner_that_gives_up_its_prefill_gives_up_its_staging(inproc: Pair) -> None:
    request_id = RequestId("req-1")
    ticket = inproc.owner.open(request_id, 40 * TOKENS)
    inproc.owner.exports.publish(request_id, 0, list(range(10)))
    fetching = asyncio.create_task(inproc.reader.importer.fetch(ticket, list(range(40)), 0, 10.0))
    await until(lambda: inproc.reader.transport.stats().num_transfers > 1)
    inproc.owner.exports.fail(request_id, PeerLost("the engine has stopped"))
    with pytest.raises(FetchFailed, match=r"the engine has stopped|does not lend"):  # whichever it hears first
        await fetching
    await inproc.at_rest()


async def test_a_device_that_fails_fails_the_hand_off_and_nothing_else(inproc: Pair) -> None:
    inproc.taken.fail = RuntimeError("the device is lost")
    ticket = inproc.owner.hand_off("req-1", 2 * TOKENS, [0, 1])
    with pytest.raises(FetchFailed, match="moving KV failed"):
        await inproc.reader.importer.fetch(ticket, [10, 11], 0, 10.0)
    inproc.taken.fail = None
    inproc.lent.fail = RuntimeError("the device is lost")
    ticket = inproc.owner.hand_off("req-2", 2 * TOKENS, [0, 1])
    with pytest.raises(FetchFailed, match="could not export"):
        await inproc.reader.importer.fetch(ticket, [10, 11], 0, 10.0)
    inproc.lent.fail = None
    ticket = inproc.owner.hand_off("req-3", 2 * TOKENS, [0, 1])
    await inproc.reader.importer.fetch(ticket, [10, 11], 0, 10.0)
    await inproc.at_rest()


@pytest.mark.parametrize("staged", ["owner", "reader"])
async def test_one_end_on_a_device_and_the_other_in_host_memory(staged: str) -> None:
    device, staging = device_staging(1)
    owners, readers = (staging, None) if staged == "owner" else (None, staging)
    async with running_owner("shm", staging=owners) as owner, running_reader("shm", staging=readers) as reader:
        ticket = owner.hand_off("req-1", 30 * TOKENS, list(range(30)))
        await reader.importer.fetch(ticket, list(range(30)), 0, 10.0)
        host = reader.arena if staged == "owner" else owner.arena
        assert all(checksum(host.block(i)) == checksum(device.block(i)) for i in range(30))
        await until(lambda: staging.num_free == NUM_WIRE_BLOCKS)


@pytest.mark.parametrize(("direction", "ways"), [("auto", {"pull"}), ("push", {"push"})])
async def test_only_who_sets_it_is_pushed_to_where_wire_blocks_are_scarce(
    direction: Literal["auto", "push"], ways: set[str]
) -> None:
    """A push needs room for a whole context at once; a read goes on with what there is."""
    _, staging = device_staging(1)
    options = TransferOptions(transport="inproc", direction=direction, stall_timeout_s=2.0)
    async with running_owner("inproc") as owner, running_reader("inproc", staging=staging, options=options) as reader:
        peer = await reader.importer.peers.meet(owner.url, owner.incarnation, "prefill-0")
        assert {trial.direction for trial in peer.trials} == ways
        if direction == "auto":
            ticket = owner.hand_off("r", 40 * TOKENS, list(range(40)))
            await reader.importer.fetch(ticket, list(range(40)), 0, 5.0)
