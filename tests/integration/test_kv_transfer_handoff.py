"""One contract for all transports: what the owner exported is what the reader gets, whole, proven and released."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from kv_transfer.handoff.fetch import FetchResult
from kv_transfer.handoff.imports import FetchFailed
from protocol.errors import ChecksumMismatch, LayoutMismatch, LeaseExpired
from protocol.ids import RequestId
from protocol.transfer import PrefillDone, TransportKind
from runtime.clock import MonotonicClock
from runtime.node_config import TransferOptions
from tests.support.kv_owner import FIRST_TOKEN, LAYOUT, PHASES, UCX, Owner, running_owner
from tests.support.kv_reader import ReaderNode, refusal, running_reader

KINDS: list[TransportKind] = ["inproc", "shm", "tcp", "nixl", *UCX]


@pytest.fixture(params=KINDS)
async def kind(request: pytest.FixtureRequest) -> TransportKind:
    return request.param


@pytest.fixture
async def owner(kind: TransportKind) -> AsyncIterator[Owner]:
    async with running_owner(kind) as node:
        yield node


@pytest.fixture
async def reader(kind: TransportKind) -> AsyncIterator[ReaderNode]:
    async with running_reader(kind) as node:
        yield node


async def released(owner: Owner, request_id: str) -> None:
    async with asyncio.timeout(5):
        while request_id not in owner.released:
            await asyncio.sleep(0.01)


def assert_arrived(owner: Owner, reader: ReaderNode, remote: list[int], local: list[int]) -> None:
    for theirs, ours in zip(remote, local, strict=True):
        assert reader.arena.block(ours) == owner.arena.block(theirs)


async def test_a_finished_prefill_arrives_whole(owner: Owner, reader: ReaderNode) -> None:
    remote, local = [9, 3, 4, 5, 60], [0, 10, 11, 12, 63]
    ticket = owner.hand_off("req-1", 70, remote)
    result = await reader.importer.fetch(ticket, local, 0, 10.0)
    assert_arrived(owner, reader, remote, local)
    assert isinstance(result.end, PrefillDone)
    assert (result.end.first_token, result.end.finished, result.end.phases) == (FIRST_TOKEN, False, PHASES)
    assert result.num_blocks_moved == 5
    await released(owner, "req-1")
    assert owner.exports.stats().num_open == 0
    assert reader.transport.stats().num_bytes == 5 * LAYOUT.block_bytes


async def test_blocks_move_while_the_prefill_computes(owner: Owner, reader: ReaderNode) -> None:
    request_id = RequestId("req-1")
    ticket = owner.open(request_id, 64)
    fetching = asyncio.create_task(reader.importer.fetch(ticket, [0, 1, 2, 3], 0, 10.0))
    for index in range(4):
        owner.exports.publish(request_id, index, [20 + index])
        async with asyncio.timeout(5):
            while reader.arena.block(index) != owner.arena.block(20 + index):
                await asyncio.sleep(0.005)
        assert not fetching.done()
    owner.finish(request_id)
    assert (await fetching).num_blocks_moved == 4


async def test_cached_blocks_do_not_move(owner: Owner, reader: ReaderNode) -> None:
    ticket = owner.hand_off("req-1", 64, [0, 1, 2, 3])
    result = await reader.importer.fetch(ticket, [30, 31, 32, 33], 2, 10.0)
    assert result.num_blocks_moved == 2
    assert reader.arena.block(30) == bytes(LAYOUT.block_bytes)
    assert_arrived(owner, reader, [2, 3], [32, 33])


async def test_a_context_that_is_wholly_cached_moves_nothing(owner: Owner, reader: ReaderNode) -> None:
    ticket = owner.hand_off("req-1", 32, [0, 1])
    result = await reader.importer.fetch(ticket, [5, 6], 2, 10.0)
    assert isinstance(result.end, PrefillDone)
    assert (result.num_blocks_moved, result.end.first_token) == (0, FIRST_TOKEN)
    await released(owner, "req-1")


async def test_many_fetches_at_once_share_one_meeting(owner: Owner, reader: ReaderNode) -> None:
    tickets = [owner.hand_off(f"req-{i}", 32, [2 * i, 2 * i + 1]) for i in range(16)]
    fetches = [reader.importer.fetch(ticket, [2 * i, 2 * i + 1], 0, 10.0) for i, ticket in enumerate(tickets)]
    await asyncio.gather(*fetches)
    assert_arrived(owner, reader, list(range(32)), list(range(32)))
    assert reader.importer.stats().num_peers == 1


async def test_reused_memory_is_noticed(owner: Owner, reader: ReaderNode) -> None:
    ticket = owner.hand_off("req-1", 64, [0, 1, 2, 3])
    while not owner.exports.may_read(ticket.ticket_id, [3]):
        await asyncio.sleep(0.005)
    owner.arena.block(2)[:] = bytes(LAYOUT.block_bytes)
    with pytest.raises(FetchFailed) as failed:
        await reader.importer.fetch(ticket, [4, 5, 6, 7], 0, 10.0)
    assert isinstance(failed.value.reason, ChecksumMismatch)
    assert failed.value.num_valid_blocks == 2
    assert failed.value.settled.is_set()
    assert failed.value.to_info().code == "checksum_mismatch"
    await released(owner, "req-1")


async def test_a_ticket_is_good_once(owner: Owner, reader: ReaderNode) -> None:
    ticket = owner.hand_off("req-1", 32, [0, 1])
    await reader.importer.fetch(ticket, [0, 1], 0, 10.0)
    await released(owner, "req-1")
    with pytest.raises(FetchFailed) as failed:
        await reader.importer.fetch(ticket, [0, 1], 0, 10.0)
    assert isinstance(failed.value.reason, LeaseExpired)


async def test_a_cancelled_fetch_releases_the_lease_and_settles(owner: Owner, reader: ReaderNode) -> None:
    request_id = RequestId("req-1")
    ticket = owner.open(request_id, 64)
    owner.exports.publish(request_id, 0, [1, 2])
    fetching = asyncio.create_task(reader.importer.fetch(ticket, [0, 1, 2, 3], 0, 10.0))
    while reader.transport.stats().num_transfers == 0:
        await asyncio.sleep(0.005)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    async with asyncio.timeout(5):
        await reader.importer.settled(ticket.ticket_id).wait()
    await released(owner, request_id)
    owner.exports.publish(request_id, 2, [3])
    owner.finish(request_id)
    assert owner.released == [request_id]


async def test_another_layout_is_refused_with_the_field(kind: TransportKind, owner: Owner) -> None:
    other = msgspec.structs.replace(LAYOUT, rope="theta=10000")
    async with running_reader(kind, layout=other) as reader:
        ticket = owner.hand_off("req-1", 32, [0, 1])
        disguised = msgspec.structs.replace(ticket, layout_fingerprint=other.fingerprint)
        with pytest.raises(FetchFailed, match="rope") as failed:
            await reader.importer.fetch(disguised, [0, 1], 0, 10.0)
        assert isinstance(failed.value.reason, LayoutMismatch)
        with pytest.raises(FetchFailed, match="another KV layout"):
            await reader.importer.fetch(ticket, [0, 1], 0, 10.0)


async def test_another_transport_is_refused(kind: TransportKind, owner: Owner) -> None:
    other: TransportKind = "tcp" if kind != "tcp" else "shm"
    async with running_reader(other) as reader:
        with pytest.raises(FetchFailed, match="moves KV by"):
            await reader.importer.fetch(owner.hand_off("req-1", 32, [0, 1]), [0, 1], 0, 10.0)


async def test_a_broken_link_is_mended_in_the_middle_of_a_hand_off(owner: Owner, reader: ReaderNode) -> None:
    request_id = RequestId("req-1")
    ticket = owner.open(request_id, 64)
    fetching = asyncio.create_task(reader.importer.fetch(ticket, [0, 1, 2, 3], 0, 10.0))
    owner.exports.publish(request_id, 0, [20, 21])
    async with asyncio.timeout(5):
        while reader.transport.stats().num_bytes < 2 * LAYOUT.block_bytes:
            await asyncio.sleep(0.005)
    (peer,) = reader.importer.peers.links()
    assert peer.link is not None
    await peer.link.close()
    owner.exports.publish(request_id, 2, [22, 23])
    owner.finish(request_id)
    await fetching
    assert_arrived(owner, reader, [20, 21, 22, 23], [0, 1, 2, 3])
    assert reader.importer.stats().num_retries == 1
    assert reader.importer.stats().num_peers == 1


async def test_many_hand_offs_through_a_narrow_link_all_arrive(kind: TransportKind, owner: Owner) -> None:
    options = TransferOptions(
        transport=kind, direction="pull", stall_timeout_s=2.0, max_bytes_in_flight=3 * LAYOUT.block_bytes
    )
    async with running_reader(kind, options=options) as reader:
        tickets = [owner.hand_off(f"req-{i}", 128, list(range(8 * i, 8 * i + 8))) for i in range(8)]
        fetches = [
            reader.importer.fetch(ticket, list(range(8 * i, 8 * i + 8)), 0, 10.0) for i, ticket in enumerate(tickets)
        ]
        await asyncio.gather(*fetches)
        assert_arrived(owner, reader, list(range(64)), list(range(64)))
        assert reader.importer.queue_stats().waited_s > 0


async def test_the_account_of_a_hand_off_adds_up_and_comes_before_anything_else_runs(
    owner: Owner, reader: ReaderNode
) -> None:
    arrived: list[tuple[FetchResult, float]] = []
    ticket = owner.hand_off("req-1", 64, [0, 1, 2, 3])
    result = await reader.importer.fetch(
        ticket, [4, 5, 6, 7], 0, 10.0, lambda fetched: arrived.append((fetched, MonotonicClock().now()))
    )
    ((first, at),) = arrived
    assert first is result
    assert result.landing.join_s == 0
    assert 0 < result.landing.total_s <= at - result.computed_at
    assert result.landing.wire_s > 0


async def test_a_ticket_that_is_refused_unread_is_not_kept_any_more() -> None:
    async with running_owner("inproc") as owner, running_reader("inproc") as reader:
        ticket = msgspec.structs.replace(owner.hand_off("req-1", 32, [0, 1]), layout_fingerprint="another")
        reader.importer.keep(ticket)
        assert isinstance(await refusal(reader, ticket), LayoutMismatch)
        async with asyncio.timeout(5):
            while not owner.exports.stats().num_released:
                await asyncio.sleep(0.005)
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("kv-renew")]
