"""How two nodes meet: they measure what both run, take the best, say why, and survive what a probe can meet with."""

import asyncio
import gc
import threading
from collections.abc import Sequence

import aiohttp
import msgspec
import pytest

from kv_transfer.meeting.meeting import PeerLink
from kv_transfer.meeting.peers import LOOK_INTERVAL_S, OWNER_IDLE_S
from kv_transfer.meeting.pushers import READER_IDLE_S
from kv_transfer.transport import Transport
from kv_transfer.transports import factory
from kv_transfer.transports.factory import start_transports
from kv_transfer.transports.inproc import Faults, InprocLink, InprocTransport
from protocol.errors import ConfigError, LayoutMismatch, PeerLost, TransferError
from protocol.ids import Incarnation, RequestId, TicketId
from protocol.links import LinksReport
from protocol.transfer import ProbePush, ProbeResult, TransportKind
from runtime.clock import ManualClock
from runtime.node_config import TransferOptions
from tests.support.kv_owner import CLUSTER_KEY, LAYOUT, OWNER, Owner, running_owner
from tests.support.kv_reader import ReaderNode, running_reader
from tests.support.mapped_memory import arena_mappings

KINDS: tuple[TransportKind, ...] = ("inproc", "shm", "tcp", "nixl")


def auto(*allowed: TransportKind, **others: object) -> TransferOptions:
    return msgspec.convert({"allowed": allowed, "stall_timeout_s": 2.0, **others}, TransferOptions)


async def meet(reader: ReaderNode, owner: Owner) -> PeerLink:
    return await reader.importer.peers.meet(owner.url, owner.incarnation, OWNER)


@pytest.mark.parametrize("kind", KINDS)
async def test_every_transport_is_measured_where_it_is_the_only_one(kind: TransportKind) -> None:
    async with running_owner(kind) as owner, running_reader(kind) as reader:
        peer = await meet(reader, owner)
        assert (peer.kind, peer.direction) == (kind, "pull")
        assert peer.link is not None
        assert peer.measured is not None
        assert 0 < peer.estimate_seconds(1) < peer.estimate_seconds(1 << 30) < float("inf")
        assert "transport is set, direction is set" in peer.choice.why
        assert reader.transport.stats().num_bytes == 0
        assert reader.transports.scratch.num_kept_back == 0


async def test_all_that_both_run_are_tried_and_one_is_kept() -> None:
    options = auto("shm", "nixl", "tcp")
    async with running_owner("shm", options=options) as owner, running_reader("shm", options=options) as reader:
        peers = await asyncio.gather(*(meet(reader, owner) for _ in range(4)))
        assert len({id(peer) for peer in peers}) == 1
        ways = {(trial.kind, trial.direction) for trial in peers[0].trials if trial.measured is not None}
        assert ways == {("shm", "pull"), ("tcp", "pull"), ("nixl", "pull"), ("nixl", "push")}
        assert peers[0].obstacles == ()
        assert peers[0].choice.why.count("GB/s") == 4
        assert owner.transports.scratch.num_kept_back == reader.transports.scratch.num_kept_back == 0


async def test_the_fastest_is_taken_whatever_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    options = auto("inproc", "shm", direction="pull")
    async with running_owner("shm", options=options) as owner, running_reader("shm", options=options) as reader:
        slow = owner.transports.get("inproc")
        assert isinstance(slow, InprocTransport)
        slow.faults = Faults(delay_s=0.02)
        assert (await meet(reader, owner)).kind == "shm"


async def test_an_explicit_transport_wins() -> None:
    everything = auto("shm", "tcp")
    async with running_owner("shm", options=everything) as owner, running_reader("tcp") as reader:
        peer = await meet(reader, owner)
        assert peer.kind == "tcp"
        result = await reader.importer.fetch(owner.hand_off("req-1", 32, [0, 1]), [0, 1], 0, 10.0)
        assert result.num_blocks_moved == 2


@pytest.mark.parametrize("kind", ["inproc", "nixl"])
async def test_an_owner_pushes_into_a_reader_that_has_met_it(kind: TransportKind) -> None:
    options = TransferOptions(transport=kind, direction="push")
    async with running_owner(kind) as owner, running_reader(kind, options=options) as reader:
        peer = await meet(reader, owner)
        assert (peer.kind, peer.direction, peer.link) == (kind, "push", None)
        assert peer.measured is not None
        me = owner.pushers.known[0].introduction
        assert owner.pushers.reader(me.worker, me.incarnation) == me
        link = await owner.pushers.link(me.worker, me.incarnation, kind)
        assert await owner.pushers.link(me.worker, me.incarnation, kind) is link
        await link.write([3, 5], [7, 9], 5.0)
        assert reader.arena.block(7) == owner.arena.block(3)
        assert reader.arena.block(9) == owner.arena.block(5)
        owner.pushers.forget(me.worker, me.incarnation, kind)
        assert await owner.pushers.link(me.worker, me.incarnation, kind) is not link
        for worker, incarnation in (("stranger", me.incarnation), (me.worker, "another-life")):
            with pytest.raises(PeerLost, match="meet this node again"):
                await owner.pushers.link(worker, incarnation, kind)


