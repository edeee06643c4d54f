"""Borrowing: what a lender holds arrives whole and is given back; what it does not hold, or cannot bring, costs nothing but
time; and nobody gets the blocks of another tenant."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kv_transfer.handoff.fetch import FetchResult
from kv_transfer.handoff.imports import FetchFailed
from kv_transfer.lending.borrowing import BorrowContext
from kv_transfer.lending.gathering import gather
from kv_transfer.lending.holders import Holders
from kv_transfer.lending.lender import MAX_LENT_SHARE
from kv_transfer.lending.prefix_imports import PrefixImports
from kv_transfer.routes import BORROW_PATH
from kv_transfer.transports.inproc import InprocTransport
from protocol.block_hash import hash_blocks, root_hash
from protocol.errors import HeadraceError, InvalidParameter
from protocol.ids import BlockHash, RequestId, TicketId, WorkerId
from protocol.requests import PrefillRequest
from protocol.sampling import SamplingParams
from protocol.transfer import BorrowPrefix, KVSource, PrefixLent, TransferTicket, TransportKind
from runtime.clock import ManualClock
from tests.support.kv_owner import LAYOUT, NUM_BLOCKS, Owner, running_owner
from tests.support.kv_reader import ReaderNode, running_reader

KINDS: list[TransportKind] = ["inproc", "shm", "tcp", "nixl"]
REQUEST = RequestId("req-1")
HASHES = tuple(hash_blocks(range(8 * LAYOUT.block_size), LAYOUT.block_size, root_hash(LAYOUT.identity)))
REMOTE = [20, 21, 22, 40, 7, 8]
LOCAL = (3, 4, 5, 6, 10, 30, 31)


class Engine:
    """Records what it is told of imports."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, int]] = []
        self.answered = asyncio.Event()

    def resume(self, request_id: RequestId, num_valid_tokens: int) -> None:
        self._note("resume", num_valid_tokens // LAYOUT.block_size)

    def proceed(self, request_id: RequestId, num_tokens: int) -> None:
        raise AssertionError("nothing is near")

    def fail_import(self, request_id: RequestId, error: HeadraceError) -> None:
        assert error.retryable
        self._note("fail", 0)

    def abandon_import(self, request_id: RequestId, num_valid_tokens: int, error: HeadraceError) -> None:
        self._note("abandon", num_valid_tokens // LAYOUT.block_size)

    def _note(self, what: str, num_blocks: int) -> None:
        self.answers.append((what, num_blocks))
        self.answered.set()


class Borrower:
    """A reader with an engine that waits for prefixes."""

    def __init__(self, reader: ReaderNode) -> None:
        self.reader = reader
        self.engine = Engine()
        self.transfer_s: float | None = None
        self.compute_tokens_per_s: float | None = None
        self.context = BorrowContext(
            importer=reader.importer,
            reader=WorkerId("decode-0"),
            layout=LAYOUT,
            stall_timeout_s=1.0,
            policy="auto",
            estimate_seconds=self._estimate,
            compute_tokens_per_s=lambda: self.compute_tokens_per_s,
        )
        self.imports = PrefixImports(self.context, self.engine)

    async def meet(self, owner: Owner) -> None:
        """Before anything happens to its transport, which a meeting tries."""
        await self.reader.importer.peers.meet(owner.url, owner.incarnation, "owner")

    async def _estimate(self, source: KVSource, num_bytes: int) -> float | None:
        return self.transfer_s

    def expect(self, *sources: KVSource, salt: str | None = None) -> int:
        return self.imports.expect(
            PrefillRequest(
                request_id=REQUEST,
                trace_id="t",
                router_id="r",
                prompt_token_ids=tuple(range(len(LOCAL) * LAYOUT.block_size + 1)),
                sampling=SamplingParams(max_tokens=1, seed=0),
                deadline_s=10.0,
                cache_salt=salt,
                sources=sources,
            )
        )

    def reserve(self, *sources: KVSource, num_cached_blocks: int = 0, salt: str | None = None) -> None:
        num_blocks = self.expect(*sources, salt=salt) // LAYOUT.block_size
        assert num_blocks == len(LOCAL), "all of it, because sources may hold a chunk more than they are said to"
        self.imports.reserved(REQUEST, LOCAL[:num_blocks], num_cached_blocks)

    async def borrow(self, *sources: KVSource, num_cached_blocks: int = 0) -> list[tuple[str, int]]:
        self.reserve(*sources, num_cached_blocks=num_cached_blocks)
        async with asyncio.timeout(5):
            await self.engine.answered.wait()
        return self.engine.answers


@pytest.fixture(params=KINDS)
async def kind(request: pytest.FixtureRequest) -> TransportKind:
    kind: TransportKind = request.param
    return kind


@pytest.fixture
async def owner(kind: TransportKind) -> AsyncIterator[Owner]:
    async with running_owner(kind) as node:
        node.cached.hold(HASHES[: len(REMOTE)], REMOTE)
        yield node


@pytest.fixture
async def borrower(kind: TransportKind) -> AsyncIterator[Borrower]:
    async with running_reader(kind) as node:
        made = Borrower(node)
        async with made.imports:
            yield made


in_process = pytest.mark.parametrize("kind", ["inproc"], indirect=True)


async def given_back(owner: Owner) -> None:
    async with asyncio.timeout(5):
        while owner.cached.pins or owner.exports.stats().num_open or owner.cached.lender.num_lent_blocks:
            await asyncio.sleep(0.01)


def assert_arrived(owner: Owner, borrower: Borrower, first: int, end: int) -> None:
    for theirs, ours in list(zip(REMOTE, LOCAL, strict=False))[first:end]:
        assert borrower.reader.arena.block(ours) == owner.arena.block(theirs)


async def test_a_prefix_arrives_whole_and_is_given_back(owner: Owner, borrower: Borrower) -> None:
    assert await borrower.borrow(owner.source(8)) == [("resume", 6)]
    assert_arrived(owner, borrower, 0, 6)
    await given_back(owner)
    assert owner.exports.stats().num_released == 1


async def test_only_what_is_missing_moves(owner: Owner, borrower: Borrower) -> None:
    assert await borrower.borrow(owner.source(5), num_cached_blocks=2) == [("resume", 6)]
    assert_arrived(owner, borrower, 2, 6)
    assert borrower.reader.arena.block(LOCAL[0]) == bytes(LAYOUT.block_bytes)
    assert borrower.reader.importer.stats().num_blocks_moved == 4
    await given_back(owner)


@in_process
async def test_a_lender_needs_no_more_than_what_is_asked_for(owner: Owner, borrower: Borrower) -> None:
    """Its cache may have lost the beginning."""
    del owner.cached.block_of[HASHES[0]]
    assert await borrower.borrow(owner.source(6), num_cached_blocks=1) == [("resume", 6)]
    await given_back(owner)


@in_process
async def test_the_next_source_has_what_the_first_has_forgotten(owner: Owner, borrower: Borrower) -> None:
    async with running_owner("inproc", seed=1) as other:
        other.cached.hold(HASHES[:2], REMOTE[:2])
        assert await borrower.borrow(other.source(8), owner.source(6)) == [("resume", 6)]
        assert_arrived(owner, borrower, 0, 6)
        await given_back(other)
    await given_back(owner)


@in_process
@pytest.mark.parametrize("told", [1, 4, 6])
async def test_a_source_lends_what_it_holds_beyond_what_it_is_said_to(
    told: int, owner: Owner, borrower: Borrower
) -> None:
    """An index tells of whole chunks."""
    assert await borrower.borrow(owner.source(told)) == [("resume", 6)]
    assert_arrived(owner, borrower, 0, 6)
    await given_back(owner)
    assert owner.exports.stats().num_opened == 1, "in one loan"


@in_process
async def test_nobody_is_asked_for_no_more_than_what_might_be(owner: Owner, borrower: Borrower) -> None:
    assert await borrower.borrow(owner.source(4), num_cached_blocks=4) == [("resume", 4)]
    assert owner.exports.stats().num_opened == 0


@in_process
async def test_a_chain_that_names_a_block_twice_is_refused(owner: Owner, borrower: Borrower) -> None:
    message = BorrowPrefix(request_id="r", reader="d", block_hashes=(HASHES[0], HASHES[1], HASHES[0]))
    with pytest.raises(InvalidParameter, match="twice"):
        await borrower.reader.client.call(owner.url + BORROW_PATH, message, PrefixLent, 2.0)
    assert not owner.cached.pins


@in_process
async def test_another_tenant_gets_nothing(owner: Owner, borrower: Borrower) -> None:
    salted = tuple(hash_blocks(range(8 * LAYOUT.block_size), LAYOUT.block_size, root_hash(LAYOUT.identity, "tenant")))
    borrower.reserve(owner.source(8), salt="tenant")
    await borrower.engine.answered.wait()
    assert borrower.engine.answers == [("resume", 0)]
    await given_back(owner)
    owner.cached.hold(salted[:1], [50])
    borrower.engine.answered.clear()
    borrower.reserve(owner.source(8), salt="tenant")
    await borrower.engine.answered.wait()
    assert borrower.engine.answers[1:] == [("resume", 1)], "and what is its own, it does"
    await given_back(owner)


@in_process
async def test_blocks_that_changed_after_they_were_lent_are_not_taken(owner: Owner, borrower: Borrower) -> None:
    assert isinstance(owner.transport, InprocTransport)
    owner.transport.faults.corrupt = True
    doubts: list[tuple[bool, int]] = []
    owner.cached.lender.on_doubt = lambda pin_id, index: doubts.append((pin_id in owner.cached.pins, index))
    assert await borrower.borrow(owner.source(6)) == [("resume", 4)], "those before the damaged one are right"
    assert_arrived(owner, borrower, 0, 4)
    assert borrower.reader.importer.stats().num_checksum_mismatches == 1
    await given_back(owner)
    assert doubts == [(True, 4)], "its owner hears of it while it still holds the loan"


@in_process
async def test_a_lender_that_is_gone_costs_nothing(owner: Owner, borrower: Borrower) -> None:
    async with running_owner("inproc") as other:
        gone = other.source(8)
    assert await borrower.borrow(gone, owner.source(6)) == [("resume", 6)]
    await given_back(owner)


@in_process
async def test_a_lender_whose_engine_is_busy_is_not_waited_for(owner: Owner, borrower: Borrower) -> None:
    owner.cached.answers = False
    borrower.compute_tokens_per_s = 1e6
    assert await borrower.borrow(owner.source(6)) == [("resume", 0)]
    owner.cached.answer()
    await given_back(owner)


@in_process
async def test_blocks_that_may_still_be_written_are_not_computed_into(owner: Owner, borrower: Borrower) -> None:
    assert isinstance(owner.transport, InprocTransport)
    await borrower.meet(owner)
    stalled = owner.transport.faults.stall = threading.Event()
    borrower.compute_tokens_per_s = 1e6
    assert await borrower.borrow(owner.source(6)) == [("fail", 0)], "the request is tried elsewhere"
    stalled.set()
    async with asyncio.timeout(5):
        while len(borrower.engine.answers) < 2:
            await asyncio.sleep(0.01)
    assert borrower.engine.answers == [("fail", 0), ("abandon", 0)]
    await given_back(owner)


@in_process
@pytest.mark.parametrize("early", [True, False])
async def test_a_cancelled_request_gives_everything_back(owner: Owner, borrower: Borrower, early: bool) -> None:
    assert isinstance(owner.transport, InprocTransport)
    owner.transport.faults.delay_s = 0.2
    if early:
        borrower.expect(owner.source(6))
        borrower.imports.cancel([REQUEST])
        borrower.imports.reserved(REQUEST, LOCAL, 1)
        assert borrower.engine.answers == [("resume", 1)]
        return
    borrower.reserve(owner.source(6))
    while not owner.exports.stats().num_open:
        await asyncio.sleep(0.005)
    borrower.imports.cancel([REQUEST])
    async with asyncio.timeout(5):
        await borrower.engine.answered.wait()
    assert borrower.engine.answers == [("resume", 0)]
    await given_back(owner)


@in_process
async def test_what_is_cheaper_to_compute_is_computed(owner: Owner, borrower: Borrower) -> None:
    borrower.transfer_s, borrower.compute_tokens_per_s = 1.0, 1e4
    assert await borrower.borrow(owner.source(6)) == [("resume", 0)]
    assert owner.exports.stats().num_opened == 0


@in_process
async def test_all_loans_together_get_a_share_of_the_blocks(owner: Owner, borrower: Borrower) -> None:
    limit = int(NUM_BLOCKS * MAX_LENT_SHARE)
    many = tuple(BlockHash(bytes([number]) * 16) for number in range(NUM_BLOCKS))
    owner.cached.hold(many, range(NUM_BLOCKS))
    message = BorrowPrefix(request_id="r", reader="d", block_hashes=many)
    client = borrower.reader.client
    lent = [await client.call(owner.url + BORROW_PATH, message, PrefixLent, 2.0) for _ in range(2)]
    assert lent[0].ticket is not None
    assert lent[0].ticket.num_tokens == limit * LAYOUT.block_size
    assert lent[1].ticket is None
    assert len(owner.cached.pins) == 1


@in_process
async def test_a_loan_that_nobody_fetches_expires(borrower: Borrower) -> None:
    clock = ManualClock()
    async with running_owner("inproc", clock=clock) as owner:
        owner.cached.hold(HASHES[:2], REMOTE[:2])
        message = BorrowPrefix(request_id="r", reader="d", block_hashes=HASHES)
        answer = await borrower.reader.client.call(owner.url + BORROW_PATH, message, PrefixLent, 2.0)
        assert answer.ticket is not None
        while not owner.exports.may_read(TicketId(answer.ticket.ticket_id), REMOTE[:2]):
            await asyncio.sleep(0.005)
        clock.advance(answer.ticket.ttl_s)
        owner.exports.reap()
        assert owner.exports.stats().num_expired == 1
        await given_back(owner)


# A context from two nodes.


CONTEXT_BLOCKS = 7


async def gathered(borrower: Borrower, prefill: Owner, lender: Owner, num_held: int = 5) -> FetchResult:
    """The context that `prefill` hands off, whose first blocks `lender` has too."""
    holders = Holders((lender.source(num_held),), HASHES[:num_held])
    ticket = prefill.hand_off(REQUEST, CONTEXT_BLOCKS * LAYOUT.block_size, [*REMOTE, 50])
    return await gather(borrower.context, ticket, holders, LOCAL, 0, 5.0, lambda _: None)


@in_process
async def test_a_context_comes_from_two_nodes(owner: Owner, borrower: Borrower) -> None:
    async with running_owner("inproc") as prefill:
        result = await gathered(borrower, prefill, owner)
        assert result.num_blocks_moved == CONTEXT_BLOCKS - 5
        assert_arrived(owner, borrower, 0, 5)
        assert_arrived(prefill, borrower, 5, 6)
        assert borrower.reader.arena.block(LOCAL[6]) == prefill.arena.block(50)
        await given_back(prefill)
    await given_back(owner)


@in_process
@pytest.mark.parametrize(("failure", "moved"), [("forgets", 7), ("corrupts", 3), ("is gone", 7)])
async def test_what_the_lender_does_not_bring_the_prefill_node_does(
    failure: str, moved: int, owner: Owner, borrower: Borrower
) -> None:
    assert isinstance(owner.transport, InprocTransport)
    if failure == "forgets":
        owner.cached.block_of.clear()
    elif failure == "corrupts":
        owner.transport.faults.corrupt = True
    async with running_owner("inproc") as prefill:
        if failure == "is gone":
            async with running_owner("inproc") as gone:
                lender = gone
            result = await gathered(borrower, prefill, lender)
        else:
            result = await gathered(borrower, prefill, owner)
        assert result.num_blocks_moved == moved
        assert_arrived(prefill, borrower, 0, 6)
        await given_back(prefill)
    await given_back(owner)


@in_process
@pytest.mark.parametrize("cancelled", [True, False])
async def test_blocks_of_a_lender_that_stands_still_are_quarantined(
    cancelled: bool, owner: Owner, borrower: Borrower
) -> None:
    assert isinstance(owner.transport, InprocTransport)
    await borrower.meet(owner)
    stalled = owner.transport.faults.stall = threading.Event()
    borrower.compute_tokens_per_s = 1e6
    async with running_owner("inproc") as prefill:
        gathering = asyncio.create_task(gathered(borrower, prefill, owner))
        if cancelled:
            while not owner.exports.stats().num_open:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)
            gathering.cancel()
        with pytest.raises(FetchFailed) as failed:
            await gathering
        assert not failed.value.settled.is_set()
        assert failed.value.retryable
        stalled.set()
        async with asyncio.timeout(5):
            await failed.value.settled.wait()
    await given_back(owner)


async def until_released(owner: Owner) -> None:
    async with asyncio.timeout(5):
        while owner.released != [REQUEST]:
            await asyncio.sleep(0.005)


@in_process
@pytest.mark.parametrize("ending", ["cancelled", "stands still"])
async def test_what_is_not_fetched_after_a_borrowing_is_given_back(
    ending: str, owner: Owner, borrower: Borrower
) -> None:
    assert isinstance(owner.transport, InprocTransport)
    wake = threading.Event()
    async with running_owner("inproc") as prefill:
        await borrower.meet(owner)
        if ending == "cancelled":
            owner.cached.answers = False
            task = asyncio.create_task(gathered(borrower, prefill, owner))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            owner.cached.answer()
        else:
            owner.transport.faults.stall = wake
            with pytest.raises(FetchFailed, match="stands still"):
                await gathered(borrower, prefill, owner)
        await until_released(prefill)
        wake.set()
    await given_back(owner)


@in_process
async def test_a_loan_that_is_refused_is_given_back(
    owner: Owner, borrower: Borrower, monkeypatch: pytest.MonkeyPatch
) -> None:
    lend = owner.exports.lend

    def lend_to_another(request_id: RequestId, **others: Any) -> TransferTicket:
        return lend(RequestId("another"), **others)

    monkeypatch.setattr(owner.exports, "lend", lend_to_another)
    assert await borrower.borrow(owner.source(4)) == [("resume", 0)]
    await given_back(owner)
    assert owner.exports.stats().num_released == 1, "it did not have to expire"
