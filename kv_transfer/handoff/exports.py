"""ExportTable: the owner's side of every hand-off, and of every prefix that is lent. Which blocks others may read, until
when, and what they get to hear.

One per process, `async with ExportTable(...) as exports:` for its life, inside the staging and whatever gives it links; event
loop only, except `may_read` and `stage_at_once`.

Decisions that the protocol leaves open:

- A reader whose stream breaks is not reported. The prefill goes on, because its first token is the router's; the reader
  may attach again and hears everything anew; if it does not, the lease runs out and frees the blocks. A push cannot be
  had again, so with it the export ends at once.
- A second reader of one ticket is refused with LeaseExpired while the first is attached: a ticket is for one reader.
- A stream with nothing to say says so: an empty BlocksReady at least every stall_timeout_s / 3, so that a reader can
  tell a long prefill from a dead node.
- While the prefill computes, an export cannot expire: its blocks are in use anyway, and its node ends it by `fail`.
- An export that has ended keeps its blocks while something still copies or writes from them, however it ended.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Literal, Self

from kv_transfer.handoff.export import AllLent, Completion, Export, ExportStats, lease_gone
from kv_transfer.handoff.export_staging import ExportStaging
from kv_transfer.handoff.export_stream import tell
from kv_transfer.handoff.link_queue import LinkQueues, QueueStats
from kv_transfer.handoff.push import Push, PushContext, PushEvents, PushLinks, PushPath
from kv_transfer.handoff.quarantine import Quarantine
from kv_transfer.handoff.ticket_issuer import TicketIssuer
from kv_transfer.memory.staging import StagedBlocks, Staging
from protocol.errors import HeadraceError, InternalError, InvalidParameter, PeerLost, TransferError
from protocol.ids import ContextHash, Incarnation, RequestId, TicketId, WorkerId
from protocol.kv_layout import KVLayout
from protocol.phases import PrefillPhases
from protocol.tokens import SampledToken
from protocol.transfer import (
    BlocksLanded,
    BlocksReady,
    HandoffFailed,
    LeasesHeld,
    LeaseState,
    OpenHandoff,
    ReleaseLease,
    RenewLease,
    TransferTicket,
)
from protocol.wire import Hello, encode_frame
from runtime.clock import Clock
from runtime.node_config import TransferOptions

SIGNS_OF_LIFE_PER_STALL = 3
REAP_INTERVAL_S = 1.0
LOAN_TTL_STALLS = 2
ALREADY_PUSHED = "it was pushed already"
"""Whoever was pushed to may have given its blocks to another request since. A message that arrives twice must not write twice."""

Ending = Literal["released", "expired", "failed"]

log = logging.getLogger(__name__)


class ExportTable:
    """`on_released(request_id)` is called exactly once for every request's export, when its blocks are the owner's again,
    in whatever way it ended. Unknown request ids are no-ops everywhere: they are of exports that have ended. Without
    `push_links` nobody is pushed to."""

    def __init__(
        self,
        staging: Staging,
        *,
        owner: WorkerId,
        incarnation: Incarnation,
        layout: KVLayout,
        control_url: str,
        options: TransferOptions,
        clock: Clock,
        on_released: Callable[[RequestId], None],
        push_links: PushLinks | None = None,
    ) -> None:
        self._staging = staging
        self._layout = layout
        self._issuer = TicketIssuer(owner, incarnation, layout, control_url)
        self._options = options
        self._clock = clock
        self._on_released = on_released
        self._push_links = push_links
        self._by_request: dict[RequestId, Export] = {}
        self._unreleased: set[RequestId] = set()
        self._by_ticket: dict[TicketId, Export] = {}
        self._unsettled: dict[TicketId, Export] = {}
        self._endings: dict[Ending, int] = {"released": 0, "expired": 0, "failed": 0}
        self._num_opened = 0
        self._ending = False
        self._stopped = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._stager = ExportStaging(staging, self._tasks, self)
        self._quarantine = Quarantine(self._tasks)
        self._queues = LinkQueues(options.max_bytes_in_flight, staging.arena.block_bytes, staging.max_blocks, clock)
        self._push_context = PushContext(self._tasks, self._quarantine, clock, options.stall_timeout_s)

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Ends what is left and waits for the writes under way; each has its deadline."""
        self.end_all()
        self._quarantine.close()
        await self._tasks.__aexit__(None, None, None)

    def end_all(self) -> None:
        """Whoever still listens hears that this node stops, and nobody is served any more. For the end of the process, after
        draining."""
        self._ending = True
        for export in list(self._by_ticket.values()):
            self._end(export, "failed", self._stops())
        self._stop_if_settled()

    async def stop(self) -> None:
        """`end_all`, and return when nothing is being written any more. To be called before readers can take this process for
        dead: before its connections are cut and its address is given up."""
        self.end_all()
        await self._stopped.wait()

    async def presence(self, myself: Hello) -> AsyncIterator[bytes]:
        """Says who is here, and then does not end before `stop` is over: see kv_transfer.handoff.presence."""
        yield encode_frame(myself)
        await self._stopped.wait()

    def stats(self) -> ExportStats:
        return ExportStats(
            num_open=len(self._by_ticket),
            num_opened=self._num_opened,
            num_released=self._endings["released"],
            num_expired=self._endings["expired"],
            num_failed=self._endings["failed"],
            num_bytes_announced=self._stager.num_blocks_staged * self._staging.arena.block_bytes,
            num_unsettled=len(self._unsettled),
        )

    def queue_stats(self) -> QueueStats:
        """Of what is pushed."""
        return self._queues.stats()

    # The prefill node's side, in the order of a request's life.

    def open(self, request_id: RequestId, num_tokens: int, context_hash: ContextHash) -> TransferTicket:
        """A ticket for a request of `num_tokens` tokens, bound to exactly these by their hash. Raises InvalidParameter
        for a request that has one, or had one whose blocks are not the owner's again."""
        if request_id in self._unreleased:
            raise InvalidParameter(f"request {request_id} is exported already", param="request_id")
        ticket = self._issuer.issue(request_id, num_tokens, context_hash, self._options.lease_ttl_s)
        self._unreleased.add(request_id)
        self._by_request[request_id] = self._enter(ticket, partial(self._released, request_id))
        return ticket

    def _released(self, request_id: RequestId) -> None:
        self._unreleased.discard(request_id)
        self._on_released(request_id)

    def lend(
        self,
        request_id: RequestId,
        num_tokens: int,
        context_hash: ContextHash,
        block_ids: Sequence[int],
        give_back: Callable[[], None],
        on_doubt: Callable[[int], None] | None = None,
    ) -> TransferTicket:
        """A ticket to final blocks. `request_id` is the reader's; it may borrow more than once, and be exported too.
        `give_back()` is called exactly once, when the blocks are the owner's again; `on_doubt(index)` at most once, before
        that, if the reader says that this block came damaged. The lease is short: who has asked fetches at once, or
        has gone, and then nobody would return the loan."""
        ttl_s = min(self._options.lease_ttl_s, LOAN_TTL_STALLS * self._options.stall_timeout_s)
        export = self._enter(self._issuer.issue(request_id, num_tokens, context_hash, ttl_s), give_back)
        export.on_doubt = on_doubt
        export.submit(0, block_ids)
        export.finish(AllLent(), self._clock.now())
        self._stager.stage_rest(export)
        return export.ticket

    def _enter(self, ticket: TransferTicket, give_back: Callable[[], None]) -> Export:
        export = Export(ticket, give_back, scarce=not self._staging.eager)
        self._by_ticket[TicketId(ticket.ticket_id)] = export
        self._num_opened += 1
        return export

    def stage_at_once(self, block_ids: Sequence[int]) -> StagedBlocks | None:
        """Stage final blocks here and now, on whatever thread this is; None where that takes long. Saves `publish` the way
        to another thread and back, which costs more than the work when every core computes."""
        return self._staging.stage_at_once(block_ids)

    def publish(
        self, request_id: RequestId, first_block: int, block_ids: Sequence[int], staged: StagedBlocks | None = None
    ) -> None:
        """KV blocks first_block, ... of the request are final: nothing writes into them until they are released.

        Returns at once; they are announced, in this order, when they are staged: now, if they are `staged` already.
        """
        export = self._by_request.get(request_id)
        if export is None:
            return
        export.submit(first_block, block_ids)
        if staged is not None and export.num_staged == first_block:
            self._stager.staged(export, staged)
        else:
            self._stager.stage_rest(export)

    def finish(
        self,
        request_id: RequestId,
        first_token: SampledToken,
        finished: bool,
        computed_at: float,
        phases: PrefillPhases,
    ) -> None:
        """The prefill is done and everything is published. `computed_at` is an instant of our clock."""
        export = self._by_request.get(request_id)
        if export is not None:
            export.finish(Completion(first_token, finished, computed_at, phases), self._clock.now())

    def fail(self, request_id: RequestId, error: HeadraceError) -> None:
        """The prefill failed or was cancelled: whoever listens hears the error, and the blocks are released."""
        export = self._by_request.get(request_id)
        if export is not None:
            self._end(export, "failed", error)

    # The reader's side, by ticket.

    def attach(self, message: OpenHandoff) -> AsyncIterator[bytes]:
        """The hand-off as encoded frames, from block `skip_blocks` on. Raises LeaseExpired for a ticket that is
        unknown, has ended, belongs to another incarnation, has a reader attached, or was pushed already; TransferError for
        a push that cannot be."""
        if self._ending:
            raise self._stops()
        export = self._find(message.ticket_id, message.incarnation)
        if export is None:
            raise lease_gone("ticket unknown, expired, released, or of an earlier incarnation")
        if export.attached:
            raise lease_gone("another reader is attached to this ticket")
        if export.push is not None:
            raise lease_gone(ALREADY_PUSHED)
        return self._frames(export, message)

    def renew(self, message: RenewLease) -> LeasesHeld:
        """Renew those that still hold."""
        now = self._clock.now()
        exports = [self._find(ticket_id, message.incarnation) for ticket_id in message.ticket_ids]
        for export in exports:
            if export is not None:
                export.renew(now)
        return LeasesHeld(tuple(export is not None for export in exports))

    def landed(self, message: BlocksLanded) -> LeaseState:
        """The reader has leading blocks: where wire blocks are scarce, theirs are for the next ones now."""
        export = self._find(message.ticket_id, message.incarnation)
        if export is not None:
            self._stager.take_back(export, message.num_blocks)
        return LeaseState(held=export is not None, known=message.incarnation == self._issuer.incarnation)

    def release(self, message: ReleaseLease) -> LeaseState:
        """Idempotent; False says that the lease had ended before."""
        export = self._find(message.ticket_id, message.incarnation)
        if export is not None:
            if message.damaged is not None and export.on_doubt is not None:
                export.on_doubt(message.damaged)
            self._end(export, "released", None)
        ended = self._unsettled.get(TicketId(message.ticket_id))
        return LeaseState(
            held=export is not None,
            writing=ended is not None and ended.writing,
            known=message.incarnation == self._issuer.incarnation,
        )

    def may_read(self, ticket_id: TicketId, block_ids: Sequence[int]) -> bool:
        """Whether the holder of the ticket may read these wire blocks now: staged, and the lease holds. Any thread."""
        export = self._by_ticket.get(ticket_id)
        return export is not None and export.may_read(block_ids)

    # Life.

    async def run(self) -> None:
        """Reaps expired exports until cancelled."""
        while True:
            await asyncio.sleep(min(REAP_INTERVAL_S, self._options.lease_ttl_s / 4))
            self.reap()

    def reap(self) -> None:
        """End every export whose lease has run out."""
        now = self._clock.now()
        for export in [export for export in self._by_ticket.values() if export.expired(now)]:
            log.warning("%s: the lease expired; nobody released the exported blocks", export.ticket.request_id)
            self._end(export, "expired", lease_gone("the lease expired"))

    def _find(self, ticket_id: str, incarnation: str) -> Export | None:
        if incarnation != self._issuer.incarnation:
            return None
        export = self._by_ticket.get(TicketId(ticket_id))
        if export is not None and export.expired(self._clock.now()):
            self.reap()
            return None
        return export

    # What the staging tells.

    def staging_ended(self, export: Export) -> None:
        self._free_if_settled(export)

    def staging_failed(self, export: Export) -> None:
        self._end(export, "failed", InternalError("the owner could not export its KV blocks"))

    # The end.

    def _end(self, export: Export, ending: Ending, error: HeadraceError | None) -> None:
        ticket_id = TicketId(export.ticket.ticket_id)
        if self._by_request.get(RequestId(export.ticket.request_id)) is export:  # and not a loan to the same request
            del self._by_request[RequestId(export.ticket.request_id)]
        del self._by_ticket[ticket_id]
        self._unsettled[ticket_id] = export
        self._endings[ending] += 1
        export.end(error)
        if export.staging is not None:
            export.staging.cancel()
        self._free_if_settled(export)

    def _free_if_settled(self, export: Export) -> None:
        """Give the blocks back, once, when the export has ended and nothing reads them any more."""
        ticket_id = TicketId(export.ticket.ticket_id)
        if export.ended and export.settled and self._unsettled.pop(ticket_id, None) is not None:
            self._stager.free(export)
            export.give_back()
            self._stop_if_settled()

    def _stops(self) -> PeerLost:
        return PeerLost(f"{self._issuer.owner} stops")

    def _stop_if_settled(self) -> None:
        if self._ending and not self._unsettled:
            self._stopped.set()

    # The reader's stream.

    async def _frames(self, export: Export, message: OpenHandoff) -> AsyncIterator[bytes]:
        if export.attached:  # two attached before either was read from
            yield encode_frame(HandoffFailed(lease_gone("another reader is attached to this ticket").to_info(), True))
            return
        if export.push is not None:
            yield encode_frame(HandoffFailed(lease_gone(ALREADY_PUSHED).to_info(), True))
            return
        cursor = message.skip_blocks
        sign_of_life_s = self._options.stall_timeout_s / SIGNS_OF_LIFE_PER_STALL
        told_all = False
        export.attached = True
        self._stager.restart(export, cursor)
        try:
            yield encode_frame(BlocksReady(cursor, (), ()))
            if not export.ended:  # it may have been released since: nothing may be written after that
                self._start_push(export, message)
            self._stager.stage_rest(export)
            async for frames in tell(export, cursor, self._clock, sign_of_life_s):
                yield frames
            told_all = True
        except TransferError as error:
            yield encode_frame(HandoffFailed(error.to_info(), export.writing))
        finally:
            self._detach(export, told_all=told_all)

    def _detach(self, export: Export, *, told_all: bool) -> None:
        """Of a reader whose stream broke nothing is left to read what was staged for it, or to be pushed to again."""
        export.attached = False
        if export.push is not None:
            export.push.stop()
        if told_all or export.ended:
            return
        if export.push is None:
            self._stager.stop(export)
        elif not export.pushed:  # else it may have heard so and gone: then its word, or its lease, is the end
            self._end(export, "failed", PeerLost("the reader's stream broke while its blocks were pushed"))

    def _start_push(self, export: Export, message: OpenHandoff) -> None:
        """Raises TransferError for a push that cannot be. Ids outside of the reader's arena are refused by the link."""
        target = message.push
        if target is None:
            return
        if self._push_links is None:
            raise TransferError(f"{self._issuer.owner} does not push")
        num_blocks = max(0, self._layout.num_blocks_for(export.ticket.num_tokens) - message.skip_blocks)
        if len(target.block_ids) != num_blocks or len(set(target.block_ids)) != num_blocks:
            raise TransferError(f"a push of this hand-off takes {num_blocks} different blocks of the reader")
        path = PushPath(self._push_links, message.reader, message.reader_incarnation, target.transport)
        events = PushEvents(
            landed=partial(self._push_landed, export),
            failed=partial(self._push_failed, export),
            settled=partial(self._push_settled, export),
        )
        queue = self._queues.of((path.worker, path.incarnation, path.kind))
        export.push = Push(self._push_context, path, queue, message.skip_blocks, target.block_ids, events)
        export.offer_push(export.push)

    def _push_landed(self, export: Export) -> None:
        if export.push is not None:
            self._stager.take_back(export, export.push.num_landed)
        export.changed.set()

    def _push_settled(self, export: Export) -> None:
        export.changed.set()
        self._free_if_settled(export)

    def _push_failed(self, export: Export, error: TransferError) -> None:
        if not export.ended:
            self._end(export, "failed", error)
