"""A whole KVStore under everything at once: whatever is loaded is right, and nothing is lost or written too late."""

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.store_world import StoreWorld
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
