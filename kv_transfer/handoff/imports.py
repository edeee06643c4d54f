"""Importer: the reader's side of every hand-off. Fetches contexts from their owners, and tidies up after each fetch.

One per process, `async with Importer(...) as importer:` for its whole life, inside the RpcClient, the transports and the
staging.

What the caller must know about its local blocks: after a return all are valid. After FetchFailed the first
`num_valid_blocks` are valid, and the others may be used again once `settled` is set (nearly always at once). After a
cancelled fetch ask `Importer.settled(ticket_id)` for that event. No block may be freed or written before.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from kv_transfer.handoff.fetch import Fetch, FetchContext, FetchResult
from kv_transfer.handoff.landing import Landing
from kv_transfer.handoff.leases import Leases
from kv_transfer.handoff.link_queue import LinkQueues, QueueStats
from kv_transfer.handoff.presence import Presences
from kv_transfer.handoff.quarantine import Quarantine
from kv_transfer.meeting.peers import Peers, Reader, as_transfer_error
from kv_transfer.memory.staging import Staging
from kv_transfer.transports.transport_set import TransportSet
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
from protocol.transfer import BorrowPrefix, PrefixLent, TransferTicket
from protocol.wire import WIRE_VERSION, Hello
from runtime.clock import Clock
from runtime.node_config import TransferOptions
from runtime.rpc_client import RpcClient

log = logging.getLogger(__name__)

OnArrived = Callable[[FetchResult], None]


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
    had proven the bytes). `num_unsettled`: ended fetches whose local blocks are in quarantine, now. `num_retries`: reads
    that were done again over a new link. `checksum_mismatches_of`: by the owner's name."""

    num_fetched: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_checksum_mismatches: int = 0
    num_blocks_moved: int = 0
    num_bytes_moved: int = 0
    num_lost_leases: int = 0
    num_unsettled: int = 0
    num_retries: int = 0
    checksum_mismatches_of: Counter[str] = field(default_factory=Counter)
    num_peers: int = 0


