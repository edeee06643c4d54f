"""Handoffs: fill the blocks that the engine reserved for a request with the KV that a prefill node computed.

One task per request, from the engine's Reserved event to exactly one `activate` or `abandon_import`. Until then the
blocks belong to the transfer; after a failed one they go back only when no byte can land in them any more.
"""

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Self

from engine.engine import Engine
from engine.events import Reserved
from kv_transfer.handoff.fetch import FetchResult
from kv_transfer.handoff.imports import FetchFailed
from kv_transfer.lending.borrowing import BorrowContext
from kv_transfer.lending.gathering import gather
from kv_transfer.lending.holders import Holders
from protocol.errors import Cancelled, HeadraceError, InternalError
from protocol.ids import RequestId, TicketId
from protocol.transfer import PrefillDone, TransferTicket

CLOSE_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Running:
    """`task` answers to the engine for what `fetching` does, unless it has arrived."""

    task: asyncio.Task[None]
    fetching: asyncio.Task[FetchResult]


class Handoffs:
    """Used as `async with`, inside the importer's own context: leaving it cancels what is under way and returns when
    every block has been given back to the engine, or could not be within CLOSE_TIMEOUT_S (a peer that stands still): those
    stay with the transfer until the process ends."""

    def __init__(self, engine: Engine, context: BorrowContext) -> None:
        self._engine = engine
        self._context = context
        self._importer = context.importer
        self._block_size = context.layout.block_size
        self._running: dict[RequestId, _Running] = {}
        self._closing = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        tasks = {running.task for running in self._running.values()}
        self.cancel(list(self._running))
        if tasks:
            _, unsettled = await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
            self._closing = True
            for task in unsettled:
                task.cancel()
            await asyncio.gather(*unsettled)

    def start(self, event: Reserved, ticket: TransferTicket, holders: Holders, deadline_s: float) -> None:
        """Fetch into the blocks of `event`, the first of them from near by or other holders where there are any. The outcome reaches the
        engine, whatever it is; success at the very moment when the last block is proven, before any task gets to run."""
        request_id = event.request_id
        arrived = partial(self._arrived, request_id)
        begun = asyncio.Event()

        async def fetch() -> FetchResult:
            begun.set()
            blocks, num_cached = event.block_ids, event.num_cached_blocks
            hashes = event.block_hashes
            return await gather(self._context, ticket, holders, blocks, num_cached, deadline_s, arrived, hashes)

        fetching = asyncio.create_task(fetch(), name=f"fetch:{request_id}")
        task = asyncio.create_task(self._run(event, ticket, fetching, begun), name=f"handoff:{request_id}")
        self._running[request_id] = _Running(task, fetching)
        task.add_done_callback(lambda _: self._running.pop(request_id, None))

    def keep(self, ticket: TransferTicket) -> None:
        """Keep what `ticket` covers alive until `start` or `drop`: there is no room for it here yet."""
        self._importer.keep(ticket)

    def drop(self, ticket: TransferTicket) -> None:
        """Nobody wants it any more."""
        self._importer.drop(ticket)

    def refuse(self, event: Reserved, error: HeadraceError) -> None:
        """Give the blocks of `event` back untouched."""
        self._engine.abandon_import(event.request_id, event.num_cached_blocks * self._block_size, error)

    def cancel(self, request_ids: list[RequestId]) -> None:
        """Give up these hand-offs. Unknown ids are no error.

        Only the fetch is cancelled, never the task that answers for its blocks: one that has not begun yet could not.
        """
        for request_id in request_ids:
            running = self._running.get(request_id)
            if running is not None:
                running.fetching.cancel()

    async def _run(
        self, event: Reserved, ticket: TransferTicket, fetching: asyncio.Task[FetchResult], begun: asyncio.Event
    ) -> None:
        """A fetch that has `begun` ends its lease itself, whatever becomes of it."""
        request_id = event.request_id
        try:
            await fetching
        except FetchFailed as failed:
            await self._give_back(event, failed.num_valid_blocks, failed.settled, failed)
        except asyncio.CancelledError:
            if not begun.is_set():
                self._importer.give_up(ticket)
            settled = self._importer.settled(TicketId(ticket.ticket_id))
            await self._give_back(event, event.num_cached_blocks, settled, Cancelled("the request was cancelled"))
        except Exception:
            log.exception("hand-off of %s failed", request_id)
            settled = self._importer.settled(TicketId(ticket.ticket_id))
            error = InternalError("the hand-off failed; see the decode node's log")
            await self._give_back(event, event.num_cached_blocks, settled, error)

    def _arrived(self, request_id: RequestId, fetched: FetchResult) -> None:
        assert isinstance(fetched.end, PrefillDone), "a fetch for a request ends with its first token"
        self._engine.activate(request_id, fetched.end.first_token, fetched.computed_at, fetched.landing)

    async def _give_back(
        self, event: Reserved, num_valid_blocks: int, settled: asyncio.Event, error: HeadraceError
    ) -> None:
        """A cancel does not stop this: the engine must hear of its blocks, and not before they have settled. Whoever waits
        for the request hears at once."""
        if not settled.is_set():
            self._engine.fail_import(event.request_id, error)
        while not settled.is_set():
            try:
                await settled.wait()
            except asyncio.CancelledError:
                if self._closing:
                    log.warning("blocks of %s are still in transfer as the node stops", event.request_id)
                    return
        self._engine.abandon_import(event.request_id, num_valid_blocks * self._block_size, error)
