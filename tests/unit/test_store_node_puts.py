"""Puts: which store they go to, what they consist of, and what becomes of them when nobody takes them."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store.tiers import StoredBlock
from protocol.errors import InvalidParameter, NodeLost
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, Tenant, chain
from protocol.store import MAX_PUT_BLOCKS, StorePut, StorePutDone
from protocol.transfer import KVSource
from runtime.clock import ManualClock
from store_node.placement import store_for
from store_node.put_queue import MAX_WAITING_BLOCKS, PutQueue
from store_node.put_receiver import check_chain, missing_runs

ROOT = BlockHash(b"r" * 16)


def blocks(name: int, count: int, first: int = 0) -> list[CachedBlock]:
    hashes = [BlockHash(bytes([name, position // 256, position % 256]) + b"." * 13) for position in range(count)]
    return chain(ROOT, hashes)[first:]


class Stores:
    """The RpcClient of a node whose stores answer, or do not."""

    def __init__(self) -> None:
        self.puts: list[tuple[str, list[int]]] = []
        self.dead: set[str] = set()
        self.room = MAX_PUT_BLOCKS

    async def call(self, url: str, message: StorePut, _reply: type, _timeout_s: float) -> StorePutDone:
        if url.removesuffix("/store/put") in self.dead:
            raise NodeLost("nobody there")
        self.puts.append((url, [block.position for block in message.blocks]))
        return StorePutDone(min(self.room, len(message.blocks)))


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
    stores, clock = Stores(), ManualClock()
    queue = PutQueue(stores, source, lambda: ["http://a", "http://b", "http://c"], clock)  # type: ignore[arg-type]  # a fake
    running = asyncio.create_task(queue.run())
    whole = blocks(1, 40)
    pieces = [whole[:20], whole[20:]] if order == "heads first" else [whole[20:], whole[:20]]
    for piece in pieces:
        queue.stored(stored(piece))
        if order != "in pieces":
            await settle(queue)
    await settle(queue)
    running.cancel()
    assert len({url for url, _ in stores.puts}) == 1
    assert sorted(position for _, positions in stores.puts for position in positions) == list(range(40))
    assert all(positions == sorted(positions) for _, positions in stores.puts), "in chain order"
    assert queue.stats().num_put == 40


async def test_what_was_put_is_not_put_again() -> None:
    stores = Stores()
    queue = PutQueue(stores, source, lambda: ["http://a"], ManualClock())  # type: ignore[arg-type]  # a fake
    running = asyncio.create_task(queue.run())
    for _ in range(3):
        queue.stored(stored(blocks(1, 10)))
        await settle(queue)
    running.cancel()
    assert len(stores.puts) == 1


async def test_what_a_store_may_lack_is_put_again() -> None:
    """Because it had gone before the store came for it, or has gone since."""
    stores = Stores()
    queue = PutQueue(stores, source, lambda: ["http://a"], ManualClock())  # type: ignore[arg-type]  # a fake
    running = asyncio.create_task(queue.run())
    whole = blocks(1, 8)
    for room, gone in ((3, False), (MAX_PUT_BLOCKS, True), (MAX_PUT_BLOCKS, False), (MAX_PUT_BLOCKS, False)):
        stores.room = room
        queue.stored(stored(whole))
        await settle(queue)
        if gone:
            queue.removed(stored(whole))
    running.cancel()
    assert len(stores.puts) == 3


async def test_a_store_that_fails_is_left_alone_and_its_share_goes_elsewhere() -> None:
    stores, clock = Stores(), ManualClock()
    queue = PutQueue(stores, source, lambda: ["http://a"], clock)  # type: ignore[arg-type]  # a fake
    running = asyncio.create_task(queue.run())
    stores.dead.add("http://a")
    queue.stored(stored(blocks(1, 4)))
    await settle(queue)
    stores.dead.clear()
    queue.stored(stored(blocks(2, 4)))
    await settle(queue)
    assert not stores.puts
    assert queue.stats().num_dropped == 8
    clock.advance(2.0)
    queue.stored(stored(blocks(3, 4)))
    await settle(queue)
    running.cancel()
    assert len(stores.puts) == 1


async def test_the_queue_is_bounded_and_no_put_is_too_large() -> None:
    stores = Stores()
    queue = PutQueue(stores, source, lambda: ["http://a"], ManualClock())  # type: ignore[arg-type]  # a fake
    for name in range(5):
        queue.stored(stored(blocks(name, MAX_WAITING_BLOCKS // 4)))
    await asyncio.sleep(0.01)
    assert queue.stats().num_waiting == MAX_WAITING_BLOCKS
    assert queue.stats().num_dropped == MAX_WAITING_BLOCKS // 4
    running = asyncio.create_task(queue.run())
    await settle(queue)
    running.cancel()
    assert max(len(positions) for _, positions in stores.puts) == MAX_PUT_BLOCKS


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