async def test_a_reader_in_a_new_life_replaces_the_old_and_silent_ones_go() -> None:
    clock = ManualClock()
    async with running_owner("inproc", pusher_clock=clock) as owner:
        async with running_reader("inproc") as reader:
            await meet(reader, owner)
            first = owner.pushers.known[0].introduction
        async with running_reader("inproc") as reader:
            await meet(reader, owner)
            assert [known.introduction.worker for known in owner.pushers.known] == [first.worker]
            with pytest.raises(PeerLost):
                owner.pushers.reader(first.worker, first.incarnation)
            clock.advance(READER_IDLE_S)
            owner.pushers.tidy()
            assert owner.pushers.known == []


async def test_a_push_probe_stays_within_the_landing_blocks() -> None:
    options = TransferOptions(transport="inproc")
    async with running_owner("inproc") as owner, running_reader("inproc", options=options) as reader:
        await meet(reader, owner)
        me = owner.pushers.known[0].introduction
        for block_ids in ((0,), (me.num_blocks,), (me.num_wire_blocks,)):
            probe = ProbePush(reader=me.worker, incarnation=me.incarnation, transport="inproc", block_ids=block_ids)
            with pytest.raises(TransferError, match="second half"):
                await reader.client.call(f"{owner.url}/kv/probe", probe, ProbeResult, 5.0)
        assert bytes(reader.arena.block(0)) == bytes(LAYOUT.block_bytes)


async def test_a_transport_that_moves_nothing_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lie(
        _self: InprocLink, _ticket: TicketId, _remote: Sequence[int], _local: Sequence[int], _timeout: float
    ) -> None:
        return None

    monkeypatch.setattr(InprocLink, "read", lie)
    options = auto("inproc", "shm", direction="pull")
    async with running_owner("shm", options=options) as owner, running_reader("shm", options=options) as reader:
        peer = await meet(reader, owner)
        assert peer.kind == "shm"
        assert "the bytes did not arrive" in peer.choice.why


async def test_a_probe_that_hangs_costs_its_transport_the_race_and_its_blocks_until_it_ends() -> None:
    options = auto("inproc", "tcp", direction="pull", stall_timeout_s=0.8)
    async with running_owner("tcp", options=options) as owner, running_reader("tcp", options=options) as reader:
        stuck = owner.transports.get("inproc")
        assert isinstance(stuck, InprocTransport)
        wake = threading.Event()
        stuck.faults = Faults(stall=wake)
        peer = await meet(reader, owner)
        assert peer.kind == "tcp"
        assert reader.transports.scratch.num_kept_back == 1
        wake.set()
        async with asyncio.timeout(5):
            while reader.transports.scratch.num_kept_back:
                await asyncio.sleep(0.01)


async def test_an_only_transport_is_used_even_if_it_cannot_be_measured() -> None:
    async with running_owner("inproc") as owner, running_reader("inproc", stall_timeout_s=0.4) as reader:
        assert isinstance(owner.transport, InprocTransport)
        owner.transport.faults = Faults(fail=TransferError("injected"))
        peer = await meet(reader, owner)
        assert (peer.kind, peer.measured) == ("inproc", None)
        assert peer.estimate_seconds(1) == float("inf")
        owner.transport.faults = Faults()
        result = await reader.importer.fetch(owner.hand_off("req-1", 32, [0, 1]), [0, 1], 0, 10.0)
        assert result.num_blocks_moved == 2


async def test_what_cannot_run_at_one_end_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    make = factory.make_transport

    def without_shm(kind: TransportKind, *arguments: object, **named: object) -> Transport:
        if kind == "shm":
            raise ConfigError("shm is out of order: mend it", param="transfer.transport")
        return make(kind, *arguments, **named)  # type: ignore[arg-type]  # passed on as they came

    options = auto("shm", "tcp")
    async with running_reader("tcp", options=options) as reader:
        monkeypatch.setattr(factory, "make_transport", without_shm)
        async with running_owner("tcp", options=options) as owner:
            peer = await meet(reader, owner)
    assert peer.kind == "tcp"
    assert [(obstacle.kind, obstacle.problem) for obstacle in peer.obstacles] == [
        ("shm", "it cannot run on prefill-0: shm is out of order: mend it")
    ]


