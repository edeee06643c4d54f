"""Fetch: one hand-off, or one borrowed prefix, as its reader lives it. Three duties side by side; the first to fail ends
the others.

    listen    the owner's stream: announcements, then its last word              until PrefillDone or PrefixDone
    move      reads and verifies announced blocks while the owner computes on    until all are valid
    renew     the lease, three times per ttl                                     until both are done

A read in flight is never cancelled with its duty: it runs in the importer's task group, and `reading` is how the
importer learns when the local blocks are safe.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

from kv_transfer.landing import Batch, Landing
from kv_transfer.peers import Peers, Reader, as_transfer_error
from kv_transfer.routes import HANDOFF_PATH, LANDED_PATH, RENEW_PATH
from kv_transfer.staging import Staging
from kv_transfer.transport import Link, TransferAbandoned
from protocol.errors import HeadraceError, LeaseExpired, NodeLost, PeerLost, TransferError, TransferTimeout
from protocol.ids import TicketId
from protocol.phases import PrefillPhases
from protocol.tokens import SampledToken
from protocol.transfer import (
    BlocksLanded,
    HandoffFailed,
    HandoffMessage,
    LeaseState,
    OpenHandoff,
    PrefillDone,
    PrefixDone,
    RenewLease,
    TransferTicket,
)
from protocol.wire import decode
from runtime.clock import Clock
from runtime.node_config import TransferOptions
from runtime.rpc_client import RpcClient

MAX_READ_BYTES = 64 << 20
"""Of one read: what must arrive within stall_timeout_s."""

RENEWALS_PER_TTL = 3

T = TypeVar("T")
LastWord = TypeVar("LastWord", PrefillDone, PrefixDone)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchResult:
    """Every block of the context is in our arena and proven.

    `computed_at`: the instant of our clock at which the owner's last chunk ended, late by one trip of a message; the
    start of the hand-off phase. `finished`: the first token was also the last.
    """

    first_token: SampledToken
    finished: bool
    phases: PrefillPhases
    computed_at: float
    num_blocks_moved: int
    num_bytes_moved: int


@dataclass(frozen=True, slots=True)
class FetchContext:
    """What all fetches of one importer share."""

    client: RpcClient
    peers: Peers
    staging: Staging
    reader: Reader
    options: TransferOptions
    clock: Clock
    tasks: asyncio.TaskGroup


class Fetch:
    def __init__(self, context: FetchContext, ticket: TransferTicket, landing: Landing) -> None:
        self._context = context
        self._ticket = ticket
        self._landing = landing
        self._num_cached_blocks = landing.num_valid_blocks
        self._announced = asyncio.Event()
        self.reading: asyncio.Task[TransferError | None] | None = None
        """The last read that was started, whether or not it has ended."""
        self._scarce = False
        """The owner waits to be told what has landed."""
        self._wire_ids: tuple[int, ...] = ()
        """What bytes may land in: of the read under way, or of one that was abandoned."""

    async def run(self, last_word: type[LastWord]) -> tuple[LastWord, float]:
        """Until every block is here and proven. Returns what the owner said last, and when that came, by our clock. Raises
        HeadraceError, of whichever duty failed first."""
        try:
            async with asyncio.TaskGroup() as duties:
                listening = duties.create_task(self._listen(last_word))
                moving = duties.create_task(self._move())
                renewing = duties.create_task(self._renew())
                heard = await listening
                await moving
                renewing.cancel()
        except ExceptionGroup as failures:
            raise self._first_of(failures) from failures
        return heard

    async def _listen(self, last_word: type[LastWord]) -> tuple[LastWord, float]:
        message = OpenHandoff(
            ticket_id=self._ticket.ticket_id,
            incarnation=self._ticket.incarnation,
            reader=self._context.reader.worker_id,
            reader_incarnation=self._context.reader.incarnation,
            skip_blocks=self._num_cached_blocks,
        )
        stall_s = self._context.options.stall_timeout_s
        async with AsyncExitStack() as stack:
            opening = self._context.client.stream(self._ticket.control_url + HANDOFF_PATH, message, 2 * stall_s)
            frames = await self._within_stall(stack.enter_async_context(opening))
            while True:
                arrived = await self._within_stall(_next_message(frames))
                if isinstance(arrived, last_word):
                    self._check_all_announced()
                    return arrived, self._context.clock.now()
                if isinstance(arrived, HandoffFailed):
                    raise as_transfer_error(arrived.error.to_error())
                if isinstance(arrived, PrefillDone | PrefixDone):
                    raise TransferError(f"{self._ticket.owner} mistook a prefill for a prefix, or the reverse")
                if arrived is None:
                    raise PeerLost(f"{self._ticket.owner} ended the hand-off in the middle")
                self._landing.announce(arrived)
                self._scarce |= arrived.scarce
                self._announced.set()

    def _check_all_announced(self) -> None:
        landing = self._landing
        if landing.num_announced < landing.num_blocks:
            raise TransferError(f"the owner finished after {landing.num_announced} of {landing.num_blocks} blocks")

    async def _move(self) -> None:
        staging = self._context.staging
        max_blocks = max(1, min(MAX_READ_BYTES // staging.arena.block_bytes, staging.max_blocks))
        while not self._landing.complete:
            self._announced.clear()
            batch = self._landing.next_batch(max_blocks)
            if batch is None:
                await self._announced.wait()
                continue
            link = await self._context.peers.link(self._ticket)
            self._wire_ids = await staging.reserve(batch.local_ids)
            self.reading = self._context.tasks.create_task(self._bring(link, batch))
            failure = await asyncio.shield(self.reading)
            if failure is not None:
                raise failure
            if self._scarce and not self._landing.complete:
                self._context.tasks.create_task(self._tell_landed(self._landing.num_valid_blocks))

    async def _bring(self, link: Link, batch: Batch) -> TransferError | None:
        """Read and land a batch, to the end. Returns its error: what fails must not end the group that it runs in."""
        ticket_id = TicketId(self._ticket.ticket_id)
        try:
            try:
                await link.read(ticket_id, batch.remote_ids, self._wire_ids, self._context.options.stall_timeout_s)
            except TransferAbandoned:
                raise
            except BaseException:
                self.give_back()
                raise
            wire_ids, self._wire_ids = self._wire_ids, ()
            num_right = await self._context.staging.land(wire_ids, batch.local_ids, batch.checksums)
            self._landing.landed(batch, num_right)
        except TransferError as error:
            return error
        except Exception:
            log.exception("%s: reading KV failed", self._ticket.request_id)
            return TransferError("reading KV failed; see this process's log")
        return None

    def give_back(self) -> None:
        """No more bytes can land in what a read that failed was to fill."""
        wire_ids, self._wire_ids = self._wire_ids, ()
        self._context.staging.discard(wire_ids)

    async def _tell_landed(self, num_blocks: int) -> None:
        """Must not raise: the group it runs in is everybody's. What is lost the next one makes good, or the stream ends."""
        message = BlocksLanded(self._ticket.ticket_id, self._ticket.incarnation, num_blocks)
        try:
            await self._context.client.call(
                self._ticket.control_url + LANDED_PATH, message, LeaseState, self._context.options.stall_timeout_s
            )
        except HeadraceError as error:
            log.info(
                "%s: %s was not told what has landed: %s", self._ticket.request_id, self._ticket.owner, error.message
            )

    async def _renew(self) -> None:
        message = RenewLease(self._ticket.ticket_id, self._ticket.incarnation)
        url = self._ticket.control_url + RENEW_PATH
        while True:
            await asyncio.sleep(self._ticket.ttl_s / RENEWALS_PER_TTL)
            try:
                state = await self._context.client.call(url, message, LeaseState, self._context.options.stall_timeout_s)
            except NodeLost as error:
                log.info("%s: the lease was not renewed: %s", self._ticket.request_id, error.message)
                continue
            if not state.held:
                raise LeaseExpired(f"{self._ticket.owner} took the exported blocks back while they were read")

    async def _within_stall(self, step: Awaitable[T]) -> T:
        """The owner says something at least every third of stall_timeout_s, if only that it lives."""
        stall_s = self._context.options.stall_timeout_s
        try:
            async with asyncio.timeout(stall_s):
                return await step
        except TimeoutError as error:
            raise TransferTimeout(f"{self._ticket.owner} was silent for {stall_s:g} s") from error

    def _first_of(self, failures: ExceptionGroup[Exception]) -> HeadraceError:
        """What the peer made fail first. Anything but a HeadraceError is a bug of ours: logged, and this fetch's end."""
        ours, bugs = failures.split(HeadraceError)
        if bugs is not None or ours is None:
            log.error("%s: following the hand-off failed", self._ticket.request_id, exc_info=failures)
            return TransferError("following the hand-off failed; see this process's log")
        first: Exception = ours
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        assert isinstance(first, HeadraceError)
        return first


async def _next_message(frames: AsyncIterator[bytes]) -> HandoffMessage | None:
    """None at the end of the stream."""
    try:
        body = await anext(frames)
    except StopAsyncIteration:
        return None
    message: HandoffMessage = decode(body, HandoffMessage)
    return message
