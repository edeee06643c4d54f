"""Importer: the reader's side of every hand-off. Fetches contexts, or the beginnings of some, from their owners, and tidies
up after each fetch.

One per process, `async with Importer(...) as importer:` for its whole life, inside the RpcClient and the transport.

What the caller must know about its local blocks: after a return all are valid. After FetchFailed the first
`num_valid_blocks` are valid, and the others may be used again once `settled` is set (nearly always at once). After a
cancelled fetch ask `Importer.settled(ticket_id)` for that event. No block may be freed or written before.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from kv_transfer.fetch import Fetch, FetchContext, FetchResult, LastWord
from kv_transfer.landing import Landing
from kv_transfer.peers import Peers, Reader, as_transfer_error
from kv_transfer.routes import RELEASE_PATH, RENEW_PATH
from kv_transfer.staging import Staging
from kv_transfer.transport import TransferAbandoned, Transport
from protocol.errors import (
    ChecksumMismatch,
    ErrorInfo,
    HeadraceError,
    LayoutMismatch,
    PeerLost,
    TransferError,
    TransferTimeout,
)
from protocol.ids import TicketId
from protocol.transfer import (
    BorrowPrefix,
    LeaseState,
    PrefillDone,
    PrefixDone,
    PrefixLent,
    ReleaseLease,
    RenewLease,
    TransferTicket,
)
from runtime.clock import Clock
from runtime.node_config import TransferOptions
from runtime.rpc_client import RpcClient

RELEASE_ATTEMPTS = 3
RELEASE_PAUSE_S = 0.2

log = logging.getLogger(__name__)


class FetchFailed(TransferError):
    """A hand-off that did not succeed; it crosses a process as its `reason`. The rest of the context is to be computed
    again.

    The first `num_valid_blocks` local blocks (those cached before included) hold proven KV. The others must not be used
    for anything before `settled` is set.
    """

    def __init__(self, reason: TransferError, num_valid_blocks: int, settled: asyncio.Event) -> None:
        super().__init__(reason.message)
        self.reason = reason
        self.num_valid_blocks = num_valid_blocks
        self.settled = settled

    def to_info(self) -> ErrorInfo:
        return self.reason.to_info()


@dataclass(slots=True)
class ImportStats:
    """Totals since start. `num_lost_leases`: fetches that succeeded though the lease had ended by then (the checksums
    had proven the bytes). `num_unsettled`: ended fetches whose local blocks are in quarantine, now."""

    num_fetched: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_checksum_mismatches: int = 0
    num_blocks_moved: int = 0
    num_bytes_moved: int = 0
    num_lost_leases: int = 0
    num_unsettled: int = 0
    num_peers: int = 0


class Importer:
    def __init__(
        self,
        *,
        client: RpcClient,
        transport: Transport,
        staging: Staging,
        reader: Reader,
        options: TransferOptions,
        clock: Clock,
    ) -> None:
        self._client = client
        self._transport = transport
        self._reader = reader
        self._options = options
        self._clock = clock
        self._tasks = asyncio.TaskGroup()
        self._peers = Peers(client, transport, staging.arena, reader, options.stall_timeout_s, self._tasks)
        self._context = FetchContext(
            client=client,
            peers=self._peers,
            staging=staging,
            reader=reader,
            options=options,
            clock=clock,
            tasks=self._tasks,
        )
        self._unsettled: dict[TicketId, tuple[asyncio.Event, asyncio.Task[None]]] = {}
        self._totals = ImportStats()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Waits for releases and reads in flight (each has its deadline). What is in quarantine then stays there."""
        self._peers.close()
        for _, watcher in self._unsettled.values():
            watcher.cancel()
        await self._tasks.__aexit__(None, None, None)

    def stats(self) -> ImportStats:
        self._totals.num_unsettled = len(self._unsettled)
        self._totals.num_peers = self._peers.num_known
        return self._totals

    async def fetch(
        self, ticket: TransferTicket, local_block_ids: Sequence[int], num_cached_blocks: int, deadline_s: float
    ) -> FetchResult:
        """Bring a context here. `local_block_ids`: our blocks for all of it, the first `num_cached_blocks` of which hold
        it already and are not touched.

        Raises FetchFailed within `deadline_s` seconds, sooner if the owner is silent for stall_timeout_s.
        """
        landing = Landing(local_block_ids, num_cached_blocks)
        done, heard_at = await self._run(ticket, landing, deadline_s, PrefillDone)
        num_moved = landing.num_blocks - num_cached_blocks
        return FetchResult(
            first_token=done.first_token,
            finished=done.finished,
            phases=done.phases,
            computed_at=heard_at - max(0.0, done.since_computed_s),
            num_blocks_moved=num_moved,
            num_bytes_moved=num_moved * self._context.staging.arena.block_bytes,
        )

    async def fetch_prefix(self, ticket: TransferTicket, local_block_ids: Sequence[int], deadline_s: float) -> None:
        """Bring blocks here that their owner lends. `local_block_ids`: ours for all of them. Raises FetchFailed, as
        `fetch` does."""
        await self._run(ticket, Landing(local_block_ids, 0), deadline_s, PrefixDone)

    async def _run(
        self, ticket: TransferTicket, landing: Landing, deadline_s: float, last_word: type[LastWord]
    ) -> tuple[LastWord, float]:
        """One fetch, accounted for and tidied up after, however it ends."""
        num_cached_blocks = landing.num_valid_blocks
        fetch = Fetch(self._context, ticket, landing)
        failure: TransferError
        try:
            self._check(ticket, landing)
            async with asyncio.timeout(deadline_s):
                heard = await fetch.run(last_word)
        except asyncio.CancelledError:
            self._totals.num_cancelled += 1
            self._tidy_up(ticket, fetch, succeeded=False)
            raise
        except TimeoutError:
            failure = TransferTimeout(f"the hand-off from {ticket.owner} took longer than {deadline_s:g} s")
        except HeadraceError as error:
            failure = as_transfer_error(error)
        else:
            num_moved = landing.num_blocks - num_cached_blocks
            self._totals.num_fetched += 1
            self._totals.num_blocks_moved += num_moved
            self._totals.num_bytes_moved += num_moved * self._context.staging.arena.block_bytes
            self._tidy_up(ticket, fetch, succeeded=True)
            return heard
        settled = self._tidy_up(ticket, fetch, succeeded=False)
        self._note_failure(ticket, failure)
        raise FetchFailed(failure, landing.num_valid_blocks, settled) from failure

    async def borrow(self, url: str, message: BorrowPrefix) -> TransferTicket | None:
        """Ask for a loan; `fetch_prefix` is to follow. None: there is nothing to be had. Raises HeadraceError. Of a call that
        is cancelled, what is lent all the same is given back at once."""
        given_up = asyncio.Event()
        asking = self._tasks.create_task(self._ask(url, message, given_up), name=f"kv-borrow:{message.request_id}")
        try:
            answer = await asyncio.shield(asking)
        except asyncio.CancelledError:
            given_up.set()
            raise
        if isinstance(answer, HeadraceError):
            raise answer
        return answer.ticket

    async def _ask(self, url: str, message: BorrowPrefix, given_up: asyncio.Event) -> PrefixLent | HeadraceError:
        """Returns its error: it must not end the group that it runs in."""
        try:
            answer = await self._client.call(url, message, PrefixLent, self._options.stall_timeout_s)
        except HeadraceError as error:
            return error
        if given_up.is_set() and answer.ticket is not None:
            await self._release(answer.ticket, succeeded=False)
        return answer

    async def renew(self, ticket: TransferTicket) -> None:
        """Keep a lease alive while there is no room yet for what it covers. A fetch renews its own."""
        message = RenewLease(ticket.ticket_id, ticket.incarnation)
        try:
            await self._client.call(ticket.control_url + RENEW_PATH, message, LeaseState, self._options.stall_timeout_s)
        except HeadraceError as error:
            log.info("%s: the lease was not renewed: %s", ticket.request_id, error.message)

    def settled(self, ticket_id: TicketId) -> asyncio.Event:
        """Set when no more bytes can land in the local blocks of this ticket's fetch. For a fetch that has ended."""
        unsettled = self._unsettled.get(ticket_id)
        return unsettled[0] if unsettled is not None else _set_event()

    def _check(self, ticket: TransferTicket, landing: Landing) -> None:
        layout = self._reader.layout
        if ticket.layout_fingerprint != layout.fingerprint:
            raise LayoutMismatch(f"the ticket of {ticket.owner} is for another KV layout than this node's")
        num_blocks = layout.num_blocks_for(ticket.num_tokens)
        if num_blocks != landing.num_blocks:
            raise TransferError(
                f"the ticket's {ticket.num_tokens} tokens take {num_blocks} blocks, not {landing.num_blocks}"
            )

    def _note_failure(self, ticket: TransferTicket, failure: TransferError) -> None:
        log.warning("%s: KV did not arrive from %s: %s", ticket.request_id, ticket.owner, failure.message)
        self._totals.num_failed += 1
        if isinstance(failure, ChecksumMismatch):
            self._totals.num_checksum_mismatches += 1
        if isinstance(failure, PeerLost):
            self._peers.forget(ticket)

    def _tidy_up(self, ticket: TransferTicket, fetch: Fetch, *, succeeded: bool) -> asyncio.Event:
        """Release the lease in the background; say when the local blocks are safe."""
        self._tasks.create_task(self._release(ticket, succeeded), name=f"kv-release:{ticket.request_id}")
        reading = fetch.reading
        if reading is None or (reading.done() and not isinstance(reading.result(), TransferAbandoned)):
            return _set_event()
        ticket_id = TicketId(ticket.ticket_id)
        settled = asyncio.Event()
        watcher = self._tasks.create_task(self._watch(ticket_id, fetch, reading, settled), name="kv-quarantine")
        self._unsettled[ticket_id] = (settled, watcher)
        return settled

    async def _watch(
        self, ticket_id: TicketId, fetch: Fetch, reading: asyncio.Task[TransferError | None], settled: asyncio.Event
    ) -> None:
        outcome = await asyncio.shield(reading)
        if isinstance(outcome, TransferAbandoned):
            await outcome.settled.wait()
            fetch.give_back()
        settled.set()
        del self._unsettled[ticket_id]

    async def _release(self, ticket: TransferTicket, succeeded: bool) -> None:
        """Tries a little; the lease's end does the rest. Must not raise: the group it runs in is everybody's."""
        message = ReleaseLease(ticket.ticket_id, ticket.incarnation)
        for attempt in range(RELEASE_ATTEMPTS):
            if attempt:
                await asyncio.sleep(RELEASE_PAUSE_S)
            try:
                state = await self._client.call(
                    ticket.control_url + RELEASE_PATH, message, LeaseState, self._options.stall_timeout_s
                )
            except HeadraceError as error:
                log.info("%s: the lease was not released: %s", ticket.request_id, error.message)
                continue
            if succeeded and not state.held:
                self._totals.num_lost_leases += 1
                log.warning("%s: the lease had ended before the blocks were read", ticket.request_id)
            return


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
