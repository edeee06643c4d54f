"""How a NIXL transfer is planned and cut: each block moves once, to its place, in as few pieces as there are runs."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.transports.nixl.blocks import NixlBlocks
from kv_transfer.transports.nixl.transfer import CHUNKS_IN_FLIGHT, NixlPeer, NixlTransfer, Operation, plan_copy
from kv_transfer.transports.plan import coalesce
from protocol.errors import PeerLost, TransferError

BLOCKS = NixlBlocks("DRAM", 0, address=1 << 32, block_bytes=4096, num_blocks=64)

ids = st.integers(0, 63)
pairs = st.lists(st.tuples(ids, ids), max_size=40, unique_by=lambda pair: pair[1])
runs = st.builds(
    lambda starts: [(s + i, d + i) for s, d, n in starts for i in range(n)],
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 12)), max_size=1),
)


def started(operation: Operation, sources: list[int], destinations: list[int], chunk_blocks: int) -> NixlTransfer:
    plan = plan_copy(sources, destinations, chunk_blocks)
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    return NixlTransfer(operation, NixlPeer("peer", b"", BLOCKS), plan, chunk_blocks, ended)


@given(st.one_of(pairs, runs))
def test_each_pair_is_planned_once_in_no_more_pieces_than_there_are_runs(moves: list[tuple[int, int]]) -> None:
    sources, destinations = [source for source, _ in moves], [destination for _, destination in moves]
    plan = plan_copy(sources, destinations, chunk_blocks=1000)
    assert sorted(zip(plan.sources.tolist(), plan.destinations.tolist(), strict=True)) == sorted(moves)
    assert plan.num_pieces <= len(coalesce(sources, destinations)), "fewer where one block goes to several places"


def test_a_chunk_ends_a_piece() -> None:
    assert plan_copy(range(10), range(20, 30), chunk_blocks=4).num_pieces == 3
    assert plan_copy(range(8), range(20, 28), chunk_blocks=4).num_pieces == 2
    assert plan_copy([], [], chunk_blocks=4).num_pieces == 0


def test_one_source_may_go_to_two_places_but_not_two_to_one() -> None:
    assert plan_copy([5, 5], [1, 2], chunk_blocks=4).num_pieces == 2
    with pytest.raises(TransferError, match="same place"):
        plan_copy([1, 2], [5, 5], chunk_blocks=4)
    with pytest.raises(TransferError, match="2 blocks"):
        plan_copy([1, 2], [5], chunk_blocks=4)


@pytest.mark.parametrize("operation", ["READ", "WRITE"])
async def test_chunks_are_local_and_remote_whoever_is_the_source(operation: Operation) -> None:
    transfer = started(operation, [1, 2, 3], [7, 8, 30], chunk_blocks=2)
    local, remote = transfer.next_chunk()
    ours, theirs = ([7, 8], [1, 2]) if operation == "READ" else ([1, 2], [7, 8])
    assert (local.tolist(), remote.tolist()) == (ours, theirs)
    assert transfer.may_post
    transfer.next_chunk()
    assert not transfer.may_post
    assert transfer.over
    assert transfer.outcome() is None


async def test_only_so_many_chunks_are_in_flight_at_once() -> None:
    transfer = started("READ", list(range(10)), list(range(10)), chunk_blocks=1)
    for _ in range(CHUNKS_IN_FLIGHT):
        assert transfer.may_post
        transfer.next_chunk()
        transfer.in_flight.append(object())
    assert not transfer.may_post
    transfer.in_flight.pop()
    assert transfer.may_post


async def test_a_transfer_given_up_is_over_when_its_last_chunk_is() -> None:
    transfer = started("READ", list(range(10)), list(range(10)), chunk_blocks=1)
    transfer.next_chunk()
    transfer.in_flight.append(object())
    transfer.abandoned = True
    assert not transfer.may_post
    assert not transfer.over
    transfer.in_flight.clear()
    assert transfer.over
    assert isinstance(transfer.outcome(), PeerLost)


def test_rows_and_region_cover_the_arena() -> None:
    rows = BLOCKS.rows()
    assert rows.shape == (64, 3)
    assert rows[0].tolist() == [1 << 32, 4096, 0]
    assert rows[63].tolist() == [(1 << 32) + 63 * 4096, 4096, 0]
    assert BLOCKS.region == (1 << 32, 64 * 4096, 0, "")
    on_gpu = NixlBlocks("VRAM", 3, address=1 << 40, block_bytes=4096, num_blocks=2)
    assert on_gpu.rows()[:, 2].tolist() == [3, 3]
    assert on_gpu.region[2] == 3