async def test_nodes_with_nothing_in_common_are_told_so() -> None:
    async with (
        running_owner("shm", options=auto("shm")) as owner,
        running_reader("tcp", options=auto("inproc", "tcp")) as reader,
    ):
        with pytest.raises(LayoutMismatch, match="to the same on both"):
            await meet(reader, owner)


def test_a_set_of_transports_needs_one_that_starts_and_does_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: TransportKind, *_: object, **__: object) -> Transport:
        raise ConfigError(f"no {kind} here", param="transfer.transport")

    monkeypatch.setattr(factory, "make_transport", refuse)
    with pytest.raises(ConfigError, match="no shm here") as refused:
        start_transports(auto("shm", "tcp"), None, incarnation=Incarnation("i"), host="127.0.0.1")  # type: ignore[arg-type]  # never used
    assert refused.value.param == "transfer.allowed"
    with pytest.raises(ConfigError, match="no tcp here") as refused:
        start_transports(TransferOptions(transport="tcp"), None, incarnation=Incarnation("i"), host="127.0.0.1")  # type: ignore[arg-type]  # never used
    assert refused.value.param == "transfer.transport"


async def test_a_direction_that_no_transport_has_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="which tcp cannot do"):
        async with running_reader("tcp", options=TransferOptions(transport="tcp", direction="push")):
            pytest.fail("started")


async def test_links_are_shown_as_json_to_who_has_the_key() -> None:
    options = auto("shm", "tcp")
    async with running_owner("shm", options=options) as owner, running_reader("shm", options=options) as reader:
        peer = await meet(reader, owner)
        report = reader.reporter.report()
        assert [(link.peer, link.transport, link.why) for link in report.links] == [(OWNER, peer.kind, peer.choice.why)]
        assert {(way.transport, way.direction) for way in report.links[0].ways} == {("shm", "pull"), ("tcp", "pull")}
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{owner.url}/kv/links") as refused:
                assert (refused.status, (await refused.json())["code"]) == (401, "unauthorized")
            key = {"authorization": f"Bearer {CLUSTER_KEY}"}
            async with session.get(f"{owner.url}/kv/links", headers=key) as answer:
                told = msgspec.json.decode(await answer.read(), type=LinksReport)
        assert [(each.transport, each.directions) for each in told.transports] == [
            ("shm", ("pull",)),
            ("tcp", ("pull",)),
        ]
        assert [known.peer for known in told.readers] == ["decode-0"]


async def until_forgotten(reader: ReaderNode, num_mappings: int) -> None:
    """Its memory is unmapped when the link has closed, in the background. So many are mapped then."""
    peers = reader.importer.peers
    assert (peers.num_known, peers.links()) == (0, [])
    async with asyncio.timeout(5):
        while len(arena_mappings()) > num_mappings:
            gc.collect()  # what was caught refers to frames, and they to what they worked on
            await asyncio.sleep(0.001)


async def test_owners_that_left_or_restarted_are_forgotten_and_others_are_not() -> None:
    clock = ManualClock()
    async with running_reader("shm", clock=clock) as reader:
        peers = reader.importer.peers
        num_mappings = len(arena_mappings())
        for _ in range(3):
            async with running_owner("shm") as owner:
                await meet(reader, owner)
                clock.advance(LOOK_INTERVAL_S)
                await peers.tidy()
                assert peers.num_known == 1
            clock.advance(LOOK_INTERVAL_S)
            await peers.tidy()
            await until_forgotten(reader, num_mappings)
        async with running_owner("shm") as owner:
            await meet(reader, owner)
            port = int(owner.url.rsplit(":", 1)[1])
        async with running_owner("shm", port=port):
            await peers.tidy()
            assert peers.num_known == 1  # used a moment ago: not even asked
            clock.advance(LOOK_INTERVAL_S)
            await peers.tidy()
            await until_forgotten(reader, num_mappings + 1)


async def test_an_owner_that_is_not_used_is_forgotten_but_not_under_a_fetch() -> None:
    clock = ManualClock()
    async with running_owner("shm") as owner, running_reader("shm", clock=clock) as reader:
        peers = reader.importer.peers
        num_mappings = len(arena_mappings())
        ticket = owner.open("req-1", 32)
        fetching = asyncio.create_task(reader.importer.fetch(ticket, [0, 1], 0, 10.0))
        async with asyncio.timeout(5):
            while not peers.links():
                await asyncio.sleep(0.001)
        (met,) = peers.links()
        clock.advance(2 * OWNER_IDLE_S)
        await peers.tidy()
        assert peers.links() == [met]
        owner.exports.publish(RequestId("req-1"), 0, [0, 1])
        owner.finish("req-1")
        await fetching
        clock.advance(OWNER_IDLE_S - 1)
        await peers.tidy()
        assert peers.links() == [met]
        clock.advance(1)
        await peers.tidy()
        await until_forgotten(reader, num_mappings)
        assert await meet(reader, owner) is not met
