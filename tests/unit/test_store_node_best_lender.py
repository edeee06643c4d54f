"""A node lends from whichever of its memories holds more, and keeps no loan that nobody hears of."""

import asyncio
from collections.abc import Callable

import pytest

from kv_transfer.exchange import KVExchange
from protocol.transfer import BorrowPrefix, PrefixLent, ReleaseLease, TransferTicket
from store_node.best_lender import BestLender

BLOCK_SIZE = 16


class Memory:
    """A KVExchange, its lender and its exports in one."""

    def __init__(self, num_blocks: int, trouble: Callable[[], None] | None = None) -> None:
        self.lender = self.exports = self
        self._num_blocks = num_blocks
        self._trouble = trouble
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.open: set[str] = set()

    async def lend(self, message: BorrowPrefix) -> PrefixLent:
        self.asked.set()
        await self.may_answer.wait()
        if self._trouble is not None:
            self._trouble()
        if not self._num_blocks:
            return PrefixLent(None)
        ticket = TransferTicket(
            ticket_id=f"t{self._num_blocks}",
            request_id=message.request_id,
            owner="d0",
            incarnation="i",
            layout_fingerprint="0" * 32,
            control_url="http://127.0.0.1:1",
            num_tokens=self._num_blocks * BLOCK_SIZE,
            context_hash=b"c" * 16,
            ttl_s=1.0,
        )
        self.open.add(ticket.ticket_id)
        return PrefixLent(ticket)

    def release(self, message: ReleaseLease) -> None:
        self.open.remove(message.ticket_id)


def lender(device: Memory, host: Memory, num_near: int) -> BestLender:
    def exchange(memory: Memory) -> KVExchange:
        return memory  # type: ignore[return-value]  # a fake

    return BestLender(exchange(device), exchange(host), BLOCK_SIZE, lambda _hashes: num_near)


MESSAGE = BorrowPrefix(request_id="r", reader="d1", block_hashes=(b"a" * 16,) * 8)


@pytest.mark.parametrize(("on_device", "in_host", "lent"), [(3, 2, 3), (2, 3, 3), (0, 3, 3), (2, 0, 2), (0, 0, 0)])
async def test_who_holds_more_lends_and_the_other_has_its_blocks_back(on_device: int, in_host: int, lent: int) -> None:
    device, host = Memory(on_device), Memory(in_host)
    answer = await lender(device, host, 8).lend(MESSAGE)
    assert (0 if answer.ticket is None else answer.ticket.num_tokens) == lent * BLOCK_SIZE
    assert device.open | host.open == ({f"t{lent}"} if lent else set())


def fail() -> None:
    raise RuntimeError("the host tier fails")


async def test_the_devices_loan_does_not_outlive_trouble_in_the_host_tier() -> None:
    device, host = Memory(2), Memory(3, fail)
    with pytest.raises(RuntimeError):
        await lender(device, host, 8).lend(MESSAGE)
    assert not device.open


async def test_the_devices_loan_does_not_outlive_its_reader() -> None:
    device, host = Memory(2), Memory(3)
    host.may_answer.clear()
    lending = asyncio.create_task(lender(device, host, 8).lend(MESSAGE))
    await host.asked.wait()
    lending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lending
    assert not device.open
