"""Puts: which store they go to, what they consist of, and what becomes of them when nobody takes them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store.tiers import StoredBlock
from protocol.errors import InvalidParameter, NodeLost
from protocol.ids import BlockHash, Incarnation
from protocol.kv_blocks import CachedBlock, Tenant, chain
from protocol.store import MAX_PUT_BLOCKS, MAX_PUT_S, StorePut, StorePutDone
from protocol.transfer import KVSource
from runtime.clock import ManualClock
from store_node.kept_blocks import REMEMBER_S
from store_node.placement import store_for
from store_node.put_lane import MIN_PUT_S, PutLane
from store_node.put_queue import MAX_WAITING_BLOCKS, PutQueue
from store_node.put_receiver import check_chain, missing_runs
from store_node.waiting_blocks import WaitingBlocks

ROOT = BlockHash(b"r" * 16)


def blocks(name: int, count: int, first: int = 0) -> list[CachedBlock]:
    hashes = [BlockHash(bytes([name, position // 256, position % 256]) + b"." * 13) for position in range(count)]
    return chain(ROOT, hashes)[first:]


class Stores:
    """The RpcClient of a node whose stores answer, or do not. They keep `room` blocks more."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.puts: list[tuple[str, list[int]]] = []
        self.dead: set[str] = set()
        self.silent: set[str] = set()
        self.room = room
        self.kept: set[bytes] = set()
        self.incarnation = "first"

    async def call(self, url: str, message: StorePut, _reply: type, _timeout_s: float) -> StorePutDone:
        store = url.removesuffix("/store/put")
        if store in self.silent:
            await asyncio.Event().wait()
        if store in self.dead:
            raise NodeLost("nobody there")
        self.puts.append((url, [block.position for block in message.blocks]))
        new = [block.block_hash for block in message.blocks if block.block_hash not in self.kept][: self.room]
        self.kept.update(new)
        self.room -= len(new)
        return StorePutDone(
            len(new), tuple(block.block_hash in self.kept for block in message.blocks), self.incarnation
        )

    def restart(self) -> None:
        self.kept.clear()
        self.incarnation = "second"


def queue_to(
    stores: Stores, *urls: str, clock: ManualClock | None = None, lives: dict[str, Incarnation | None] | None = None
) -> PutQueue:
    known = dict.fromkeys(urls) if lives is None else lives
    return PutQueue(stores, source, lambda: known, clock or ManualClock(), 1 << 20)  # type: ignore[arg-type]  # a fake


