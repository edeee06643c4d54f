"""DeviceStaging over a fake device: bounded, in order, and never touching what a copy still works on."""

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from fake_device import FakeDevice

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.device_staging import DeviceStaging
from protocol.checksum import checksum

NUM_WIRE_BLOCKS = 8
NUM_BLOCKS = 32


class Node:
    def __init__(self, delay_s: float = 0.0) -> None:
        self.arena = HostArena(NUM_WIRE_BLOCKS, 64)
        wire = self.arena.tensor().view(NUM_WIRE_BLOCKS, 64).numpy()
        self.device = FakeDevice(np.zeros((NUM_BLOCKS, 64), np.uint8), wire, delay_s)
        self.device.fill(1)
        self.staging = DeviceStaging(self.device, self.arena)

    def wire(self, wire_id: int) -> bytes:
        return bytes(self.arena.block(wire_id))

    def at_rest(self) -> bool:
        return self.staging.num_free == NUM_WIRE_BLOCKS and self.device.num_under_way == 0


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    made = Node()
    yield made
    made.device.gate.set()
    await made.staging.close()
    assert made.at_rest()
    made.arena.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_staged_blocks_are_copies_with_the_device_s_checksums(node: Node) -> None:
    staged = await node.staging.stage([9, 3])
    assert [node.wire(wire_id) for wire_id in staged.wire_ids] == [node.device.block(9), node.device.block(3)]
    assert staged.checksums == (checksum(node.device.block(9)), checksum(node.device.block(3)))
    node.staging.unstage(staged.wire_ids)


async def test_what_lands_comes_to_the_device(node: Node) -> None:
    wire_ids = await node.staging.reserve([20, 21])
    for wire_id in wire_ids:
        node.arena.block(wire_id)[:] = bytes([wire_id + 1]) * 64
    sums = [checksum(node.wire(wire_id)) for wire_id in wire_ids]
    assert await node.staging.land(wire_ids, [20, 21], sums) == 2
    assert [node.device.block(block_id) for block_id in (20, 21)] == [bytes([w + 1]) * 64 for w in wire_ids]


async def test_damage_is_counted_and_the_wire_blocks_come_back(node: Node) -> None:
    wire_ids = await node.staging.reserve([20, 21])
    sums = [checksum(node.wire(wire_ids[0])), 12345]
    assert await node.staging.land(wire_ids, [20, 21], sums) == 1
    assert node.at_rest()


async def test_without_room_the_owner_waits_and_order_is_kept(node: Node) -> None:
    held = [await node.staging.stage([2 * i, 2 * i + 1]) for i in range(3)]
    ended: list[int] = []

    async def stage(number: int, count: int) -> tuple[int, ...]:
        staged = await node.staging.stage(range(10, 10 + count))
        ended.append(number)
        return staged.wire_ids

    waiting = [asyncio.create_task(stage(number, count)) for number, count in enumerate([2, 1, 1])]
    await asyncio.sleep(0.02)
    assert ended == []
    node.staging.unstage(held[1].wire_ids[:1])
    await asyncio.sleep(0.02)
    assert ended == [], "the small ones do not overtake the one that waits"
    node.staging.unstage(held[0].wire_ids)
    node.staging.unstage(held[1].wire_ids[1:])
    for wire_ids in await asyncio.gather(*waiting):
        node.staging.unstage(wire_ids)
    node.staging.unstage(held[2].wire_ids)
    assert ended == [0, 1, 2]


async def test_an_owner_that_waits_does_not_keep_a_reader_from_its_share(node: Node) -> None:
    held = [await node.staging.stage([2 * i, 2 * i + 1]) for i in range(3)]
    waiting = asyncio.create_task(node.staging.stage([30]))
    async with asyncio.timeout(5):
        node.staging.discard(await node.staging.reserve([6, 7]))
    assert not waiting.done()
    for staged in held:
        node.staging.unstage(staged.wire_ids)
    node.staging.unstage((await waiting).wire_ids)


async def test_more_blocks_than_there_is_room_for_stream_through(node: Node) -> None:
    """One context of four times the staging memory, there and back, piece by piece."""
    expected = [node.device.block(block_id) for block_id in range(16)]
    for start in range(0, 16, node.staging.max_blocks):
        ids = list(range(start, start + node.staging.max_blocks))
        staged = await node.staging.stage(ids)
        wire_ids = await node.staging.reserve([block_id + 16 for block_id in ids])
        for theirs, ours in zip(staged.wire_ids, wire_ids, strict=True):
            node.arena.block(ours)[:] = node.arena.block(theirs)
        assert await node.staging.land(wire_ids, [block_id + 16 for block_id in ids], staged.checksums) == len(ids)
        node.staging.unstage(staged.wire_ids)
    assert [node.device.block(block_id) for block_id in range(16, 32)] == expected


async def test_whoever_gives_up_waiting_holds_nothing(node: Node) -> None:
    held = [await node.staging.stage([2 * i, 2 * i + 1]) for i in range(3)]
    impatient = [asyncio.create_task(node.staging.stage([30, 31])) for _ in range(3)]
    await asyncio.sleep(0.01)
    for task in impatient:
        task.cancel()
    assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*impatient, return_exceptions=True))
    for staged in held:
        node.staging.unstage(staged.wire_ids)
    node.staging.unstage((await node.staging.stage([0])).wire_ids)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancel_is_obeyed_when_the_copy_has_ended(node: Node, times: int) -> None:
    node.device.gate.clear()
    wire_ids = await node.staging.reserve([5])
    sums = [checksum(node.wire(wire_ids[0]))]
    tasks = [
        asyncio.create_task(node.staging.stage([0, 1])),
        asyncio.create_task(node.staging.land(wire_ids, [5], sums)),
    ]
    await until(lambda: node.device.num_under_way == 2)
    for _ in range(times):
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0.005)
    assert not any(task.done() for task in tasks)
    assert node.staging.num_free == NUM_WIRE_BLOCKS - 3
    node.device.gate.set()
    assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True))
    assert node.at_rest()


async def test_a_device_that_fails_keeps_no_wire_blocks(node: Node) -> None:
    node.device.fail = RuntimeError("the device is lost")
    with pytest.raises(RuntimeError, match="lost"):
        await node.staging.stage([1])
    wire_ids = await node.staging.reserve([2])
    with pytest.raises(RuntimeError, match="lost"):
        await node.staging.land(wire_ids, [2], [0])
    node.device.fail = None


async def test_both_directions_at_once_end_and_come_back() -> None:
    """Owners and readers of one node, each with more than fits, with copies that take their time."""
    node = Node(delay_s=0.0005)

    async def lend(first: int) -> None:
        for _ in range(4):
            staged = await node.staging.stage([first, first + 1])
            await asyncio.sleep(0)
            node.staging.unstage(staged.wire_ids)

    async def read(block_id: int) -> None:
        for _ in range(4):
            wire_ids = await node.staging.reserve([block_id])
            await asyncio.sleep(0)
            node.arena.block(wire_ids[0])[:] = bytes([block_id]) * 64
            assert await node.staging.land(wire_ids, [block_id], [checksum(bytes([block_id]) * 64)]) == 1

    async with asyncio.timeout(10):
        await asyncio.gather(*(lend(2 * i) for i in range(6)), *(read(16 + i) for i in range(12)))
    await node.staging.close()
    assert node.at_rest()
    assert all(node.device.block(16 + i) == bytes([16 + i]) * 64 for i in range(12))
    node.arena.close()
