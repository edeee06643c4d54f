"""Lender: the owner's side of a loan. A node lends the cached blocks of a prefix to whoever asks for their addresses.

    asked ──▶ pinned by the engine ──▶ leased, like a hand-off that is over ──▶ unpinned

Addresses name layout, tenant salt and every token up to the block's end, so nobody gets what they could not have computed.
A loan never waits for room and takes none: what is pinned was in the cache. But it keeps blocks from being used for
something else, so all loans together get a share of them and no more. Lives on the event loop, as long as the node.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence

from kv_transfer.handoff.exports import ExportTable
from protocol.ids import BlockHash, ContextHash, PinId, RequestId
from protocol.transfer import BorrowPrefix, PrefixLent

MAX_LENT_SHARE = 1 / 4
"""Of the node's blocks. A reader that has died holds its loan until the lease runs out."""

NOTHING = PrefixLent(None)

Lend = Callable[[BorrowPrefix], Awaitable[PrefixLent]]

log = logging.getLogger(__name__)


class Lender:
    """`pin(pin_id, block_hashes)` asks the engine to hold the longest cached prefix; `pinned` is to hear its answer, which
    counts for nothing after `timeout_s`. `unpin(pin_id)` lets go."""

    def __init__(
        self,
        exports: ExportTable,
        *,
        block_size: int,
        num_blocks: int,
        pin: Callable[[PinId, tuple[BlockHash, ...]], None],
        unpin: Callable[[PinId], None],
        timeout_s: float,
    ) -> None:
        self._exports = exports
        self._block_size = block_size
        self._max_lent_blocks = int(num_blocks * MAX_LENT_SHARE)
        self._pin = pin
        self._unpin = unpin
        self._timeout_s = timeout_s
        self._asked: dict[PinId, asyncio.Future[Sequence[int]]] = {}
        self.on_doubt: Callable[[PinId, int], None] = _trust
        """`on_doubt(pin_id, index)`: the reader says that this block of the loan came damaged. Before its unpin."""

        self.num_lent_blocks = 0
        """Blocks of all open loans; one that is lent twice counts twice."""

    async def lend(self, message: BorrowPrefix) -> PrefixLent:
        """Blocks of the addresses asked for, from the first on. Nothing is no error."""
        room = self._max_lent_blocks - self.num_lent_blocks
        hashes = tuple(BlockHash(block_hash) for block_hash in message.block_hashes[: max(0, room)])
        if not hashes:
            return NOTHING
        self.num_lent_blocks += len(hashes)
        pin_id = PinId(f"loan-{secrets.token_hex(8)}")
        block_ids: Sequence[int] = ()
        try:
            block_ids = await self._pinned(pin_id, hashes)
        finally:
            self.num_lent_blocks -= len(hashes) - len(block_ids)
        if not block_ids:
            self._unpin(pin_id)
            return NOTHING
        log.info("%s: lending %d blocks to %s", message.request_id, len(block_ids), message.reader)

        def give_back() -> None:
            self.num_lent_blocks -= len(block_ids)
            self._unpin(pin_id)

        ticket = self._exports.lend(
            RequestId(message.request_id),
            num_tokens=len(block_ids) * self._block_size,
            context_hash=ContextHash(hashes[len(block_ids) - 1]),
            block_ids=block_ids,
            give_back=give_back,
            on_doubt=lambda index: self.on_doubt(pin_id, index),
        )
        return PrefixLent(ticket)

    def pinned(self, pin_id: PinId, block_ids: Sequence[int]) -> None:
        """The engine's answer."""
        asked = self._asked.pop(pin_id, None)
        if asked is None or asked.done():
            self._unpin(pin_id)  # whoever asked has gone
        else:
            asked.set_result(block_ids)

    async def _pinned(self, pin_id: PinId, hashes: tuple[BlockHash, ...]) -> Sequence[int]:
        """No blocks if the engine does not answer in time: it answers between two steps."""
        asked: asyncio.Future[Sequence[int]] = asyncio.get_running_loop().create_future()
        self._asked[pin_id] = asked
        self._pin(pin_id, hashes)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asked
        except TimeoutError:
            return ()


def _trust(_pin_id: PinId, _index: int) -> None:
    """Of an owner that keeps no checksums of its own to compare with."""