@contextlib.asynccontextmanager
async def running(queue: PutQueue) -> AsyncIterator[None]:
    task = asyncio.create_task(queue.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def source(num_blocks: int) -> KVSource:
    return KVSource(worker="d0", incarnation="i", control_url="http://127.0.0.1:1", num_blocks=num_blocks)


def stored(held: Sequence[CachedBlock]) -> list[StoredBlock]:
    return [StoredBlock(block, "host", slot, 1) for slot, block in enumerate(held)]


async def settle(queue: PutQueue) -> None:
    async with asyncio.timeout(5):
        await asyncio.sleep(0.05)
        while queue.stats().num_waiting:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("order", ["heads first", "tails first", "in pieces"])
async def test_a_chain_goes_to_one_store_in_whatever_order_it_comes(order: str) -> None:
    stores = Stores()
    queue = queue_to(stores, "http://a", "http://b", "http://c")
    whole = blocks(1, 40)
    pieces = [whole[:20], whole[20:]] if order == "heads first" else [whole[20:], whole[:20]]
    async with running(queue):
        for piece in pieces:
            queue.stored(stored(piece))
            if order != "in pieces":
                await settle(queue)
        await settle(queue)
    assert len({url for url, _ in stores.puts}) == 1
    assert sorted(position for _, positions in stores.puts for position in positions) == list(range(40))
    assert all(positions == sorted(positions) for _, positions in stores.puts), "in chain order"
    assert queue.stats().num_put == 40


async def put_again(queue: PutQueue, name: int = 1) -> None:
    queue.stored(stored(blocks(name, 10)))
    await settle(queue)


async def test_what_is_kept_is_not_put_again_for_a_while() -> None:
    stores, clock = Stores(), ManualClock()
    queue = queue_to(stores, "http://a", clock=clock)
    async with running(queue):
        for _ in range(3):
            await put_again(queue)
        assert len(stores.puts) == 1
        clock.advance(REMEMBER_S + 1)
        stores.kept.clear()  # by eviction, or because somebody wanted it so
        await put_again(queue)
    assert len(stores.puts) == 2
    assert len(stores.kept) == 10


async def test_what_a_store_had_no_room_for_is_put_again() -> None:
    stores = Stores(room=4)
    queue = queue_to(stores, "http://a")
    async with running(queue):
        await put_again(queue)
        assert (queue.stats().num_put, queue.stats().num_refused) == (4, 6)
        stores.room = 10
        await put_again(queue)
        assert stores.puts[1][1] == list(range(4, 10))
        assert len(stores.kept) == 10
        await put_again(queue)
    assert len(stores.puts) == 2


@pytest.mark.parametrize("told_by", ["the index", "its answer", "its end"])
async def test_a_store_that_has_restarted_is_offered_everything_again(told_by: str) -> None:
    stores, lives = Stores(), dict[str, Incarnation | None]({"http://a": None})
    queue = queue_to(stores, lives=lives)
    async with running(queue):
        await put_again(queue)
        stores.restart()
        if told_by == "the index":
            lives["http://a"] = Incarnation("second")
        elif told_by == "its answer":
            await put_again(queue, 2)
        else:
            lives["http://b"] = lives.pop("http://a")
        await put_again(queue)
    assert {block.block_hash for block in blocks(1, 10)} <= stores.kept


async def test_a_store_that_fails_is_left_alone_and_its_share_goes_elsewhere() -> None:
    stores, clock = Stores(), ManualClock()
    queue = queue_to(stores, "http://a", clock=clock)
    async with running(queue):
        stores.dead.add("http://a")
        await put_again(queue, 1)
        stores.dead.clear()
        await put_again(queue, 2)
        assert not stores.puts
        assert queue.stats().num_dropped == 20
        clock.advance(2.0)
        await put_again(queue, 3)
    assert len(stores.puts) == 1


async def test_a_silent_store_holds_up_nobody_elses_puts() -> None:
    stores = Stores()
    stores.silent.add("http://silent")
    queue = queue_to(stores, "http://silent", "http://good")
    async with running(queue):
        for name in range(1, 41):
            queue.stored(stored(blocks(name, 8)))
        share = [name for name in range(1, 41) if _store_of(blocks(name, 8)) == "http://good"]
        assert 0 < len(share) < 40
        async with asyncio.timeout(10):
            while len(stores.puts) < len(share):
                await asyncio.sleep(0.01)
    assert queue.stats().num_waiting == (40 - len(share)) * 8


async def test_what_waits_for_a_store_that_fails_goes_to_the_others() -> None:
    stores = Stores()
    stores.dead.add("http://dead")
    queue = queue_to(stores, "http://dead", "http://good")
    async with running(queue):
        for name in range(1, 41):
            queue.stored(stored(blocks(name, 8)))
        await settle(queue)
    assert len(stores.kept) + queue.stats().num_dropped == 40 * 8
    assert queue.stats().num_dropped == 8, "the one that it failed with"


def _store_of(whole: Sequence[CachedBlock]) -> str | None:
    return store_for(whole[0].block_hash, ["http://silent", "http://good"])


async def test_the_queue_is_bounded_and_no_put_is_too_large() -> None:
    stores = Stores()
    queue = queue_to(stores, "http://a")
    for name in range(5):
        queue.stored(stored(blocks(name, MAX_WAITING_BLOCKS // 4)))
    await asyncio.sleep(0.01)
    assert queue.stats().num_waiting == MAX_WAITING_BLOCKS
    assert queue.stats().num_dropped == MAX_WAITING_BLOCKS // 4
    async with running(queue):
        await settle(queue)
    assert max(len(positions) for _, positions in stores.puts) == MAX_PUT_BLOCKS
    assert len(stores.kept) == MAX_WAITING_BLOCKS


def test_patience_follows_what_was_measured() -> None:
    lane = PutLane("http://a", 1 << 20)
    assert MIN_PUT_S < lane.patience_s(1) < lane.patience_s(256) < MAX_PUT_S
    at_first = lane.patience_s(256)
    lane.answered(256, 0.05)
    assert lane.patience_s(256) < at_first
    assert lane.is_open(0.0)
    assert lane.failed(0.0, 8.0) is not None
    assert not lane.is_open(0.5)
    assert lane.patience_s(256) > at_first, "it looks slower than it did"
    assert lane.failed(2.0, 20.0) is None, "nobody wants to hear of it again"
    assert not lane.is_open(3.5)
    assert lane.patience_s(256) <= MAX_PUT_S


@given(st.permutations(range(12)), st.integers(1, 6), st.integers(0, 11))
def test_waiting_blocks_leave_as_chains(order: list[int], max_blocks: int, fork_at: int) -> None:
    trunk = blocks(1, 8)
    fork = chain(BlockHash(trunk[fork_at % 8].block_hash), [BlockHash(bytes([i + 1]) * 16) for i in range(4)])
    branch = [CachedBlock(b.block_hash, b.parent, fork_at % 8 + 1 + i) for i, b in enumerate(fork)]
    coming = [(trunk + branch)[i] for i in order]
    waiting = WaitingBlocks()
    waiting.add(coming)
    taken: list[CachedBlock] = []
    while waiting:
        oldest = next(block for block in coming if block not in taken)
        batch = waiting.take_chain(max_blocks)
        assert 1 <= len(batch) <= max_blocks
        assert oldest in batch
        check_chain(batch)
        taken += batch
    assert sorted(block.block_hash for block in taken) == sorted(block.block_hash for block in coming)
    waiting.add(taken)
    assert waiting.take_all() == taken
    assert not waiting


def test_only_its_own_share_moves_when_a_store_goes() -> None:
    chains = [bytes([number]) * 16 for number in range(200)]
    three = {name: store_for(name, ["a", "b", "c"]) for name in chains}
    two = {name: store_for(name, ["a", "b"]) for name in chains}
    assert set(three.values()) == {"a", "b", "c"}
    assert all(two[name] == store for name, store in three.items() if store != "c")
    assert store_for(b"x", []) is None


def test_only_chains_are_taken() -> None:
    whole = blocks(1, 4)
    check_chain(whole)
    other = CachedBlock(whole[2].block_hash, whole[2].parent, 2, Tenant("0123456789ab"))
    for wrong in ([whole[0], whole[2]], [whole[1], whole[0]], [*whole[:2], other]):
        with pytest.raises(InvalidParameter, match="block"):
            check_chain(wrong)


@given(st.lists(st.booleans(), max_size=12))
def test_runs_are_what_is_missing_and_have_no_gaps(wanted: list[bool]) -> None:
    whole = blocks(1, len(wanted))
    runs = missing_runs(whole, wanted)
    assert [block for run in runs for block in run] == [
        b for b, is_wanted in zip(whole, wanted, strict=True) if is_wanted
    ]
    for run in runs:
        check_chain(run)
