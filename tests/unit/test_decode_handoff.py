"""Every import that the engine reserves is answered exactly once, however early it is cancelled."""

import asyncio

from decode_node.handoff import Handoffs
from engine.events import Reserved
from kv_transfer.handoff.imports import FetchFailed
from kv_transfer.lending.borrowing import BorrowContext
from kv_transfer.lending.holders import Holders
from protocol.errors import Cancelled, PeerLost
from protocol.ids import RequestId, WorkerId
from protocol.transfer import TransferTicket
from tests.support.kv_owner import LAYOUT

BLOCK_SIZE = 16
EVENT = Reserved(RequestId("req-1"), (4, 5, 6), 1)
TICKET = TransferTicket(
    ticket_id="t",
    request_id="req-1",
    owner="p0",
    incarnation="i",
    layout_fingerprint="0" * 32,
    control_url="http://127.0.0.1:1",
    num_tokens=40,
    context_hash=b"c" * 16,
    ttl_s=30.0,
)


NOBODY = Holders((), ())


async def nobody_knows(*_: object) -> None:
    """No link has been measured."""


def context(importer: "Importer") -> BorrowContext:
    return BorrowContext(
        importer=importer,  # type: ignore[arg-type]  # a fake
        reader=WorkerId("d0"),
        layout=LAYOUT,
        stall_timeout_s=1.0,
        policy="auto",
        estimate_seconds=nobody_knows,
        compute_tokens_per_s=lambda: None,
    )


class Engine:
    """Records what it is told of imports."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, int, str]] = []

    def activate(self, request_id: str, first_token: object, computed_at: float) -> None:
        self.answers.append(("activate", 0, ""))

    def fail_import(self, request_id: str, error: Exception) -> None:
        self.answers.append(("fail", 0, type(error).__name__))

    def abandon_import(self, request_id: str, num_valid_tokens: int, error: Exception) -> None:
        self.answers.append(("abandon", num_valid_tokens, type(error).__name__))


class Importer:
    """Fetches forever, or fails as told; its blocks settle when the test says so."""

    def __init__(self, failure: FetchFailed | None = None) -> None:
        self.failure = failure
        self.blocks_settled = asyncio.Event()
        self.fetching = asyncio.Event()
        self.given_up: list[TransferTicket] = []

    async def fetch(self, *_: object) -> None:
        self.fetching.set()
        if self.failure is not None:
            raise self.failure
        await asyncio.Event().wait()

    def give_up(self, ticket: TransferTicket) -> None:
        self.given_up.append(ticket)

    def settled(self, _: str) -> asyncio.Event:
        return self.blocks_settled


async def test_a_cancel_in_the_same_turn_as_the_start_gives_the_blocks_back() -> None:
    engine, importer = Engine(), Importer()
    importer.blocks_settled.set()
    async with Handoffs(engine, context(importer)) as handoffs:  # type: ignore[arg-type]
        handoffs.start(EVENT, TICKET, NOBODY, 5.0)
        handoffs.cancel([EVENT.request_id])
        await asyncio.sleep(0.01)
        assert engine.answers == [("abandon", BLOCK_SIZE, "Cancelled")]
    assert importer.given_up == [TICKET], "no fetch has begun that would end its lease"


async def test_blocks_go_back_only_when_they_have_settled() -> None:
    engine, importer = Engine(), Importer()
    async with Handoffs(engine, context(importer)) as handoffs:  # type: ignore[arg-type]
        handoffs.start(EVENT, TICKET, NOBODY, 5.0)
        await importer.fetching.wait()
        handoffs.cancel([EVENT.request_id])
        await asyncio.sleep(0.01)
        handoffs.cancel([EVENT.request_id])
        await asyncio.sleep(0.01)
        assert engine.answers == [("fail", 0, "Cancelled")], "whoever waits for it hears at once"
        importer.blocks_settled.set()
        await asyncio.sleep(0.01)
        assert engine.answers[1:] == [("abandon", BLOCK_SIZE, "Cancelled")]
    assert importer.given_up == [], "a fetch that has begun ends its lease itself"


async def test_what_arrived_before_a_failure_is_kept() -> None:
    settled = asyncio.Event()
    settled.set()
    engine, importer = Engine(), Importer(FetchFailed(PeerLost("gone"), 2, settled))
    async with Handoffs(engine, context(importer)) as handoffs:  # type: ignore[arg-type]
        handoffs.start(EVENT, TICKET, NOBODY, 5.0)
        await asyncio.sleep(0.01)
    assert engine.answers == [("abandon", 2 * BLOCK_SIZE, "FetchFailed")]


async def test_a_reservation_for_a_request_that_is_gone_is_refused() -> None:
    engine, importer = Engine(), Importer()
    async with Handoffs(engine, context(importer)) as handoffs:  # type: ignore[arg-type]
        handoffs.refuse(EVENT, Cancelled("gone"))
    assert engine.answers == [("abandon", BLOCK_SIZE, "Cancelled")]
