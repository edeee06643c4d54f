"""A whole KVStore under everything at once: whatever is loaded is right, and nothing is lost or written too late."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_store.host_copier import HostCopier
from kv_store.settings import StoreSettings
from kv_store.store import KVStore
from protocol.kv_blocks import CachedBlock
from tests.support.store_parts import FakeDisk, PlainMemory, TailsFirst, blocks_of, hashes_of
from tests.support.store_world import MARK, LoopClock, StoreWorld
from tests.support.virtual_loop import VirtualLoop

WORK_S = 0.3
NUM_JOBS = 60


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_what_is_loaded_is_right_and_every_slot_comes_back(seed: int) -> None:
    loop = VirtualLoop(random.Random(seed), WORK_S)
    try:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(StoreWorld(random.Random(seed), loop).run(NUM_JOBS))
        assert not loop.unhandled
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@pytest.mark.parametrize("job", ["save", "load", "hold", "receive", "pin"])
def test_a_cancel_at_any_await_leaves_nothing_behind(job: str) -> None:
    ended_late = 0
    for num_steps in range(40):
        loop = VirtualLoop(random.Random(num_steps), WORK_S)
        try:
            ended_late += loop.run_until_complete(_cancelled_after(num_steps, job, loop))
            assert not loop.unhandled
        finally:
            loop.close()
    assert 0 < ended_late < 40, "some were cancelled on the way, and some had ended"


async def _cancelled_after(num_steps: int, job: str, loop: VirtualLoop) -> bool:
    """Whether the job had ended by then."""
    device, slab = PlainMemory(64), PlainMemory(8)
    copier = HostCopier(device, slab)
    store = KVStore(
        slab, 8, TailsFirst(), StoreSettings(16, load="always"), copier=copier, disk=FakeDisk(), clock=LoopClock(loop)
    )
    on_disk, here, new = blocks_of("a", 6), blocks_of("b", 8), blocks_of("c", 6)
    for chain in (on_disk, here):
        device.fill(range(len(chain)), chain)
        await store.save(chain, range(len(chain)))

    async def fetch(blocks: Sequence[CachedBlock], slots: Sequence[int]) -> int:
        for block, slot in zip(blocks, slots, strict=True):
            await asyncio.sleep(0.01)
            slab.fill([slot], [block])
        return len(slots)

    async def hold() -> None:
        store.let_go(await store.hold(hashes_of(on_disk)))

    device.fill(range(6), new)
    work: dict[str, Callable[[], Coroutine[None, None, object]]] = {
        "save": lambda: store.save(new, range(6)),
        "load": lambda: store.load(hashes_of(on_disk), range(20, 26)),
        "hold": hold,
        "receive": lambda: store.receive(new, fetch),
        "pin": lambda: store.pin(hashes_of(on_disk), 0.0),
    }
    task = loop.create_task(work[job]())
    for _ in range(num_steps):
        await asyncio.sleep(WORK_S / 3)
    was_done = task.done()
    task.cancel()
    await asyncio.wait((task,))
    device.block(20)[:] = MARK * device.block_bytes
    await asyncio.sleep(10 * WORK_S)
    assert device.block(20) == MARK * device.block_bytes, "bytes landed after the end"
    await store.close()
    host = store.stats().tiers[0]
    assert (host.held, host.writing, host.leaving, store.stats().quarantined) == (0, 0, 0, 0)
    for stored in store.snapshot():
        assert stored.tier == "disk" or slab.right([stored.place], [stored.block])
    return was_done
