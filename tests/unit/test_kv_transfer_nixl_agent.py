"""The NIXL agent's promises, against a library that does what the test says: a transfer ends when its last chunk has, a
large one does not keep a small one waiting, and a lost connection is given up when nothing uses it any more."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kv_transfer.transports.nixl import agent as nixl_agent
from kv_transfer.transports.nixl.agent import NixlAgent
from kv_transfer.transports.nixl.blocks import NixlBlocks
from kv_transfer.transports.nixl.transfer import NixlPeer, NixlTransfer, plan_copy
from protocol.errors import PeerLost, TransferError

BLOCKS = NixlBlocks("DRAM", 0, address=1 << 32, block_bytes=4096, num_blocks=64)


class RemoteDisconnectError(Exception):
    pass


class InvalidParamError(Exception):
    pass


BINDINGS = SimpleNamespace(
    nixlRemoteDisconnectError=RemoteDisconnectError,
    nixlNotFoundError=KeyError,
    nixlBackendError=OSError,
    nixlInvalidParamError=InvalidParamError,
)


class Handle:
    def __init__(self, local: list[int]) -> None:
        self.local = local
        self.released = False

    def release(self) -> None:
        self.released = True


class FakeLibrary:
    """`fate` tells by a chunk's first local block what its next look shows: "PROC", "DONE" or an error to raise."""

    def __init__(self) -> None:
        self.fate: dict[int, str | Exception] = {}
        self.posted: list[list[int]] = []
        self.handles: list[Handle] = []
        self.known: list[str] = []

    def register_memory(self, *_: object) -> None:
        pass

    def prep_xfer_dlist(self, *_: object) -> Handle:
        return Handle([])

    def add_remote_agent(self, metadata: bytes) -> bytes:
        self.known.append(metadata.decode(errors="replace"))
        return metadata

    def remove_remote_agent(self, name: str | bytes) -> None:
        self.known.remove(name if isinstance(name, str) else name.decode(errors="replace"))

    def get_new_notifs(self) -> None:
        pass

    def make_prepped_xfer(self, _operation: str, _ours: object, local: Any, _theirs: object, _remote: object) -> Handle:
        handle = Handle(local.tolist())
        self.handles.append(handle)
        return handle

    def transfer(self, handle: Handle) -> str:
        self.posted.append(handle.local)
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: Handle) -> str:
        assert not handle.released
        fate = self.fate.get(handle.local[0], "DONE")
        if isinstance(fate, Exception):
            raise fate
        return fate


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setattr(nixl_agent, "make_agent", lambda *_, **__: fake)
    return fake


@pytest.fixture
async def agent(library: FakeLibrary) -> AsyncIterator[NixlAgent]:
    made = NixlAgent(cast("Any", SimpleNamespace(nixlBind=BINDINGS)), "here", BLOCKS, keep_alive=None)
    yield made
    library.fate.clear()
    await made.close()


def begin(agent: NixlAgent, peer: NixlPeer, block_ids: range) -> NixlTransfer:
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    transfer = NixlTransfer("READ", peer, plan_copy(block_ids, block_ids, 1), 1, ended)
    agent.start(transfer)
    return transfer


async def meet(agent: NixlAgent, name: str = "there") -> NixlPeer:
    return await agent.add_peer(name, name.encode(), BLOCKS)


async def posted(library: FakeLibrary, num_chunks: int) -> None:
    async with asyncio.timeout(5):
        while len(library.posted) < num_chunks:
            await asyncio.sleep(0.001)


async def test_a_failed_transfer_ends_when_its_other_chunk_has(agent: NixlAgent, library: FakeLibrary) -> None:
    library.fate = {0: "PROC", 1: InvalidParamError("no")}
    transfer = begin(agent, await meet(agent), range(8))
    await posted(library, 2)
    await asyncio.sleep(0.05)
    assert not transfer.ended.done()
    library.fate[0] = "DONE"
    with pytest.raises(TransferError, match="refused to read"):
        await transfer.ended
    assert library.posted == [[0], [1]]
    assert all(handle.released for handle in library.handles)


