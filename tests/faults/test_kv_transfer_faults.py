"""Owners that die, stop, restart or lie, as real processes on loopback: the reader gets a typed error in time, knows
when its blocks are safe, and is back to baseline afterwards."""

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from kv_transfer.handoff.imports import FetchFailed
from kv_transfer.transport import Link, TransferAbandoned, check_introduction, find_endpoint, introduce, make_endpoint
from kv_transfer.transports.inproc import Faults, InprocTransport
from protocol.errors import (
    ChecksumMismatch,
    LayoutMismatch,
    LeaseExpired,
    PeerLost,
    TransferError,
    TransferTimeout,
)
from protocol.ids import Incarnation, TicketId, WorkerId
from protocol.transfer import Endpoint, Introduction, TransferTicket, TransportKind
from runtime.node_config import TransferOptions
from tests.support.kv_owner import LAYOUT, UCX, OwnerProcess, fill, running_owner
from tests.support.kv_reader import ReaderNode, running_reader
from tests.support.mapped_memory import arena_mappings

STALL_S = 0.6
WIRED: list[TransportKind] = ["shm", "tcp", "nixl", *UCX]
TLS = ["default", "tcp"]


@contextmanager
def owner_process(kind: TransportKind, port: int = 0, seed: int = 1) -> Iterator[OwnerProcess]:
    owner = OwnerProcess(kind, port, seed)
    try:
        yield owner
    finally:
        owner.stop()


@pytest.fixture(params=WIRED)
def kind(request: pytest.FixtureRequest) -> TransportKind:
    return request.param


