"""Arrivals: what is told of a request, and that a long one holds nobody up."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from protocol.block_hash import hash_blocks, root_hash
from protocol.ids import BlockHash, RequestId, RouterId, TraceId
from protocol.kv_blocks import CachedBlock, tenant_of
from protocol.requests import PrefillRequest, SamplingParams
from store_node.arrivals import MAX_TOKENS_ON_LOOP, Arrivals

SALT = "of their own"


class Store:
    """`gate`: a request is told of while it is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.told: list[list[CachedBlock]] = []

    def requested(self, blocks: Sequence[CachedBlock]) -> None:
        self.gate.wait()
        self.told.append(list(blocks))


def request(num_tokens: int) -> PrefillRequest:
    return PrefillRequest(
        request_id=RequestId("r"),
        trace_id=TraceId("t"),
        router_id=RouterId("o"),
        prompt_token_ids=tuple(range(num_tokens - 1)),
        emitted_token_ids=(num_tokens - 1,),
        sampling=SamplingParams(max_tokens=1, seed=0),
        deadline_s=1.0,
        cache_salt=SALT,
    )


def num_held(block_hashes: Sequence[BlockHash]) -> int:
    return len(block_hashes) // 2


@pytest.mark.parametrize("num_tokens", [64, MAX_TOKENS_ON_LOOP + 16])
async def test_the_store_hears_of_all_blocks_and_the_last_token_is_left_to_compute(num_tokens: int) -> None:
    store = Store()
    brought, held = await Arrivals(store, "layout", 16, num_held).note(request(num_tokens))
    root = root_hash("layout", SALT)
    hashes = hash_blocks(range(num_tokens), 16, root)
    assert [[block.block_hash for block in blocks] for blocks in store.told] == [hashes]
    assert (store.told[0][0].parent, store.told[0][0].tenant) == (root, tenant_of(SALT))
    assert brought == hashes[:-1]
    assert held == len(brought) // 2


async def test_a_long_prompt_holds_nobody_up_and_may_be_cancelled() -> None:
    store = Store()
    arrivals = Arrivals(store, "layout", 16, num_held)
    store.gate.clear()
    long, given_up = (asyncio.create_task(arrivals.note(request(MAX_TOKENS_ON_LOOP + 16))) for _ in range(2))
    try:
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert not long.done()
    finally:
        store.gate.set()
    assert len((await long)[0]) == MAX_TOKENS_ON_LOOP // 16
