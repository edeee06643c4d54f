"""NIXL between real processes, over UCX's own choice of transport and over TCP: every block lands where it should, in both
directions and whoever moves it; and what a peer's pause, death or return does to those who live on."""

import asyncio
import contextlib
import itertools
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Literal

import msgspec
import pytest

from kv_transfer.transport import Link, TransferAbandoned, make_endpoint
from kv_transfer.transports.nixl.transport import NixlPayload, NixlTransport
from protocol.errors import LayoutMismatch, PeerLost, TransferError
from protocol.transfer import Introduction
from protocol.wire import decode, encode
from tests.support.kv_owner import LAYOUT, NUM_BLOCKS, NUM_SCRATCH_BLOCKS
from tests.support.kv_peer import TICKET, Peer, PeerProcess, peer_process, running_peer

Move = Literal["read", "write"]
TIMEOUT_S = 10.0

ID_PAIRS = {
    "one": ([5], [9]),
    "consecutive": (list(range(8, 40)), list(range(16, 48))),
    "scattered": ([40, 3, 4, 5, 6, 63, 0], [1, 2, 3, 4, 60, 5, 33]),
    "all, reversed": (list(range(NUM_BLOCKS)), list(reversed(range(NUM_BLOCKS)))),
    "scratch": ([NUM_BLOCKS, NUM_BLOCKS + 3], [NUM_BLOCKS + 1, 0]),
}


