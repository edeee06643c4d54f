"""Borrowing: the beginning of one context on its way here, from this node's own tiers and from other nodes that hold it.

What is near is loaded first. The sources are asked one after the other, the best first, each for what is still missing, and
again while it has more: what its device holds no more may lie in its memory. Whoever is asked is asked for a little more than
it is said to hold, and lends what it has. A source that fails, or has
forgotten, costs time and nothing else: whatever is missing in the end is computed. After a failed read its local blocks may
still be written, and nothing else may use them before they have settled; no other source is asked then.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from kv_transfer.handoff.imports import FetchFailed, Importer
from kv_transfer.lending.borrow_choice import worth_borrowing
from kv_transfer.lending.holders import untold_blocks
from kv_transfer.lending.near import NearSource, NoNearSource
from kv_transfer.routes import BORROW_PATH
from protocol.errors import HeadraceError, TransferError
from protocol.ids import BlockHash, RequestId, TicketId, WorkerId
from protocol.kv_layout import KVLayout
from protocol.transfer import BorrowPrefix, KVSource, TransferTicket

MIN_PATIENCE_S = 0.25

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a request waits for: the addresses of its first blocks, and our blocks for them, the first `num_valid_blocks` of
    which hold it already."""

    request_id: RequestId
    block_hashes: tuple[BlockHash, ...]
    block_ids: tuple[int, ...]
    num_valid_blocks: int


@dataclass(frozen=True, slots=True)
class BorrowContext:
    """What all borrowings of one node share. `estimate_seconds(source, num_bytes)`: what moving so much from there takes, or TransferError;
    `compute_tokens_per_s()`: how fast prompts are computed here; None where that is not known yet."""

    importer: Importer
    reader: WorkerId
    layout: KVLayout
    stall_timeout_s: float
    policy: Literal["auto", "always", "never"]
    estimate_seconds: Callable[[KVSource, int], Awaitable[float | None]]
    compute_tokens_per_s: Callable[[], float | None]
    near: NearSource = field(default_factory=NoNearSource)

    def patience_s(self, num_tokens: int) -> float:
        """For a loan of so many tokens: about as long as computing them here takes, so that a lender which stands still
        costs no more than twice of what nobody would have lent."""
        rate = self.compute_tokens_per_s()
        return (
            self.stall_timeout_s if rate is None else min(self.stall_timeout_s, max(MIN_PATIENCE_S, num_tokens / rate))
        )