@pytest.fixture(params=TLS)
def ucx_tls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that UCX may take on one host; set for this process and for those it spawns."""
    if request.param != "default":
        monkeypatch.setenv("UCX_TLS", request.param)
    return request.param


@pytest.fixture
async def reader(kind: TransportKind) -> AsyncIterator[ReaderNode]:
    async with running_reader(kind, stall_timeout_s=STALL_S) as node:
        yield node


async def meet(reader: ReaderNode, ticket: TransferTicket) -> Introduction:
    message = introduce(WorkerId("decode-0"), Incarnation("x"), LAYOUT, reader.arena, [reader.transport])
    return await reader.client.call(f"{ticket.control_url}/kv/connect", message, Introduction, 5.0)


async def connect(reader: ReaderNode, ticket: TransferTicket) -> Link:
    peer = await meet(reader, ticket)
    check_introduction(peer, incarnation=Incarnation(ticket.incarnation), layout=LAYOUT)
    return await reader.connect(peer)


async def failure_of(
    reader: ReaderNode, ticket: TransferTicket, local: list[int], deadline_s: float = 10.0
) -> FetchFailed:
    with pytest.raises(FetchFailed) as failed:
        await reader.importer.fetch(ticket, local, 0, deadline_s)
    return failed.value


async def settle(event: asyncio.Event) -> None:
    async with asyncio.timeout(10):
        await event.wait()


async def test_an_owner_killed_before_the_fetch_is_lost(kind: TransportKind, reader: ReaderNode) -> None:
    with owner_process(kind) as owner:
        ticket = owner.hand_off("req-1", 32, [0, 1])
        owner.signal(signal.SIGKILL)
        owner.process.join()
        failure = await failure_of(reader, ticket, [0, 1])
    assert isinstance(failure.reason, PeerLost)
    assert failure.num_valid_blocks == 0
    await settle(failure.settled)


async def test_an_owner_killed_in_the_middle_leaves_what_was_verified(kind: TransportKind, reader: ReaderNode) -> None:
    with owner_process(kind) as owner:
        ticket = owner.ask("open", "req-1", 64)
        owner.ask("publish", "req-1", 0, [5, 6])
        fetching = asyncio.create_task(failure_of(reader, ticket, [0, 1, 2, 3]))
        while reader.transport.stats().num_bytes < 2 * LAYOUT.block_bytes:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        owner.signal(signal.SIGKILL)
        failure = await fetching
    assert isinstance(failure.reason, PeerLost)
    assert failure.num_valid_blocks == 2
    await settle(failure.settled)
    assert reader.importer.stats().num_peers == 0


async def test_a_restarted_owner_is_met_anew_and_its_old_tickets_are_void(
    kind: TransportKind, reader: ReaderNode
) -> None:
    with owner_process(kind, seed=1) as owner:
        port = owner.port
        first = owner.hand_off("req-1", 32, [0, 1])
        await reader.importer.fetch(first, [0, 1], 0, 10.0)
        old = owner.hand_off("req-2", 32, [2, 3])
        owner.signal(signal.SIGKILL)
        owner.process.join()
    before = bytes(reader.arena.block(0))
    with owner_process(kind, port=port, seed=2) as owner:
        assert owner.port == port
        failure = await failure_of(reader, old, [4, 5])
        assert isinstance(failure.reason, LeaseExpired)
        result = await reader.importer.fetch(owner.hand_off("req-3", 32, [0, 1]), [6, 7], 0, 10.0)
        assert result.num_blocks_moved == 2
        assert bytes(reader.arena.block(6)) != before
        assert reader.importer.stats().num_peers == 1


async def test_a_stopped_owner_times_out_before_and_during(kind: TransportKind, reader: ReaderNode) -> None:
    with owner_process(kind) as owner:
        before = owner.hand_off("req-1", 32, [0, 1])
        during = owner.ask("open", "req-2", 64)
        owner.ask("publish", "req-2", 0, [5, 6])
        fetching = asyncio.create_task(failure_of(reader, during, [0, 1, 2, 3]))
        while reader.transport.stats().num_bytes < 2 * LAYOUT.block_bytes:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        owner.signal(signal.SIGSTOP)
        assert isinstance((await fetching).reason, TransferTimeout)
        assert isinstance((await failure_of(reader, before, [4, 5])).reason, TransferTimeout)
        owner.signal(signal.SIGCONT)
        after = owner.hand_off("req-3", 32, [0, 1])
        assert (await reader.importer.fetch(after, [8, 9], 0, 10.0)).num_blocks_moved == 2


async def test_nixl_keeps_a_read_in_quarantine_until_the_stopped_owner_wakes(ucx_tls: str) -> None:
    with owner_process("nixl") as owner:
        async with running_reader("nixl", stall_timeout_s=STALL_S) as reader:
            ticket = owner.hand_off("req-1", 32, [0, 1])
            link = await connect(reader, ticket)
            owner.signal(signal.SIGSTOP)
            with pytest.raises(TransferAbandoned) as abandoned:
                await link.read(TicketId(ticket.ticket_id), [1], [1], 0.3)
            assert not abandoned.value.settled.is_set()
            assert reader.transport.stats().num_quarantined == 1
            owner.signal(signal.SIGCONT)
            await settle(abandoned.value.settled)
            assert reader.transport.stats().num_quarantined == 0
            await link.read(TicketId(ticket.ticket_id), [1], [2], 5.0)
            assert reader.arena.block(1) == reader.arena.block(2)
            await link.close()


async def test_nixl_settles_quarantine_when_the_stopped_owner_dies(ucx_tls: str) -> None:
    with owner_process("nixl") as owner:
        async with running_reader("nixl", stall_timeout_s=STALL_S) as reader:
            ticket = owner.hand_off("req-1", 32, [0, 1])
            link = await connect(reader, ticket)
            owner.signal(signal.SIGSTOP)
            with pytest.raises(TransferAbandoned) as abandoned:
                await link.read(TicketId(ticket.ticket_id), [1], [1], 0.3)
            owner.signal(signal.SIGKILL)
            await settle(abandoned.value.settled)
            with pytest.raises(PeerLost):
                await link.read(TicketId(ticket.ticket_id), [1], [1], 5.0)
            await link.close()


@pytest.mark.keeps_files("an agent with a read in quarantine may not be taken apart")
async def test_an_owner_survives_a_reader_that_closed_with_a_read_in_quarantine(ucx_tls: str) -> None:
    with owner_process("nixl") as owner:
        async with running_reader("nixl", stall_timeout_s=STALL_S) as reader:
            ticket = owner.hand_off("req-1", 32, [0, 1])
            link = await connect(reader, ticket)
            owner.signal(signal.SIGSTOP)
            with pytest.raises(TransferAbandoned):
                await link.read(TicketId(ticket.ticket_id), [1], [1], 0.3)
        owner.signal(signal.SIGCONT)
        async with running_reader("nixl", stall_timeout_s=STALL_S) as reader:
            result = await reader.importer.fetch(owner.hand_off("req-2", 32, [0, 1]), [0, 1], 0, 10.0)
            assert result.num_blocks_moved == 2


async def test_nixl_moves_blocks_between_processes(ucx_tls: str) -> None:
    with owner_process("nixl", seed=7) as owner:
        async with running_reader("nixl") as reader:
            remote = [40, 3, 4, 5, 6, 63, 0, 22]
            await reader.importer.fetch(owner.hand_off("req-1", 128, remote), list(range(8)), 0, 10.0)
            got = [bytes(reader.arena.block(i)) for i in range(8)]
            fill(reader.arena, seed=7)
            assert got == [bytes(reader.arena.block(i)) for i in remote]


async def test_a_stopped_nixl_owner_does_not_delay_reads_from_another() -> None:
    with owner_process("nixl") as stopped, owner_process("nixl") as healthy:
        async with running_reader("nixl", stall_timeout_s=STALL_S) as reader:
            stuck, fine = stopped.hand_off("req-1", 32, [0, 1]), healthy.hand_off("req-2", 32, [0, 1])
            link = await connect(reader, stuck)
            stopped.signal(signal.SIGSTOP)
            waiting = asyncio.create_task(link.read(TicketId(stuck.ticket_id), [0], [0], 5.0))
            assert (await reader.importer.fetch(fine, [2, 3], 0, 10.0)).num_blocks_moved == 2
            assert not waiting.done()
            stopped.signal(signal.SIGCONT)
            await waiting
            await link.close()


async def test_damaged_metadata_is_refused_before_use(kind: TransportKind, reader: ReaderNode) -> None:
    async with running_owner(kind) as owner:
        ticket = owner.hand_off("req-1", 32, [0, 1])
        incarnation = Incarnation(ticket.incarnation)
        good = await meet(reader, ticket)
        endpoint = good.endpoints[0]
        damaged = bytearray(endpoint.payload)
        damaged[len(damaged) // 2] ^= 0x10

        def offering(*endpoints: Endpoint) -> Introduction:
            return msgspec.structs.replace(good, endpoints=endpoints)

        bad: list[tuple[type[TransferError], Introduction]] = [
            (ChecksumMismatch, offering(msgspec.structs.replace(endpoint, payload=bytes(damaged)))),
            (ChecksumMismatch, offering(msgspec.structs.replace(endpoint, payload=endpoint.payload[:-1]))),
            (LayoutMismatch, offering(msgspec.structs.replace(endpoint, transport="inproc"))),
            (LayoutMismatch, offering()),
            (LeaseExpired, msgspec.structs.replace(good, incarnation="another")),
            (LayoutMismatch, msgspec.structs.replace(good, layout=msgspec.structs.replace(LAYOUT, num_layers=3))),
            (LayoutMismatch, msgspec.structs.replace(good, num_blocks=0)),
        ]
        for error, peer in bad:
            with pytest.raises(error):
                check_introduction(peer, incarnation=incarnation, layout=LAYOUT)
                find_endpoint(peer, kind)
        assert (await reader.importer.fetch(ticket, [0, 1], 0, 10.0)).num_blocks_moved == 2


async def test_garbage_with_a_right_checksum_is_a_typed_error(kind: TransportKind, reader: ReaderNode) -> None:
    async with running_owner(kind) as owner:
        good = await meet(reader, owner.hand_off("req-1", 32, [0, 1]))
        for payload in (b"", b"\xc1garbage", good.endpoints[0].payload[:-3]):
            with pytest.raises(TransferError):
                await reader.transport.connect(good, make_endpoint(kind, payload))


async def test_an_expired_lease_is_refused_and_freed() -> None:
    options = TransferOptions(transport="shm", lease_ttl_s=0.2)
    async with running_owner("shm", options=options) as owner, running_reader("shm") as reader:
        ticket = owner.hand_off("req-1", 32, [0, 1])
        async with asyncio.timeout(5):
            while not owner.released:
                await asyncio.sleep(0.01)
        assert isinstance((await failure_of(reader, ticket, [0, 1])).reason, LeaseExpired)
        assert owner.released == ["req-1"]
        assert owner.exports.stats().num_expired == 1


async def test_a_long_prefill_is_not_taken_for_a_dead_owner() -> None:
    options = TransferOptions(transport="shm", lease_ttl_s=0.3, stall_timeout_s=0.3)
    async with running_owner("shm", options=options) as owner, running_reader("shm", stall_timeout_s=0.3) as reader:
        ticket = owner.open("req-1", 32)
        fetching = asyncio.create_task(reader.importer.fetch(ticket, [0, 1], 0, 10.0))
        await asyncio.sleep(1.2)
        assert not fetching.done()
        owner.exports.publish("req-1", 0, [0, 1])
        owner.finish("req-1")
        assert (await fetching).num_blocks_moved == 2


async def test_a_failed_prefill_is_heard_with_its_reason() -> None:
    async with running_owner("shm") as owner, running_reader("shm") as reader:
        ticket = owner.open("req-1", 32)
        fetching = asyncio.create_task(failure_of(reader, ticket, [0, 1]))
        await asyncio.sleep(0.05)
        owner.exports.fail("req-1", PeerLost("the engine stumbled"))
        failure = await fetching
        assert isinstance(failure.reason, PeerLost)
        assert "stumbled" in failure.message


async def test_injected_faults_surface_as_what_they_are() -> None:
    async with running_owner("inproc") as owner, running_reader("inproc", stall_timeout_s=0.3) as reader:
        assert isinstance(owner.transport, InprocTransport)
        owner.transport.faults = Faults(corrupt=True)
        failure = await failure_of(reader, owner.hand_off("req-1", 32, [0, 1]), [0, 1])
        assert isinstance(failure.reason, ChecksumMismatch)
        owner.transport.faults = Faults(fail=PeerLost("injected"))
        failure = await failure_of(reader, owner.hand_off("req-2", 32, [0, 1]), [0, 1])
        assert isinstance(failure.reason, PeerLost)
        wake = threading.Event()
        owner.transport.faults = Faults(stall=wake)
        failure = await failure_of(reader, owner.hand_off("req-3", 32, [0, 1]), [0, 1])
        assert isinstance(failure.reason, TransferAbandoned)
        assert not failure.settled.is_set()
        assert reader.importer.stats().num_unsettled == 1
        wake.set()
        await settle(failure.settled)
        assert reader.importer.stats().num_unsettled == 0
        owner.transport.faults = Faults(delay_s=0.05)
        await reader.importer.fetch(owner.hand_off("req-4", 32, [0, 1]), [0, 1], 0, 10.0)


async def test_a_fetch_cancelled_during_a_read_says_when_its_blocks_are_safe() -> None:
    async with running_owner("inproc") as owner, running_reader("inproc", stall_timeout_s=5.0) as reader:
        assert isinstance(owner.transport, InprocTransport)
        await reader.importer.fetch(owner.hand_off("req-0", 32, [0, 1]), [0, 1], 0, 10.0)
        wake = threading.Event()
        owner.transport.faults = Faults(stall=wake)
        ticket = owner.hand_off("req-1", 32, [0, 1])
        fetching = asyncio.create_task(reader.importer.fetch(ticket, [0, 1], 0, 10.0))
        await asyncio.sleep(0.2)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        settled = reader.importer.settled(TicketId(ticket.ticket_id))
        assert not settled.is_set()
        wake.set()
        await settle(settled)
        assert reader.importer.settled(TicketId(ticket.ticket_id)).is_set()


async def test_the_deadline_of_a_fetch_holds() -> None:
    async with running_owner("shm") as owner, running_reader("shm") as reader:
        ticket = owner.open("req-1", 32)
        failure = await failure_of(reader, ticket, [0, 1], deadline_s=0.2)
        assert isinstance(failure.reason, TransferTimeout)
        async with asyncio.timeout(5):
            while owner.released != ["req-1"]:
                await asyncio.sleep(0.01)


def _resources() -> list[int]:
    """Open files, mapped arenas, threads of the transports."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]
    return [len(list(Path("/proc/self/fd").iterdir())), len(arena_mappings()), len(threads)]


def _at_most(now: list[int], then: list[int]) -> bool:
    return all(count <= limit for count, limit in zip(now, then, strict=True))


async def test_everything_goes_back_to_baseline(kind: TransportKind) -> None:
    async def once() -> None:
        with owner_process(kind) as owner:
            async with running_reader(kind, stall_timeout_s=STALL_S) as reader:
                await reader.importer.fetch(owner.hand_off("req-1", 32, [0, 1]), [0, 1], 0, 10.0)
                lost = owner.ask("open", "req-2", 64)
                owner.ask("publish", "req-2", 0, [5, 6])
                fetching = asyncio.create_task(failure_of(reader, lost, [0, 1, 2, 3]))
                await asyncio.sleep(0.2)
                owner.signal(signal.SIGKILL)
                await settle((await fetching).settled)

    await once()  # what libraries allocate once
    tasks, before = len(asyncio.all_tasks()), _resources()
    await once()
    deadline = time.monotonic() + 5
    while not _at_most(_resources(), before) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert _at_most(_resources(), before), f"files, arenas, threads: {before} -> {_resources()}"
    assert len(asyncio.all_tasks()) == tasks
