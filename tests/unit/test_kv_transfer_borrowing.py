"""A borrowing ends when it is told to, also if a loan arrives whole at that very moment."""

import asyncio

import pytest

from kv_transfer.lending.borrowing import BorrowContext, Borrowing, Prefix
from protocol.ids import BlockHash, Incarnation, RequestId, WorkerId
from protocol.transfer import BorrowPrefix, KVSource, TransferTicket
from tests.support.kv_owner import LAYOUT

HASHES = tuple(BlockHash(bytes([number]) * 16) for number in range(4))


class Importer:
    """Borrows two blocks a time; a loan arrives at the moment of the cancel, and its fetch prefers to succeed."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fetching = asyncio.Event()

    async def borrow(self, url: str, message: BorrowPrefix) -> TransferTicket:
        self.asked.append(url)
        return TransferTicket(
            ticket_id="t",
            request_id=message.request_id,
            owner="p0",
            incarnation="i",
            layout_fingerprint=LAYOUT.fingerprint,
            control_url=url,
            num_tokens=2 * LAYOUT.block_size,
            context_hash=message.block_hashes[1],
            ttl_s=30.0,
        )

    async def fetch_prefix(self, *_: object) -> None:
        self.fetching.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return


async def nobody_knows(*_: object) -> None:
    """No link has been measured."""


def borrowing(importer: Importer) -> Borrowing:
    context = BorrowContext(
        importer=importer,  # type: ignore[arg-type]  # a fake
        reader=WorkerId("d0"),
        layout=LAYOUT,
        stall_timeout_s=1.0,
        policy="always",
        estimate_seconds=nobody_knows,
        compute_tokens_per_s=lambda: None,
    )
    return Borrowing(context, Prefix(RequestId("r"), HASHES, (0, 1, 2, 3), 0))


def sources() -> tuple[KVSource, ...]:
    return tuple(
        KVSource(
            worker=WorkerId(name), incarnation=Incarnation("i"), control_url=f"http://{name}", num_blocks=num_blocks
        )
        for name, num_blocks in (("a", 2), ("b", 4))
    )


async def test_a_cancel_in_the_moment_of_success_is_heeded() -> None:
    importer = Importer()
    one = borrowing(importer)
    task = asyncio.create_task(one.run(sources(), 5.0))
    await importer.fetching.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(importer.asked) == 1
    assert one.num_valid_blocks == 2, "what has come has come"


async def test_a_deadline_in_the_moment_of_success_is_heeded() -> None:
    importer = Importer()
    one = borrowing(importer)
    async with asyncio.timeout(5):
        await one.run(sources(), 0.05)
    assert len(importer.asked) == 1
    assert one.num_valid_blocks == 2
