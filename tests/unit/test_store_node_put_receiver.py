"""What a store takes of a put, and what it says that it keeps."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import pytest
from store_parts import FakeDisk, PlainMemory, TailsFirst, blocks_of, bytes_of, hashes_of

from kv_store.admission import AdmissionMode
from kv_store.settings import StoreSettings
from kv_store.store import KVStore
from kv_transfer.exchange import KVExchange
from kv_transfer.lending.borrowing import BorrowContext
from protocol.errors import InvalidParameter
from protocol.ids import Incarnation, TicketId, WorkerId
from protocol.kv_blocks import CachedBlock, Tenant
from protocol.store import StorePut
from protocol.transfer import BorrowPrefix, KVSource, TransferTicket
from store_node.put_receiver import PutReceiver, check_chain
from tests.support.kv_owner import LAYOUT

NUM_SLOTS = 16


class Sender:
    """The Importer of a store: a node lends it everything, `at_once` blocks a loan, and `num_loans` loans."""

    def __init__(self, memory: PlainMemory, blocks: list[CachedBlock], at_once: int = 256, num_loans: int = 99) -> None:
        self._memory = memory
        self._blocks = {block.block_hash: block for block in blocks}
        self._at_once = at_once
        self._num_loans = num_loans
        self._lent: dict[str, list[CachedBlock]] = {}
        self.num_lent = 0

    async def borrow(self, _url: str, message: BorrowPrefix) -> TransferTicket:
        lent = [self._blocks[key] for key in message.block_hashes[: self._at_once]]
        ticket_id = f"t{len(self._lent)}"
        self._lent[ticket_id] = lent
        self.num_lent += len(lent)
        return TransferTicket(
            ticket_id=ticket_id,
            request_id=message.request_id,
            owner="d0",
            incarnation="i",
            layout_fingerprint="0" * 32,
            control_url="http://127.0.0.1:1",
            num_tokens=len(lent) * LAYOUT.block_size,
            context_hash=lent[-1].block_hash,
            ttl_s=1.0,
        )

    async def fetch_prefix(self, ticket: TransferTicket, block_ids: tuple[int, ...], _cached: int, _s: float) -> None:
        if len(self._lent) > self._num_loans:
            await asyncio.Event().wait()
        self._memory.fill(block_ids, self._lent[ticket.ticket_id])

    def settled(self, _ticket_id: TicketId) -> asyncio.Event:
        settled = asyncio.Event()
        settled.set()
        return settled


async def unknown(*_: object) -> None:
    """No link has been measured."""


@dataclass
class Site:
    store: KVStore
    memory: PlainMemory
    sender: Sender
    receiver: PutReceiver

    async def put(self, blocks: list[CachedBlock], deadline_s: float = 5.0) -> tuple[int, tuple[bool, ...]]:
        source = KVSource(worker="d0", incarnation="i", control_url="http://127.0.0.1:1", num_blocks=len(blocks))
        done = await self.receiver.put(
            StorePut(request_id="r", source=source, blocks=tuple(blocks), deadline_s=deadline_s)
        )
        assert done.incarnation == "life"
        return done.num_stored, done.kept


CHAIN = blocks_of("a", 24)


def site(admission: AdmissionMode, borrow: Literal["auto", "always", "never"], disk: FakeDisk | None = None) -> Site:
    memory = PlainMemory(NUM_SLOTS)
    sender = Sender(memory, CHAIN)
    settings = StoreSettings(block_size=LAYOUT.block_size, admission=admission)
    store = KVStore(memory, NUM_SLOTS, TailsFirst(), settings, copier=None, disk=disk)
    context = BorrowContext(
        importer=sender,  # type: ignore[arg-type]  # a fake
        reader=WorkerId("s0"),
        layout=LAYOUT,
        stall_timeout_s=1.0,
        policy=borrow,
        estimate_seconds=unknown,
        compute_tokens_per_s=lambda: None,
    )

    class Exchange:
        borrowing = context

    exchange: KVExchange = Exchange()  # type: ignore[assignment]  # a fake
    receiver = PutReceiver(store, exchange, WorkerId("s0"), Incarnation("life"), lambda: None)
    return Site(store, memory, sender, receiver)


@pytest.fixture
async def plain() -> AsyncIterator[Site]:
    one = site("all", "always")
    async with one.store:
        yield one


@pytest.mark.parametrize("borrow", ["auto", "always", "never"])
@pytest.mark.parametrize("admission", ["auto", "all", "second-touch"])
async def test_whatever_is_put_is_taken(admission: AdmissionMode, borrow: Literal["auto", "always", "never"]) -> None:
    one = site(admission, borrow)
    async with one.store:
        assert await one.put(CHAIN[:8]) == (8, (True,) * 8)
        for stored in one.store.snapshot():
            assert bytes(one.memory.block(stored.place)) == bytes_of(stored.block)


async def test_what_is_here_is_not_brought_again_and_is_said_to_be_kept(plain: Site) -> None:
    await plain.put(CHAIN[2:4])
    assert await plain.put(CHAIN[:6]) == (4, (True,) * 6)
    assert plain.sender.num_lent == 6


async def test_what_has_no_room_is_said_not_to_be_kept(plain: Site) -> None:
    assert await plain.put(CHAIN[:8]) == (8, (True,) * 8)
    held = await plain.store.hold(hashes_of(CHAIN[:8]))
    num_stored, kept = await plain.put(CHAIN)
    assert num_stored == NUM_SLOTS - 8
    assert kept == (True,) * NUM_SLOTS + (False,) * (len(CHAIN) - NUM_SLOTS)
    plain.store.let_go(held)


async def test_a_sender_that_stands_still_is_told_at_its_deadline_what_has_come(plain: Site) -> None:
    plain.receiver._context = dataclasses.replace(
        plain.receiver._context,
        importer=Sender(plain.memory, CHAIN, at_once=3, num_loans=2),  # type: ignore[arg-type]  # a fake
    )
    assert await plain.put(CHAIN[:10], deadline_s=0.5) == (6, (True,) * 6 + (False,) * 4)
    assert plain.receiver.idle


async def test_what_only_the_disk_holds_is_kept() -> None:
    disk = FakeDisk()
    one = site("all", "always", disk)
    async with one.store:
        for first in range(0, len(CHAIN), 4):
            await one.put(CHAIN[first : first + 4])
            await one.store.drain(5.0)
        assert disk.num_blocks >= len(CHAIN) - NUM_SLOTS
        num_lent = one.sender.num_lent
        assert await one.put(CHAIN) == (0, (True,) * len(CHAIN))
        assert one.sender.num_lent == num_lent


A, B, C = (bytes([number]) * 16 for number in range(3))


@pytest.mark.parametrize(
    "blocks",
    [
        [CachedBlock(A, A, 0)],
        [CachedBlock(A, B, 0), CachedBlock(B, A, 1)],
        [CachedBlock(A, C, 0), CachedBlock(B, A, 1), CachedBlock(C, B, 2)],
        [CachedBlock(A, C, 0), CachedBlock(B, A, 1), CachedBlock(A, B, 2)],
        [CachedBlock(A, C, 0), CachedBlock(A, A, 1)],
        [CachedBlock(A, C, 0), CachedBlock(B, A, 2)],
        [CachedBlock(A, C, 0), CachedBlock(B, C, 1)],
        [CachedBlock(A, C, 0), CachedBlock(B, A, 1, Tenant("t"))],
    ],
)
async def test_what_is_no_chain_is_refused(plain: Site, blocks: list[CachedBlock]) -> None:
    with pytest.raises(InvalidParameter):
        check_chain(blocks)
    with pytest.raises(InvalidParameter):
        await plain.put(blocks)
    assert plain.sender.num_lent == 0
