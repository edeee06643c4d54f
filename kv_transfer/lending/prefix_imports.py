"""PrefixImports: requests that wait for their first blocks, from the engine's reservation to its answer. The blocks come
from this node's own tiers and from other nodes.

    expected ──▶ reserved ──▶ bringing ──▶ resumed, with however much has come
                                   └──▶ failed, where blocks do not settle in time; given back when they have

One task per request. Exactly one `resume` or `abandon_import` follows every reservation, and none before no byte can land
in its blocks any more. Lives on the event loop.
"""

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

from kv_transfer.lending.borrowing import BorrowContext, Borrowing, Prefix
from kv_transfer.lending.holders import Holders, holders_of
from protocol.errors import HeadraceError, TransferTimeout
from protocol.ids import BlockHash, RequestId
from protocol.requests import DecodeRequest, PrefillRequest
from runtime.clock import Deadline

CLOSE_TIMEOUT_S = 5.0
SETTLE_TIMEOUT_S = 1.0
"""How long a request whose borrowed blocks may still be written waits before it is tried elsewhere."""

log = logging.getLogger(__name__)


class ImportTarget(Protocol):
    """The engine, as far as this concerns it. See engine.engine."""

    def resume(self, request_id: RequestId, num_valid_tokens: int) -> None: ...

    def proceed(self, request_id: RequestId, num_tokens: int) -> None: ...

    def fail_import(self, request_id: RequestId, error: HeadraceError) -> None: ...

    def abandon_import(self, request_id: RequestId, num_valid_tokens: int, error: HeadraceError) -> None: ...


@dataclass(frozen=True, slots=True)
class _Expected:
    holders: Holders
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class _Running:
    """`task` answers to the engine for what `borrowing` does."""

    task: asyncio.Task[None]
    borrowing: asyncio.Task[None]


class PrefixImports:
    """Used as `async with`, inside the importer's own context. Unknown request ids are no-ops."""

    def __init__(self, context: BorrowContext, target: ImportTarget) -> None:
        self._context = context
        self._target = target
        self._block_size = context.layout.block_size
        self._expected: dict[RequestId, _Expected] = {}
        self._running: dict[RequestId, _Running] = {}
        self._closing = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """What has not settled by then stays with the transfer until the process ends."""
        tasks = {running.task for running in self._running.values()}
        self.cancel(list(self._running))
        if tasks:
            _, unsettled = await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
            self._closing = True
            for task in unsettled:
                task.cancel()
            await asyncio.gather(*unsettled, return_exceptions=True)

    def expect(self, request: PrefillRequest | DecodeRequest) -> int:
        """The engine is about to hear of this request. Returns how many of its first tokens may be brought: whole blocks,
        and not the last token, which is to be computed."""
        num_tokens = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        holders = holders_of(request, self._context.layout, num_tokens - 1)
        if holders.sources:
            self._expected[RequestId(request.request_id)] = _Expected(holders, Deadline(request.deadline_s))
        return len(holders.block_hashes) * self._block_size

    def forget(self, request_id: RequestId) -> None:
        """It reserves no more: it has begun to compute, or it has ended."""
        self._expected.pop(request_id, None)

    def reserved(
        self,
        request_id: RequestId,
        block_ids: tuple[int, ...],
        num_cached_blocks: int,
        block_hashes: tuple[BlockHash, ...] = (),
    ) -> None:
        """The engine waits: bring what can be brought, and tell it. `block_hashes`: addresses of these blocks. A request
        that is not expected here waits for what is near; one that was cancelled meanwhile is stopped by the word of its
        failure, which follows."""
        expected = self._expected.pop(request_id, None)
        holders = Holders((), ()) if expected is None else expected.holders
        hashes = block_hashes or holders.block_hashes
        if not hashes:
            self._target.resume(request_id, num_cached_blocks * self._block_size)
            return
        prefix = Prefix(request_id, hashes[: len(block_ids)], block_ids, num_cached_blocks)
        borrowing = Borrowing(self._context, prefix, partial(self._target.proceed, request_id))
        num_awaited_tokens = (len(block_ids) - num_cached_blocks) * self._block_size
        deadline_s = self._context.patience_s(num_awaited_tokens)
        if expected is not None:
            deadline_s = max(0.001, min(expected.deadline.remaining_s, deadline_s))
        running = asyncio.create_task(borrowing.run(holders.sources, deadline_s), name=f"borrow:{request_id}")
        task = asyncio.create_task(self._answer(request_id, borrowing, running), name=f"prefix:{request_id}")
        self._running[request_id] = _Running(task, running)
        task.add_done_callback(lambda _: self._running.pop(request_id, None))

    def cancel(self, request_ids: list[RequestId]) -> None:
        """Stop borrowing for these. Only that task is cancelled, never the one that answers for the blocks."""
        for request_id in request_ids:
            self.forget(request_id)
            running = self._running.get(request_id)
            if running is not None:
                running.borrowing.cancel()

    async def _answer(self, request_id: RequestId, borrowing: Borrowing, running: asyncio.Task[None]) -> None:
        await asyncio.wait([running])
        if not running.cancelled() and (bug := running.exception()) is not None:
            log.error("%s: borrowing failed", request_id, exc_info=bug)
        if await self._settled(borrowing.settled, SETTLE_TIMEOUT_S):
            self._target.resume(request_id, borrowing.num_valid_blocks * self._block_size)
            return
        error = TransferTimeout("borrowed blocks are still being written by a node that stands still")
        self._target.fail_import(request_id, error)
        if await self._settled(borrowing.settled, None):
            self._target.abandon_import(request_id, borrowing.num_proven_blocks * self._block_size, error)

    async def _settled(self, settled: asyncio.Event, timeout_s: float | None) -> bool:
        """A cancel does not stop this, except at the end of the node."""
        try:
            async with asyncio.timeout(timeout_s):
                await settled.wait()
        except TimeoutError:
            return False
        except asyncio.CancelledError:
            if not self._closing:
                raise
            log.warning("borrowed blocks are still in transfer as the node stops")
            return False
        return True
