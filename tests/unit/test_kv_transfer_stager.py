"""Stager: what is announced when, and what is given back, for staging memory that is scarce and for what is not."""

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from kv_transfer.arena import HostArena
from kv_transfer.checksum import checksums
from kv_transfer.device_staging import DeviceStaging
from kv_transfer.stager import Stager
from kv_transfer.staging import HostStaging, StagedBlocks, Staging
from tests.support.fake_device import FakeDevice

NUM_WIRE_BLOCKS = 8


class Heard:
    def __init__(self, staging: Staging) -> None:
        self.wire: dict[int, int] = {}
        self.sums: dict[int, int] = {}
        self.errors: list[Exception] = []
        self.stager = Stager(staging, self._announce, self.errors.append)

    def _announce(self, first_block: int, staged: StagedBlocks) -> None:
        assert not self.wire or first_block == max(self.wire) + 1
        self.wire.update(enumerate(staged.wire_ids, first_block))
        self.sums.update(enumerate(staged.checksums, first_block))

    async def read_all(self, num_blocks: int) -> None:
        """Take what is announced as soon as it is, until it was all."""
        while (landed := len(self.wire)) < num_blocks:
            self.stager.landed(landed)
            await asyncio.sleep(0.001)

    def forget(self) -> None:
        self.wire, self.sums = {}, {}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def scarce() -> AsyncIterator[DeviceStaging]:
    with HostArena(NUM_WIRE_BLOCKS, 64) as arena:
        memory = np.random.default_rng(1).integers(0, 256, (64, 64), np.uint8)
        staging = DeviceStaging(FakeDevice(memory, arena.tensor().view(NUM_WIRE_BLOCKS, 64).numpy()), arena)
        yield staging
        await staging.close()
        assert staging.num_free == NUM_WIRE_BLOCKS


async def test_in_place_blocks_are_staged_as_they_are_final_and_nothing_is_given_back() -> None:
    with HostArena(8, 64) as arena:
        staging = HostStaging(arena)
        heard = Heard(staging)
        heard.stager.publish([5, 2])
        heard.stager.publish([7])
        await until(lambda: len(heard.wire) == 3)
        heard.stager.attach(1)
        assert heard.stager.landed(2) == heard.stager.detach() == ()
        assert heard.wire == {0: 5, 1: 2, 2: 7}
        assert tuple(heard.sums.values()) == checksums(arena, [5, 2, 7])
        heard.stager.end()
        await staging.close()


async def test_scarce_blocks_wait_for_a_reader_and_begin_where_it_does(scarce: DeviceStaging) -> None:
    heard = Heard(scarce)
    heard.stager.publish(range(10, 14))
    await asyncio.sleep(0.01)
    assert heard.wire == {}
    heard.stager.attach(3)
    heard.stager.publish([14])
    await until(lambda: len(heard.wire) == 2)
    assert list(heard.wire) == [3, 4]
    heard.stager.end()


async def test_a_context_larger_than_the_staging_memory_streams_through(scarce: DeviceStaging) -> None:
    heard = Heard(scarce)
    heard.stager.attach(0)
    heard.stager.publish(range(40))
    async with asyncio.timeout(5):
        await heard.read_all(40)
    assert list(heard.wire) == list(range(40))
    heard.stager.end()


async def test_what_has_landed_is_given_back_once(scarce: DeviceStaging) -> None:
    heard = Heard(scarce)
    heard.stager.attach(0)
    heard.stager.publish(range(4))
    await until(lambda: len(heard.wire) == 4)
    assert heard.stager.landed(3) == tuple(heard.wire[place] for place in range(3))
    assert heard.stager.landed(3) == heard.stager.landed(1) == ()
    assert heard.stager.detach() == (heard.wire[3],)
    heard.stager.end()


async def test_a_reader_that_comes_back_begins_anew(scarce: DeviceStaging) -> None:
    heard = Heard(scarce)
    heard.stager.attach(0)
    heard.stager.publish(range(20))
    await until(lambda: len(heard.wire) == 6)
    heard.stager.detach()
    heard.forget()
    heard.stager.attach(4)
    await until(lambda: len(heard.wire) == 6)
    assert list(heard.wire) == list(range(4, 10))
    heard.stager.end()
    await until(lambda: scarce.num_free == NUM_WIRE_BLOCKS)


async def test_several_exports_share_what_there_is(scarce: DeviceStaging) -> None:
    """Each is twice too large; all of them end."""

    async def read(first: int) -> None:
        heard = Heard(scarce)
        heard.stager.attach(0)
        heard.stager.publish(range(first, first + 16))
        await heard.read_all(16)
        heard.stager.end()

    async with asyncio.timeout(10):
        await asyncio.gather(*(read(i) for i in range(8)))


async def test_an_export_that_ends_early_gives_everything_back(scarce: DeviceStaging) -> None:
    device = scarce._copier
    assert isinstance(device, FakeDevice)
    exports = [Heard(scarce) for _ in range(3)]
    device.gate.clear()
    for heard in exports:
        heard.stager.attach(0)
        heard.stager.publish(range(8))
    await until(lambda: device.num_under_way == 1)
    for heard in exports:
        heard.stager.end()
    device.gate.set()
    await until(lambda: scarce.num_free == NUM_WIRE_BLOCKS)
    assert all(heard.wire == {} for heard in exports)


async def test_a_device_that_fails_is_reported_once(scarce: DeviceStaging) -> None:
    device = scarce._copier
    assert isinstance(device, FakeDevice)
    device.fail = RuntimeError("the device is lost")
    heard = Heard(scarce)
    heard.stager.attach(0)
    heard.stager.publish([1])
    await until(lambda: len(heard.errors) == 1)
    heard.stager.publish([2])
    await asyncio.sleep(0.01)
    assert [str(error) for error in heard.errors] == ["the device is lost"]
    assert scarce.num_free == NUM_WIRE_BLOCKS
