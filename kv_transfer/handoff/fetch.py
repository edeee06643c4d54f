"""Fetch: one hand-off, or one borrowed prefix, as its reader lives it.

    meet the owner -> follow its stream: announcements, then the end -> done when every block is proven
                         |
                         +-> pull: pieces wait their turn on the link, are read and proven, side by side
                         +-> push: what is announced has landed, and is proven

Everything happens on the event loop, and the step that completes a hand-off tells so itself: between the proof of the last
block and `on_arrived` lies no task switch. Pieces run in the importer's group and are never cancelled with the fetch: bytes
on their way cannot be stopped. `settled` says when the local blocks are safe.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from kv_transfer.handoff.landing import Landing, Piece
from kv_transfer.handoff.leases import Leases
from kv_transfer.handoff.link_queue import Lane, LinkQueues
from kv_transfer.handoff.presence import Presence, Presences
from kv_transfer.handoff.quarantine import Quarantine
from kv_transfer.handoff.timeline import HandoffTimeline
from kv_transfer.meeting.meeting import PeerLink
from kv_transfer.meeting.peers import Peers, Reader, as_transfer_error
from kv_transfer.memory.staging import Staging
from kv_transfer.routes import HANDOFF_PATH, LANDED_PATH
from kv_transfer.transport import TransferAbandoned
from protocol.errors import HeadraceError, LeaseExpired, PeerLost, TransferError, TransferTimeout
from protocol.ids import TicketId
from protocol.phases import HandoffPhases
from protocol.transfer import (
    BlocksLanded,
    BlocksReady,
    HandoffFailed,
    HandoffMessage,
    LeaseState,
    OpenHandoff,
    PrefillDone,
    PrefixDone,
    PushTarget,
    TransferTicket,
)
from protocol.wire import decode
from runtime.clock import Clock
from runtime.node_config import TransferOptions
from runtime.rpc_client import RpcClient

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchResult:
    """Every block of the context is in our KV blocks and proven.

    `end` is the owner's last word. `computed_at`: the instant of our clock at which the owner's last chunk ended, late by
    one trip of a message; the start of the hand-off phase. `landing`: where the time since then went.
    """

    end: PrefillDone | PrefixDone
    computed_at: float
    landing: HandoffPhases
    num_blocks_moved: int


@dataclass(frozen=True, slots=True)
class FetchContext:
    """What all fetches of one importer share."""

    client: RpcClient
    peers: Peers
    queues: LinkQueues
    leases: Leases
    presences: Presences
    quarantine: Quarantine
    staging: Staging
    reader: Reader
    options: TransferOptions
    clock: Clock
    tasks: asyncio.TaskGroup
    count_retry: Callable[[], None]


class Fetch:
    """`on_arrived` is called at most once, at the very moment when everything is here; `run` then returns the same, even
    if it is cancelled meanwhile. `lent`: the ticket is for a prefix, which ends without a token."""

    def __init__(
        self,
        context: FetchContext,
        ticket: TransferTicket,
        landing: Landing,
        on_arrived: Callable[[FetchResult], None],
        *,
        lent: bool = False,
    ) -> None:
        self._context = context
        self._ticket = ticket
        self._landing = landing
        self._on_arrived = on_arrived
        self._end_type = PrefixDone if lent else PrefillDone
        self._timeline = HandoffTimeline(context.clock)
        self._outcome: asyncio.Future[FetchResult] = asyncio.get_running_loop().create_future()
        self._end: tuple[PrefillDone | PrefixDone, float] | None = None
        self._peer: PeerLink | None = None
        self._lane: Lane | None = None
        self._pushed_to: dict[int, int] = {}
        """Our KV blocks that are still to be pushed or proven, and the wire blocks for them."""
        self._scarce = False
        """The owner waits to be told what has landed."""
        self._reserving: set[asyncio.Task[tuple[int, ...]]] = set()
        self._over = False
        self._num_unsettled = 0
        self.pushed = False
        """The owner may have begun to write into our blocks."""
        self.presence: Presence | None = None
        """Of the owner, once it is to push."""
        self.settled = asyncio.Event()
        """Set before it runs, and again when it is over and none of the pieces that we moved can land any more."""
        self.settled.set()

    async def run(self) -> FetchResult:
        """Raises TransferError. Whatever happens, `settled` is set then or later."""
        leases = self._context.leases
        self.settled.clear()
        leases.keep(self._ticket, self._lease_lost)
        following = self._context.tasks.create_task(self._follow(), name=f"kv-follow:{self._ticket.request_id}")
        try:
            with self._context.peers.using(self._ticket.control_url, self._ticket.incarnation):
                return await self._outcome
        except asyncio.CancelledError:
            if self._outcome.done() and not self._outcome.cancelled() and self._outcome.exception() is None:
                return self._outcome.result()
            raise
        finally:
            self._over = True
            leases.drop(self._ticket)
            if self._lane is not None:
                self._lane.leave()
            following.cancel()
            for reserving in self._reserving:
                reserving.cancel()
            self._settle()

    def end_push(self) -> None:
        """After the end, once the owner writes no more: give the wire blocks back that nothing came into, and whether the
        owner lives is of no concern any more. Idempotent."""
        self._context.staging.discard(tuple(self._pushed_to.values()))
        self._pushed_to.clear()
        if self.presence is not None:
            self._context.presences.let_go(self.presence)
            self.presence = None

    # The owner's stream.

    async def _follow(self) -> None:
        try:
            await self._listen(await self._meet())
        except HeadraceError as error:
            self._fail(as_transfer_error(error))
        except Exception:
            log.exception("%s: following the hand-off failed", self._ticket.request_id)
            self._fail(TransferError("following the hand-off failed; see this process's log"))

    async def _meet(self) -> PushTarget | None:
        """Know the owner and enter the queue of the link to it; or, where it pushes, say where to."""
        ticket, landing = self._ticket, self._landing
        self._peer = await self._context.peers.meet(ticket.control_url, ticket.incarnation, ticket.owner)
        if self._peer.direction == "pull":
            queue = self._context.queues.of((ticket.control_url, ticket.incarnation, self._peer.kind))
            self._lane = queue.enter(self._start_piece)
            return None
        if not landing.wanted_ids:
            return None
        if len(landing.wanted_ids) > self._context.staging.max_blocks:
            raise TransferError(
                f"{len(landing.wanted_ids)} blocks do not fit into the staging memory at once, as a push needs it; "
                'make transfer.staging_memory larger or set transfer.direction to "pull"'
            )
        wire_ids = await self._context.staging.reserve(landing.wanted_ids)
        self._pushed_to = dict(zip(landing.wanted_ids, wire_ids, strict=True))
        self.presence = self._context.presences.take(ticket)
        await self._within_stall(self.presence.seen())
        self.pushed = True
        return PushTarget(self._peer.kind, wire_ids)

    async def _listen(self, push: PushTarget | None) -> None:
        message = OpenHandoff(
            ticket_id=self._ticket.ticket_id,
            incarnation=self._ticket.incarnation,
            reader=self._context.reader.worker_id,
            reader_incarnation=self._context.reader.incarnation,
            skip_blocks=self._landing.num_cached_blocks,
            push=push,
        )
        stall_s = self._context.options.stall_timeout_s
        async with AsyncExitStack() as stack:
            opening = self._context.client.stream(self._ticket.control_url + HANDOFF_PATH, message, 2 * stall_s)
            frames = await self._within_stall(stack.enter_async_context(opening))
            while self._end is None:
                self._hear(await self._within_stall(self._next_message(frames)))

    def _hear(self, message: HandoffMessage) -> None:
        match message:
            case BlocksReady():
                self._landing.announce(message)
                self._scarce |= message.scarce
                self._offer(len(message.block_ids))
            case HandoffFailed(error, writing):
                self.pushed = self.pushed and writing
                raise as_transfer_error(error.to_error())
            case PrefillDone() | PrefixDone():
                self._accept_end(message)

    def _accept_end(self, end: PrefillDone | PrefixDone) -> None:
        landing = self._landing
        if not isinstance(end, self._end_type):
            raise TransferError(f"{self._ticket.owner} ended with a {type(end).__name__}, which was not asked for")
        if landing.num_announced < landing.num_blocks:
            raise TransferError(f"the owner finished after {landing.num_announced} of {landing.num_blocks} blocks")
        ago_s = max(0.0, end.since_computed_s) if isinstance(end, PrefillDone) else 0.0
        self._end = (end, self._context.clock.now() - ago_s)
        if self._lane is not None:
            self._lane.hasten()
        self._arrive_if_complete()

    async def _next_message(self, frames: AsyncIterator[bytes]) -> HandoffMessage:
        try:
            body = await anext(frames)
        except StopAsyncIteration:
            raise PeerLost(f"{self._ticket.owner} ended the hand-off in the middle") from None
        message: HandoffMessage = decode(body, HandoffMessage)
        return message

    async def _within_stall(self, step: Awaitable[T]) -> T:
        """The owner says something at least every third of stall_timeout_s, if only that it lives."""
        stall_s = self._context.options.stall_timeout_s
        try:
            async with asyncio.timeout(stall_s):
                return await step
        except TimeoutError as error:
            raise TransferTimeout(f"{self._ticket.owner} was silent for {stall_s:g} s") from error

    # Pieces.

    def _offer(self, num_blocks: int) -> None:
        """So many more blocks are announced."""
        if self._lane is not None and num_blocks:
            self._lane.add(num_blocks)
        elif num_blocks:
            self._start_piece(num_blocks)

    def _start_piece(self, num_blocks: int) -> None:
        piece = self._landing.take(num_blocks)
        self._num_unsettled += 1
        self._context.tasks.create_task(self._bring(piece), name=f"kv-piece:{self._ticket.request_id}")

    async def _bring(self, piece: Piece) -> None:
        """One piece, from the announcement to the proof. Raises nothing: the group that it runs in is everybody's."""
        try:
            wire_ids = await self._read_in_turn(piece) if self._lane is not None else self._pushed_ids(piece)
            with self._timeline.verifying():
                num_right = await self._context.staging.land(wire_ids, piece.local_ids, piece.checksums)
            self._landing.prove(piece, num_right)
            self._arrive_if_complete()
            if self._scarce and not self._landing.complete:
                self._context.tasks.create_task(self._tell_landed(self._landing.num_valid_blocks))
        except TransferAbandoned as error:
            self._fail(error)
            return  # it is settled by the quarantine
        except TransferError as error:
            self._fail(error)
        except Exception:
            log.exception("%s: moving KV failed", self._ticket.request_id)
            self._fail(TransferError("moving KV failed; see this process's log"))
        self._piece_settled()

    async def _read_in_turn(self, piece: Piece) -> tuple[int, ...]:
        """The wire blocks that a piece was read into. Its turn on the link ends with this."""
        staging, lane = self._context.staging, self._lane
        assert lane is not None
        try:
            wire_ids = await self._reserve(piece.local_ids)
            try:
                with self._timeline.moving():
                    await self._read(piece, wire_ids)
            except TransferAbandoned as error:
                self._context.quarantine.hold(error.settled, partial(self._settle_abandoned, wire_ids))
                raise
            except BaseException:
                staging.discard(wire_ids)
                raise
            return wire_ids
        finally:
            lane.ended(piece.num_blocks)

    async def _reserve(self, local_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Once the fetch is over nobody waits for room any more, or what keeps it would keep our KV blocks as well."""
        if self._context.staging.eager:
            return await self._context.staging.reserve(local_ids)
        if self._over:
            raise TransferError("the hand-off is over")
        reserving = asyncio.ensure_future(self._context.staging.reserve(local_ids))
        self._reserving.add(reserving)
        await asyncio.wait({reserving})
        self._reserving.discard(reserving)
        if reserving.cancelled():
            raise TransferError("the hand-off was over before there was room in the staging memory")
        return reserving.result()

    async def _tell_landed(self, num_blocks: int) -> None:
        """What is lost the next one makes good, or the stream ends. Raises nothing: the group that it runs in is
        everybody's."""
        ticket = self._ticket
        message = BlocksLanded(ticket.ticket_id, ticket.incarnation, num_blocks)
        try:
            await self._context.client.call(
                ticket.control_url + LANDED_PATH, message, LeaseState, self._context.options.stall_timeout_s
            )
        except HeadraceError as error:
            log.info("%s: %s was not told what has landed: %s", ticket.request_id, ticket.owner, error.message)

    async def _read(self, piece: Piece, wire_ids: tuple[int, ...]) -> None:
        """Once more, over a new link, if this one is broken and its owner is there to be met again."""
        try:
            await self._read_once(piece, wire_ids)
        except PeerLost as error:
            if self._over:
                raise
            log.info("%s: the link to %s broke: %s", self._ticket.request_id, self._ticket.owner, error.message)
            self._context.count_retry()
            await self._meet_again()
            await self._read_once(piece, wire_ids)

    async def _read_once(self, piece: Piece, wire_ids: tuple[int, ...]) -> None:
        assert self._peer is not None
        assert self._peer.link is not None, "a lane belongs to a link that pulls"
        ticket_id, stall_s = TicketId(self._ticket.ticket_id), self._context.options.stall_timeout_s
        await self._peer.link.read(ticket_id, piece.remote_ids, wire_ids, stall_s)

    async def _meet_again(self) -> None:
        """Of many pieces that a link broke under, the first forgets it; all share the new one."""
        ticket, peers, broken = self._ticket, self._context.peers, self._peer
        peer = await peers.meet(ticket.control_url, ticket.incarnation, ticket.owner)
        if peer is broken:
            peers.forget(ticket.control_url, ticket.incarnation)
            peer = await peers.meet(ticket.control_url, ticket.incarnation, ticket.owner)
        if peer.link is None:
            raise PeerLost(f"{ticket.owner} would have to push now; the link that this node read with is broken")
        self._peer = peer

    def _pushed_ids(self, piece: Piece) -> tuple[int, ...]:
        """The wire blocks that the owner wrote a piece into."""
        return tuple(self._pushed_to.pop(block_id) for block_id in piece.local_ids)

    # The end.

    def _arrive_if_complete(self) -> None:
        if self._over or self._end is None or not self._landing.complete or self._outcome.done():
            return
        end, computed_at = self._end
        landing = self._timeline.exposed(computed_at, self._context.clock.now())
        if isinstance(end, PrefillDone):
            landing = _with_push(landing, end.wire_s)
        num_moved = self._landing.num_blocks - self._landing.num_cached_blocks
        result = FetchResult(end, computed_at, landing, num_moved)
        self._outcome.set_result(result)
        self._on_arrived(result)

    def _fail(self, error: TransferError) -> None:
        if not self._over and not self._outcome.done():
            self._outcome.set_exception(error)

    def _lease_lost(self) -> None:
        self._fail(LeaseExpired(f"{self._ticket.owner} took the exported blocks back while they were read"))

    def _settle_abandoned(self, wire_ids: tuple[int, ...]) -> None:
        self._context.staging.discard(wire_ids)
        self._piece_settled()

    def _piece_settled(self) -> None:
        self._num_unsettled -= 1
        self._settle()

    def _settle(self) -> None:
        if self._over and not self._num_unsettled:
            self.settled.set()


def _with_push(landing: HandoffPhases, wire_s: float) -> HandoffPhases:
    """To the reader a push looks like waiting; the owner knows for how long its bytes moved."""
    wire_s = min(max(0.0, wire_s), landing.queue_s)
    return HandoffPhases(landing.queue_s - wire_s, landing.wire_s + wire_s, landing.verify_s)