@pytest.fixture(params=["default", "tcp"], autouse=True)
def ucx_tls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that UCX may take on one host; set for this process and for those it starts."""
    if request.param != "default":
        monkeypatch.setenv("UCX_TLS", request.param)
    return str(request.param)


@pytest.fixture(params=["read", "write"])
def move(request: pytest.FixtureRequest) -> Move:
    return "read" if request.param == "read" else "write"


@pytest.fixture
def there(ucx_tls: str) -> Iterator[PeerProcess]:
    with peer_process("nixl") as process:
        yield process


@pytest.fixture
async def here(there: PeerProcess) -> AsyncIterator[Peer]:
    async with running_peer("nixl") as peer:
        yield peer


def nixl(peer: Peer) -> NixlTransport:
    assert isinstance(peer.transport, NixlTransport)
    return peer.transport


async def run(link: Link, move: Move, theirs: list[int], ours: list[int], timeout_s: float = TIMEOUT_S) -> None:
    if move == "read":
        await link.read(TICKET, theirs, ours, timeout_s)
    else:
        await link.write(ours, theirs, timeout_s)


async def settle(event: asyncio.Event) -> None:
    """Where UCX copies between processes by itself (the default), only a link's first transfer waits for the peer. So a
    test that needs one that stands still makes it the first."""
    async with asyncio.timeout(10):
        await event.wait()


async def test_every_block_lands_where_it_should_and_no_other_changes(
    here: Peer, there: PeerProcess, move: Move
) -> None:
    link = await here.meet(there.introduction)
    everything = list(range(NUM_BLOCKS + NUM_SCRATCH_BLOCKS))
    for chunk_blocks, (what, (theirs, ours)) in itertools.product([1, 3, 1000], ID_PAIRS.items()):
        nixl(here).chunk_blocks = chunk_blocks
        expected = dict(enumerate(here.contents(everything) if move == "read" else there.ask("contents", everything)))
        if move == "read":
            expected.update(zip(ours, there.ask("contents", theirs), strict=True))
        else:
            expected.update(zip(theirs, here.contents(ours), strict=True))
        await run(link, move, theirs, ours)
        found = here.contents(everything) if move == "read" else there.ask("contents", everything)
        assert found == list(expected.values()), (what, chunk_blocks)
    stats = here.transport.stats()
    assert stats.num_transfers == 3 * len(ID_PAIRS)
    assert stats.num_bytes == 3 * sum(len(ours) for _, ours in ID_PAIRS.values()) * LAYOUT.block_bytes


async def test_nothing_moves_when_nothing_is_asked_for(here: Peer, there: PeerProcess, move: Move) -> None:
    link = await here.meet(there.introduction)
    await run(link, move, [], [])
    assert here.transport.stats().num_bytes == 0


async def test_arenas_may_differ_in_size(here: Peer, move: Move) -> None:
    with peer_process("nixl", num_blocks=7) as small:
        link = await here.meet(small.introduction)
        await run(link, move, [6, 0], [63, 62])
        assert here.contents([63, 62]) == small.ask("contents", [6, 0])
        with pytest.raises(TransferError):
            await run(link, move, [7 + NUM_SCRATCH_BLOCKS], [0])


async def test_impossible_transfers_are_refused_and_harm_nothing(here: Peer, there: PeerProcess, move: Move) -> None:
    link = await here.meet(there.introduction)
    out_of_range = NUM_BLOCKS + NUM_SCRATCH_BLOCKS
    twice = ([1, 2], [3, 3]) if move == "read" else ([3, 3], [1, 2])
    for theirs, ours in ([out_of_range], [0]), ([0], [out_of_range]), ([-1], [0]), ([0], [-1]), ([1, 2], [3]), twice:
        with pytest.raises(TransferError):
            await run(link, move, theirs, ours)
    await run(link, move, [1], [2])
    assert here.contents([2]) == there.ask("contents", [1])


async def test_two_processes_read_and_write_one_another_at_once_and_no_two_agents_know_each_other(
    here: Peer, there: PeerProcess
) -> None:
    link = await here.meet(there.introduction)
    there.ask("meet", here.introduction())
    ours, theirs = here.contents(range(NUM_BLOCKS)), there.ask("contents", list(range(NUM_BLOCKS)))
    for move in ("read", "write"):
        peers_work = there.asking(move, "here", [0, 1, 2, 3], [32, 33, 34, 35], TIMEOUT_S, 40)
        await asyncio.gather(
            peers_work,
            *[link.read(TICKET, [8, 9], [8 + 2 * index, 9 + 2 * index], TIMEOUT_S) for index in range(8)],
            *[link.write([4, 5], [40 + 2 * index, 41 + 2 * index], TIMEOUT_S) for index in range(8)],
        )
    assert here.contents([8, 9, 22, 23]) == [theirs[8], theirs[9]] * 2
    assert there.ask("contents", [40, 41, 54, 55]) == [ours[4], ours[5]] * 2
    assert there.ask("contents", [32, 35]) == [ours[0], ours[3]]
    assert here.contents([32, 35]) == [theirs[0], theirs[3]]
    transport = nixl(here)
    passive_name = decode(there.introduction.endpoints[0].payload, NixlPayload).agent
    knows = {name: agent.check_remote_metadata(passive_name) for name, agent in _agents(transport).items()}
    assert knows == {"active": True, "passive": False}
    for agent in _agents(transport).values():
        assert not agent.check_remote_metadata(f"{passive_name}-active")


def _agents(transport: NixlTransport) -> dict[str, object]:
    return {"active": transport.agent._agent, "passive": transport.passive._agent}


async def test_a_transfer_to_a_stopped_peer_settles_when_it_wakes(here: Peer, there: PeerProcess, move: Move) -> None:
    link = await here.meet(there.introduction)
    there.signal(signal.SIGSTOP)
    with pytest.raises(TransferAbandoned) as abandoned:
        await run(link, move, [1, 2], [1, 2], 0.3)
    assert not abandoned.value.settled.is_set()
    assert here.transport.stats().num_quarantined == 1
    there.signal(signal.SIGCONT)
    await settle(abandoned.value.settled)
    assert here.transport.stats().num_quarantined == 0
    assert here.contents([1, 2]) == there.ask("contents", [1, 2])
    await run(link, move, [3], [4])
    assert here.contents([4]) == there.ask("contents", [3])


async def test_what_was_not_begun_when_a_transfer_was_abandoned_never_moves(
    here: Peer, there: PeerProcess, move: Move
) -> None:
    nixl(here).chunk_blocks = 2
    link = await here.meet(there.introduction)
    ours, theirs = here.contents(range(NUM_BLOCKS)), there.ask("contents", list(range(NUM_BLOCKS)))
    there.signal(signal.SIGSTOP)
    with pytest.raises(TransferAbandoned) as abandoned:
        await run(link, move, list(range(1, 41)), list(range(1, 41)), 0.3)
    there.signal(signal.SIGCONT)
    await settle(abandoned.value.settled)
    if move == "read":
        assert here.contents(range(5, NUM_BLOCKS)) == ours[5:]
    else:
        assert there.ask("contents", list(range(5, NUM_BLOCKS))) == theirs[5:]


async def test_a_transfer_to_a_stopped_peer_settles_when_it_dies(here: Peer, there: PeerProcess, move: Move) -> None:
    link = await here.meet(there.introduction)
    there.signal(signal.SIGSTOP)
    with pytest.raises(TransferAbandoned) as abandoned:
        await run(link, move, [1, 2], [1, 2], 0.3)
    there.signal(signal.SIGKILL)
    await settle(abandoned.value.settled)
    with pytest.raises(PeerLost):
        await run(link, move, [1], [1])


async def test_a_stopped_peer_delays_nobody_else(here: Peer, there: PeerProcess, move: Move) -> None:
    stuck = await here.meet(there.introduction)
    with peer_process("nixl", name="healthy") as healthy:
        fine = await here.meet(healthy.introduction)
        there.signal(signal.SIGSTOP)
        waiting = asyncio.create_task(run(stuck, move, list(range(8)), list(range(8))))
        await run(fine, move, list(range(20, 60)), list(range(20, 60)))
        assert not waiting.done()
        there.signal(signal.SIGCONT)
        await waiting
        assert here.contents(range(20, 60)) == healthy.ask("contents", list(range(20, 60)))


async def test_who_initiates_survives_the_death_of_its_target(here: Peer, move: Move) -> None:
    with peer_process("nixl", name="mortal") as mortal, peer_process("nixl", name="other") as other:
        doomed, fine = await here.meet(mortal.introduction), await here.meet(other.introduction)

        async def until_lost() -> None:
            while True:
                await run(doomed, move, list(range(32)), list(range(32)))

        moving = asyncio.create_task(until_lost())
        while here.transport.stats().num_transfers < 20:
            await asyncio.sleep(0.005)
        mortal.signal(signal.SIGKILL)
        with pytest.raises(PeerLost):
            async with asyncio.timeout(TIMEOUT_S):
                await moving
        await run(fine, move, [40], [41])
        assert here.contents([41]) == other.ask("contents", [40])
        await doomed.close()
        with peer_process("nixl", name="mortal", seed=5) as reborn:
            link = await here.meet(reborn.introduction)
            await run(link, move, [1], [2])
            assert here.contents([2]) == reborn.ask("contents", [1])


async def test_a_target_survives_the_death_of_who_initiates(here: Peer, move: Move) -> None:
    with peer_process("nixl", name="other") as other:
        other.ask("meet", here.introduction())
        with peer_process("nixl", name="mortal") as mortal:
            mortal.ask("meet", here.introduction())
            link = await here.meet(mortal.introduction)
            working = asyncio.create_task(mortal.asking(move, "here", [32, 33], [34, 35], TIMEOUT_S, 1_000_000))
            for _ in range(20):
                await link.read(TICKET, [0, 1], [0, 1], TIMEOUT_S)
            mortal.signal(signal.SIGKILL)
            with contextlib.suppress(EOFError, ConnectionResetError):
                await working
        await other.asking(move, "here", [40], [41], TIMEOUT_S, 1)
        ours, theirs = ([40], [41]) if move == "read" else ([41], [40])
        assert here.contents(ours) == other.ask("contents", theirs)


async def test_a_peer_that_ends_in_order_is_lost_and_takes_nobody_along(
    here: Peer, there: PeerProcess, move: Move
) -> None:
    link = await here.meet(there.introduction)
    there.ask("meet", here.introduction())
    there.ask(move, "here", [1], [1], TIMEOUT_S, 1)
    await run(link, move, [0], [0])
    assert there.leave() == 0
    with pytest.raises(PeerLost):
        await run(link, move, list(range(32)), list(range(32)))


async def test_metadata_that_is_not_the_peers_own_is_refused(here: Peer, there: PeerProcess) -> None:
    good = there.introduction
    payload = decode(good.endpoints[0].payload, NixlPayload)

    def lie(**changes: object) -> Introduction:
        endpoint = make_endpoint("nixl", encode(msgspec.structs.replace(payload, **changes)))
        return msgspec.structs.replace(good, endpoints=(endpoint,))

    lies: list[tuple[type[TransferError], Introduction]] = [
        (TransferError, lie(agent="headrace-another-0")),
        (TransferError, lie(address=payload.address + (1 << 40))),
        (TransferError, lie(address=-1)),
        (TransferError, lie(metadata=payload.metadata.replace(payload.agent.encode(), b"\xff" * len(payload.agent)))),
        (LayoutMismatch, lie(block_bytes=payload.block_bytes * 2)),
        (TransferError, msgspec.structs.replace(good, num_blocks=good.num_blocks + 1)),
    ]
    for error, introduction in lies:
        with pytest.raises(error):
            await here.meet(introduction)
    link = await here.meet(good)
    await run(link, "read", [1], [2])
    assert here.contents([2]) == there.ask("contents", [1])


async def test_child_processes_do_not_inherit_its_sockets(here: Peer) -> None:
    script = "import os\nprint([f for f in os.listdir('/proc/self/fd') if int(f) > 2])"
    child = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert len(child.stdout.split(",")) == 1  # the folder that it reads
