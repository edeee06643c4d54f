"""What is near is loaded before anybody is asked, and the front of it may be computed meanwhile."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from kv_transfer.lending.borrowing import BorrowContext, Borrowing, Prefix
from kv_transfer.lending.near import NearPlan
from kv_transfer.lending.source_search import MAX_SOURCES, SourceSearch, merge_sources
from protocol.ids import BlockHash, Incarnation, RequestId, RouterId, TraceId, WorkerId
from protocol.requests import DecodeRequest
from protocol.sampling import SamplingParams
from protocol.transfer import BorrowPrefix, KVSource
from tests.support.kv_owner import LAYOUT

HASHES = tuple(BlockHash(bytes([number]) * 16) for number in range(40))


class Near:
    """Brings `num_at_once` blocks, and `num_brought` in all, once it may."""

    def __init__(self, plan: NearPlan, num_brought: int, num_at_once: int = 0) -> None:
        self._plan = plan
        self._num_brought = num_brought
        self._num_at_once = num_at_once
        self.asked: list[tuple[Sequence[BlockHash], Sequence[int]]] = []
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.writing = False

    def plan(self, block_hashes: Sequence[BlockHash]) -> NearPlan:
        return self._plan

    async def load(
        self, block_hashes: Sequence[BlockHash], block_ids: Sequence[int], on_loaded: Callable[[int], None]
    ) -> int:
        self.asked.append((block_hashes, block_ids))
        self.writing = True
        on_loaded(self._num_at_once)
        try:
            await self.may_go.wait()
        finally:
            self.writing = False
        on_loaded(self._num_brought - self._num_at_once)
        return self._num_brought


class Importer:
    """Nobody lends."""

    def __init__(self) -> None:
        self.asked: list[BorrowPrefix] = []

    async def borrow(self, _url: str, message: BorrowPrefix) -> None:
        self.asked.append(message)


async def nobody_knows(*_: object) -> None:
    """No link has been measured."""


def borrowing(near: Near, importer: Importer, told: list[int] | None = None) -> Borrowing:
    context = BorrowContext(
        importer=importer,  # type: ignore[arg-type]  # a fake
        reader=WorkerId("d0"),
        layout=LAYOUT,
        stall_timeout_s=1.0,
        policy="always",
        estimate_seconds=nobody_knows,
        compute_tokens_per_s=lambda: None,
        near=near,
    )
    prefix = Prefix(RequestId("r"), HASHES[:10], tuple(range(10)), 2)
    return Borrowing(context, prefix, None if told is None else told.append)


def source(worker: str, num_blocks: int, incarnation: str = "i") -> KVSource:
    return KVSource(
        worker=WorkerId(worker),
        incarnation=Incarnation(incarnation),
        control_url=f"http://{worker}",
        num_blocks=num_blocks,
    )


async def test_near_first_then_the_rest_from_others() -> None:
    near, importer = Near(NearPlan(0, 5), 4), Importer()
    one = borrowing(near, importer)
    await one.run((source("a", 10),), 5.0)
    assert near.asked == [(HASHES[2:7], (2, 3, 4, 5, 6))]
    assert importer.asked[0].block_hashes == HASHES[6:10], "and what near did not bring"
    assert one.num_valid_blocks == one.num_proven_blocks == 6


async def test_the_front_is_computed_while_the_back_is_loaded() -> None:
    near, told = Near(NearPlan(3, 5), 5), list[int]()
    one = borrowing(near, Importer(), told)
    await one.run((), 5.0)
    assert told == [5 * LAYOUT.block_size]
    assert near.asked == [(HASHES[5:10], (5, 6, 7, 8, 9))]
    assert one.num_valid_blocks == 10
    assert one.num_proven_blocks == 2, "what the engine computes is its own affair"


async def test_nothing_is_computed_where_nobody_can_be_told() -> None:
    near = Near(NearPlan(3, 5), 8)
    one = borrowing(near, Importer())
    await one.run((), 5.0)
    assert near.asked == [(HASHES[2:10], tuple(range(2, 10)))]
    assert one.num_valid_blocks == 10


@pytest.mark.parametrize("by", ["cancel", "deadline"])
async def test_a_load_ends_with_its_request_and_what_it_has_brought_counts(by: str) -> None:
    near = Near(NearPlan(0, 5), 5, num_at_once=3)
    near.may_go.clear()
    one = borrowing(near, Importer())
    task = asyncio.create_task(one.run((source("a", 10),), 5.0 if by == "cancel" else 0.05))
    while not near.writing:
        await asyncio.sleep(0)
    if by == "cancel":
        task.cancel()
    await asyncio.wait({task})
    assert not near.writing
    assert one.settled.is_set()
    assert one.num_valid_blocks == 2 + 3


def test_the_union_of_sources_is_small_and_without_us() -> None:
    known = [source("a", 4), source("b", 9)]
    found = [
        source("a", 7),
        source("me", 20),
        source("b", 12, "an older life"),
        *(source(f"c{i}", i + 1) for i in range(9)),
    ]
    merged = merge_sources(known, found, WorkerId("me"))
    assert [(one.worker, one.num_blocks) for one in merged] == [("b", 9), ("c8", 9), ("c7", 8), ("a", 7)]
    assert len(merged) == MAX_SOURCES


class Finder:
    def __init__(self) -> None:
        self.num_asked = 0

    async def find(self, block_hashes: Sequence[BlockHash]) -> tuple[KVSource, ...]:
        self.num_asked += 1
        return (source("a", len(block_hashes)),)


@pytest.mark.parametrize(("num_blocks", "num_held", "asks"), [(40, 0, True), (40, 38, False), (2, 0, False)])
async def test_nobody_is_asked_for_what_is_here_or_too_short(num_blocks: int, num_held: int, asks: bool) -> None:
    finder = Finder()
    search = SourceSearch(finder, WorkerId("me"))
    request = DecodeRequest(
        request_id=RequestId("r"),
        trace_id=TraceId("t"),
        router_id=RouterId("o"),
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=1, seed=0),
        deadline_s=1.0,
    )
    completed = await search.complete(request, HASHES[:num_blocks], num_held, 16)
    assert finder.num_asked == asks
    assert bool(completed.sources) == asks