async def test_a_small_transfer_does_not_wait_for_a_large_one(agent: NixlAgent, library: FakeLibrary) -> None:
    peer = await meet(agent)
    library.fate = {0: "PROC", 1: "PROC"}
    large = begin(agent, peer, range(40))
    await posted(library, 2)
    small = begin(agent, peer, range(50, 52))
    await small.ended
    assert not large.ended.done()
    library.fate.clear()
    await large.ended
    assert sorted(library.posted) == [[index] for index in (*range(40), 50, 51)]


async def test_a_lost_peer_ends_what_has_not_begun_and_is_forgotten_before_it_is_met_again(
    agent: NixlAgent, library: FakeLibrary
) -> None:
    peer = await meet(agent)
    library.fate = {0: RemoteDisconnectError("gone"), 10: "PROC"}
    stuck = begin(agent, peer, range(10, 11))
    await posted(library, 1)
    with pytest.raises(PeerLost):
        await begin(agent, peer, range(4)).ended
    with pytest.raises(PeerLost):
        await begin(agent, peer, range(20, 24)).ended
    assert library.posted == [[10], [0]]
    with pytest.raises(PeerLost, match="not ended"):
        await meet(agent)
    library.fate[10] = RemoteDisconnectError("gone")
    with pytest.raises(PeerLost):
        await stuck.ended
    assert await meet(agent) is not peer
    assert library.known == ["there"]


async def test_an_abandoned_transfer_ends_in_its_own_time_and_holds_its_peer_until_then(
    agent: NixlAgent, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_agent, "MAX_UNUSED_PEERS", 0)
    peer = await meet(agent)
    library.fate = {0: "PROC"}
    transfer = begin(agent, peer, range(1))
    await posted(library, 1)
    transfer.abandoned = True
    await agent.drop_peer(peer)
    assert library.known == ["there"]
    library.fate.clear()
    await transfer.ended
    async with asyncio.timeout(5):
        while library.known:
            await asyncio.sleep(0.001)


async def test_peers_without_a_link_are_kept_for_the_next_one_up_to_a_number(
    agent: NixlAgent, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_agent, "MAX_UNUSED_PEERS", 2)
    in_use = await meet(agent, "in use")
    for name in ("first", "second", "first", "third"):
        await agent.drop_peer(await meet(agent, name))
    assert library.known == ["in use", "first", "third"]
    await begin(agent, await meet(agent, "third"), range(2)).ended
    await begin(agent, in_use, range(2)).ended


async def test_metadata_of_another_name_is_refused_and_leaves_the_right_one_alone(
    agent: NixlAgent, library: FakeLibrary
) -> None:
    peer = await meet(agent, "honest")
    for metadata in (b"honest", b"nobody"):
        with pytest.raises(TransferError):
            await agent.add_peer("liar", metadata, BLOCKS)
    await begin(agent, peer, range(2)).ended
    assert "nobody" not in library.known
    assert "honest" in library.known


async def test_a_name_that_is_no_text_is_refused_and_harms_nothing(agent: NixlAgent, library: FakeLibrary) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(TransferError, match="is of"):
            await agent.add_peer("liar", b"\xff\xfe", BLOCKS)
        assert library.known == []
        await begin(agent, await meet(agent), range(2)).ended


async def test_an_error_that_nobody_foresaw_costs_the_call(
    agent: NixlAgent, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(5):
        with monkeypatch.context() as patch:
            patch.setattr(library, "add_remote_agent", lambda _: 1 // 0)
            with pytest.raises(TransferError, match="log"):
                await meet(agent)
        await begin(agent, await meet(agent), range(2)).ended


async def test_an_agent_that_fails_refuses_everything_and_keeps_what_may_still_move(
    agent: NixlAgent, library: FakeLibrary
) -> None:
    peer = await meet(agent)
    library.fate = {0: "PROC"}
    moving = begin(agent, peer, range(1))
    await posted(library, 1)
    library.fate[20] = RuntimeError("never seen before")
    async with asyncio.timeout(5):
        failing, waiting = begin(agent, peer, range(20, 22)), begin(agent, peer, range(30, 31))
        with pytest.raises(PeerLost, match="log"):
            await waiting.ended
        with pytest.raises(PeerLost, match="log"):
            await begin(agent, peer, range(40, 41)).ended
        with pytest.raises(PeerLost, match="log"):
            await meet(agent, "another")
    assert not moving.ended.done()
    assert not failing.ended.done()
    assert not any(handle.released for handle in library.handles)