class Importer:
    def __init__(
        self,
        *,
        client: RpcClient,
        transports: TransportSet,
        staging: Staging,
        reader: Reader,
        options: TransferOptions,
        clock: Clock,
    ) -> None:
        self._block_bytes = staging.arena.block_bytes
        self._reader = reader
        self._tasks = asyncio.TaskGroup()
        self._peers = Peers(client, transports, reader, options, clock, self._tasks, prefers_pull=not staging.eager)
        self._leases = Leases(client, options.stall_timeout_s, self._tasks)
        self._presences = Presences(client, _hello(reader), options.stall_timeout_s, self._tasks)
        self._quarantine = Quarantine(self._tasks)
        self._queues = LinkQueues(options.max_bytes_in_flight, self._block_bytes, staging.max_blocks, clock)
        self._context = FetchContext(
            client=client,
            peers=self._peers,
            queues=self._queues,
            leases=self._leases,
            presences=self._presences,
            quarantine=self._quarantine,
            staging=staging,
            reader=reader,
            options=options,
            clock=clock,
            tasks=self._tasks,
            count_retry=self._count_retry,
        )
        self._unsettled: dict[TicketId, asyncio.Event] = {}
        self._settling: set[asyncio.Task[None]] = set()
        """What may wait for ever: for a read that was given up, or for the word of an owner that pushes."""
        self._totals = ImportStats()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._peers.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Waits for releases and reads in flight (each has its deadline). What is in quarantine then stays there."""
        self._peers.close()
        self._leases.close()
        self._presences.close()
        self._quarantine.close()
        for task in self._settling:
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    @property
    def peers(self) -> Peers:
        return self._peers

    def stats(self) -> ImportStats:
        self._totals.num_unsettled = len(self._unsettled)
        self._totals.num_peers = self._peers.num_known
        return self._totals

    def queue_stats(self) -> QueueStats:
        return self._queues.stats()

    async def fetch(
        self,
        ticket: TransferTicket,
        local_block_ids: Sequence[int],
        num_cached_blocks: int,
        deadline_s: float,
        on_arrived: OnArrived | None = None,
    ) -> FetchResult:
        """Bring a context here. `local_block_ids`: our blocks for all of it, the first `num_cached_blocks` of which hold
        it already and are not touched.

        `on_arrived` is called at the moment when everything is here, before anything else gets to run; after it this
        returns, whatever happens. Raises FetchFailed within `deadline_s` seconds, sooner if the owner is silent for
        stall_timeout_s.
        """
        return await self._fetch(ticket, local_block_ids, num_cached_blocks, deadline_s, on_arrived, lent=False)

    async def fetch_prefix(
        self, ticket: TransferTicket, local_block_ids: Sequence[int], num_cached_blocks: int, deadline_s: float
    ) -> FetchResult:
        """Bring what a node lends of its prefix cache here. As `fetch`, for a ticket of whole blocks."""
        return await self._fetch(ticket, local_block_ids, num_cached_blocks, deadline_s, None, lent=True)

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
            answer = await self._context.client.call(url, message, PrefixLent, self._context.options.stall_timeout_s)
        except HeadraceError as error:
            return error
        if given_up.is_set() and answer.ticket is not None:
            self.give_up(answer.ticket)
        return answer

    def keep(self, ticket: TransferTicket) -> None:
        """Keep a lease alive while there is no room yet for what it covers. A fetch keeps its own."""
        self._leases.keep(ticket, _lost_before_its_fetch)

    def drop(self, ticket: TransferTicket) -> None:
        """The opposite of `keep`, for a ticket that is not fetched after all, or by somebody else."""
        self._leases.drop(ticket)

    def give_up(self, ticket: TransferTicket) -> None:
        """Nobody will fetch this: its owner may have the blocks back now. For a ticket that no fetch has begun with."""
        self._leases.drop(ticket)
        self._tasks.create_task(self._release(ticket, succeeded=False), name=f"kv-release:{ticket.request_id}")

    def settled(self, ticket_id: TicketId) -> asyncio.Event:
        """Set when no more bytes can land in the local blocks of this ticket's fetch. For a fetch that has ended."""
        return self._unsettled.get(ticket_id) or _set_event()

    async def _fetch(
        self,
        ticket: TransferTicket,
        local_block_ids: Sequence[int],
        num_cached_blocks: int,
        deadline_s: float,
        on_arrived: OnArrived | None,
        *,
        lent: bool,
    ) -> FetchResult:
        landing = Landing(local_block_ids, num_cached_blocks)
        fetch = Fetch(self._context, ticket, landing, on_arrived or _nobody_waits, lent=lent)
        failure: TransferError
        try:
            self._check(ticket, landing)
            async with asyncio.timeout(deadline_s):
                result = await fetch.run()
        except asyncio.CancelledError:
            self._totals.num_cancelled += 1
            self._tidy_up(ticket, fetch)
            raise
        except TimeoutError:
            failure = TransferTimeout(f"the hand-off from {ticket.owner} took longer than {deadline_s:g} s")
        except HeadraceError as error:
            failure = as_transfer_error(error)
        else:
            fetch.end_push()
            self._totals.num_fetched += 1
            self._totals.num_blocks_moved += result.num_blocks_moved
            self._totals.num_bytes_moved += result.num_blocks_moved * self._block_bytes
            self._tasks.create_task(self._release(ticket, succeeded=True), name=f"kv-release:{ticket.request_id}")
            return result
        settled = self._tidy_up(ticket, fetch, landing.damaged)
        self._note_failure(ticket, failure)
        raise FetchFailed(failure, landing.num_valid_blocks, settled) from failure

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
            self._totals.checksum_mismatches_of[ticket.owner] += 1
        if isinstance(failure, PeerLost):
            self._peers.forget(ticket.control_url, ticket.incarnation)

    def _count_retry(self) -> None:
        self._totals.num_retries += 1

    def _tidy_up(self, ticket: TransferTicket, fetch: Fetch, damaged: int | None = None) -> asyncio.Event:
        """After a fetch that did not succeed: release the lease in the background, say when the local blocks are safe."""
        self._leases.drop(ticket)  # the fetch does so too, unless it never ran
        releasing = self._tasks.create_task(
            self._release_push(ticket, fetch, damaged)
            if fetch.pushed
            else self._release(ticket, succeeded=False, damaged=damaged),
            name=f"kv-release:{ticket.request_id}",
        )
        if fetch.settled.is_set() and not fetch.pushed:
            fetch.end_push()
            return fetch.settled
        ticket_id = TicketId(ticket.ticket_id)
        settled = self._unsettled[ticket_id] = asyncio.Event()
        settling = self._tasks.create_task(self._settle(ticket_id, fetch, releasing), name="kv-settle")
        for task in (settling, releasing) if fetch.pushed else (settling,):
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)
        return settled

    async def _settle(self, ticket_id: TicketId, fetch: Fetch, releasing: asyncio.Task[None]) -> None:
        await fetch.settled.wait()
        if fetch.pushed:
            await releasing
        fetch.end_push()
        self._unsettled.pop(ticket_id).set()

    async def _release_push(self, ticket: TransferTicket, fetch: Fetch, damaged: int | None) -> None:
        assert fetch.presence is not None, "no push is asked for before its owner was seen"
        await self._leases.release_push(ticket, fetch.presence, damaged)

    async def _release(self, ticket: TransferTicket, *, succeeded: bool, damaged: int | None = None) -> None:
        held = await self._leases.release(ticket, damaged)
        if succeeded and held is False:
            self._totals.num_lost_leases += 1
            log.warning("%s: the lease had ended before the blocks were read", ticket.request_id)


def _hello(reader: Reader) -> Hello:
    return Hello(WIRE_VERSION, reader.worker_id, reader.incarnation, reader.layout.fingerprint)


def _nobody_waits(_: FetchResult) -> None:
    """The caller awaits the fetch itself."""


def _lost_before_its_fetch() -> None:
    """The fetch will find out."""


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