class Borrowing:
    """`run` once. `num_valid_blocks` leading blocks hold their KV; the others are to be left alone until `settled` is set,
    which is at once unless a read was given up. With `proceed(num_tokens)` some of the valid ones may only be promised: they
    are being computed here, because it was told so. Without, everything is waited for."""

    def __init__(self, context: BorrowContext, prefix: Prefix, proceed: Callable[[int], None] | None = None) -> None:
        self._context = context
        self._prefix = prefix
        self._proceed = proceed
        self.num_valid_blocks = prefix.num_valid_blocks
        self._promised = False
        self.settled = asyncio.Event()
        self.settled.set()

    @property
    def num_proven_blocks(self) -> int:
        """Leading blocks that are known to hold their KV, whatever the engine has come to."""
        return self._prefix.num_valid_blocks if self._promised else self.num_valid_blocks

    async def run(self, sources: tuple[KVSource, ...], deadline_s: float) -> None:
        """Ends within `deadline_s` and raises nothing that a peer can cause. Cancel it at any time."""
        num_cancels = _num_cancels()
        try:
            async with asyncio.timeout(deadline_s):
                await self._load_near()
                for source in sources:
                    while await self._ask(source, deadline_s):
                        _obey_cancels(num_cancels)
                    _obey_cancels(num_cancels)
                    if not self.settled.is_set():
                        return
        except TimeoutError:
            log.info("%s: borrowing took longer than %g s", self._prefix.request_id, deadline_s)

    async def _load_near(self) -> None:
        first, near = self.num_valid_blocks, self._context.near
        plan = near.plan(self._prefix.block_hashes[first:])
        if not plan.num_loaded:
            return
        end = min(first + plan.num_computed + plan.num_loaded, len(self._prefix.block_ids))
        if plan.num_computed and self._proceed is not None:
            first += plan.num_computed
            self._promised, self.num_valid_blocks = True, first
            self._proceed(first * self._context.layout.block_size)
        await near.load(self._prefix.block_hashes[first:end], self._prefix.block_ids[first:end], self._count)

    def _count(self, num_blocks: int) -> None:
        """As they come, because what has come when a load is given up need not be computed."""
        self.num_valid_blocks += num_blocks

    async def _ask(self, source: KVSource, deadline_s: float) -> bool:
        """Whether it has brought something, and is said to have more."""
        first = self.num_valid_blocks
        longest = min(len(self._prefix.block_ids), len(self._prefix.block_hashes))
        told = min(source.num_blocks, longest)
        end = min(source.num_blocks + untold_blocks(self._context.layout), longest)
        request_id = self._prefix.request_id
        try:
            if not await self._worth_it(source, told - first):
                return False
            message = BorrowPrefix(
                request_id=request_id,
                reader=self._context.reader,
                block_hashes=self._prefix.block_hashes[first:end],
            )
            url = source.control_url + BORROW_PATH
            ticket = await self._context.importer.borrow(url, message)
            if ticket is None:
                log.info("%s: %s does not have the prefix any more", request_id, source.worker)
                return False
            await self._fetch(ticket, source, end - first, deadline_s)
        except HeadraceError as error:
            log.info("%s: no KV borrowed from %s: %s", request_id, source.worker, error.message)
            return False
        return self.num_valid_blocks < told

    async def _worth_it(self, source: KVSource, num_blocks: int) -> bool:
        if num_blocks <= 0 or self._context.policy != "auto":
            return num_blocks > 0 and self._context.policy == "always"
        layout = self._context.layout
        return worth_borrowing(
            num_blocks * layout.block_size,
            transfer_s=await self._context.estimate_seconds(source, num_blocks * layout.block_bytes),
            compute_tokens_per_s=self._context.compute_tokens_per_s(),
        )

    async def _fetch(self, ticket: TransferTicket, source: KVSource, max_blocks: int, deadline_s: float) -> None:
        """What was lent, into our next blocks. Raises HeadraceError."""
        first = self.num_valid_blocks
        try:
            num_blocks = self._check(ticket, source, max_blocks)
        except TransferError:
            self._context.importer.give_up(ticket)
            raise
        try:
            block_ids = self._prefix.block_ids[first : first + num_blocks]
            await self._context.importer.fetch_prefix(ticket, block_ids, 0, deadline_s)
            self.num_valid_blocks += num_blocks
        except FetchFailed as failed:
            self.num_valid_blocks += failed.num_valid_blocks
            self.settled = failed.settled
            raise
        except asyncio.CancelledError:
            self.settled = self._context.importer.settled(TicketId(ticket.ticket_id))
            raise

    def _check(self, ticket: TransferTicket, source: KVSource, max_blocks: int) -> int:
        """How many blocks are lent. Raises TransferError for a ticket to anything but what was asked for."""
        block_size = self._context.layout.block_size
        num_blocks = ticket.num_tokens // block_size
        if ticket.request_id != self._prefix.request_id or ticket.incarnation != source.incarnation:
            raise TransferError(f"{source.worker} lent to another request, or in another life")
        if ticket.num_tokens % block_size or not 1 <= num_blocks <= max_blocks:
            raise TransferError(f"{source.worker} lent {ticket.num_tokens} tokens of {max_blocks} blocks")
        if ticket.context_hash != self._prefix.block_hashes[self.num_valid_blocks + num_blocks - 1]:
            raise TransferError(f"{source.worker} lent the KV of another context")
        return num_blocks


def _obey_cancels(num_before: int) -> None:
    """Raise CancelledError for one that came at the moment when everything was here, which a fetch prefers."""
    if _num_cancels() > num_before:
        raise asyncio.CancelledError


def _num_cancels() -> int:
    """Of the running task: those by the timeouts that it is in as well."""
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()
