"""ExportTable: the owner's side of every hand-off, and of every prefix that is lent. Which blocks others may read, until
when, and what they get to hear.

One per process, for its life; event loop only, except `may_read`. Blocks are announced when they have been staged
(kv_transfer.stager), in order.

Decisions that the protocol leaves open:

- A reader whose stream breaks is not reported. The prefill goes on, because its first token is the router's; the reader
  may attach again and hears everything anew; if it does not, the lease runs out and frees the blocks.
- A second reader of one ticket is refused with LeaseExpired while the first is attached: a ticket is for one reader.
- A stream with nothing to say says so: an empty BlocksReady at least every stall_timeout_s / 3, so that a reader can
  tell a long prefill from a dead node.
- While the prefill computes, an export cannot expire: its blocks are in use anyway, and its node ends it by `fail`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from kv_transfer.export import Completion, Export, Lent, lease_gone
from kv_transfer.stager import Stager
from kv_transfer.staging import StagedBlocks, Staging
from protocol.errors import HeadraceError, InternalError, InvalidParameter, PeerLost
from protocol.ids import ContextHash, Incarnation, RequestId, TicketId, WorkerId, new_ticket_id
from protocol.kv_layout import KVLayout
from protocol.phases import PrefillPhases
from protocol.tokens import SampledToken
from protocol.transfer import (
    BlocksLanded,
    BlocksReady,
    HandoffFailed,
    LeaseState,
    OpenHandoff,
    ReleaseLease,
    RenewLease,
    TransferTicket,
)
from protocol.wire import encode_frame
from runtime.clock import Clock
from runtime.node_config import TransferOptions

SIGNS_OF_LIFE_PER_STALL = 3
REAP_INTERVAL_S = 1.0
LOAN_TTL_STALLS = 2

Ending = Literal["released", "expired", "failed"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportStats:
    """Totals since start; `num_open` is now. opened = open + released + expired + failed, always."""

    num_open: int
    num_opened: int
    num_released: int
    num_expired: int
    num_failed: int
    num_bytes_announced: int


class ExportTable:
    """`on_released(request_id)` is called exactly once for every request's export, when its blocks are the owner's again,
    in whatever way it ended. Unknown request ids are no-ops everywhere: they are of exports that have ended."""

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
    ) -> None:
        self._staging = staging
        self._owner = owner
        self._incarnation = incarnation
        self._layout = layout
        self._control_url = control_url
        self._options = options
        self._clock = clock
        self._on_released = on_released
        self._by_request: dict[RequestId, Export] = {}
        self._by_ticket: dict[TicketId, Export] = {}
        self._stagers: dict[Export, Stager] = {}
        self._endings: dict[Ending, int] = {"released": 0, "expired": 0, "failed": 0}
        self._num_opened = 0
        self._num_blocks_announced = 0

    def stats(self) -> ExportStats:
        return ExportStats(
            num_open=len(self._by_ticket),
            num_opened=self._num_opened,
            num_released=self._endings["released"],
            num_expired=self._endings["expired"],
            num_failed=self._endings["failed"],
            num_bytes_announced=self._num_blocks_announced * self._staging.arena.block_bytes,
        )

    # The prefill node's side, in the order of a request's life.

    def open(self, request_id: RequestId, num_tokens: int, context_hash: ContextHash) -> TransferTicket:
        """A ticket for a request of `num_tokens` tokens, bound to exactly these by their hash. Raises InvalidParameter
        for a request that has one."""
        if request_id in self._by_request:
            raise InvalidParameter(f"request {request_id} is exported already", param="request_id")
        ticket = self._ticket(request_id, num_tokens, context_hash, self._options.lease_ttl_s)

        def give_back() -> None:
            del self._by_request[request_id]
            self._on_released(request_id)

        self._by_request[request_id] = self._enter(ticket, give_back)
        return ticket

    def lend(
        self,
        request_id: RequestId,
        num_tokens: int,
        context_hash: ContextHash,
        block_ids: Sequence[int],
        give_back: Callable[[], None],
    ) -> TransferTicket:
        """A ticket to blocks that are final already. `request_id` is the reader's; it may borrow more than once, and be
        exported too. `give_back()` is called exactly once, when the blocks are the owner's again.

        The lease is short: who has asked fetches at once, or has gone, and then nobody would return the loan."""
        ttl_s = min(self._options.lease_ttl_s, LOAN_TTL_STALLS * self._options.stall_timeout_s)
        ticket = self._ticket(request_id, num_tokens, context_hash, ttl_s)
        export = self._enter(ticket, give_back)
        self._submit(export, 0, tuple(block_ids))
        export.finish(Lent(), self._clock.now())
        return ticket

    def _ticket(
        self, request_id: RequestId, num_tokens: int, context_hash: ContextHash, ttl_s: float
    ) -> TransferTicket:
        return TransferTicket(
            ticket_id=new_ticket_id(),
            request_id=request_id,
            owner=self._owner,
            incarnation=self._incarnation,
            layout_fingerprint=self._layout.fingerprint,
            control_url=self._control_url,
            num_tokens=num_tokens,
            context_hash=context_hash,
            ttl_s=ttl_s,
        )

    def _enter(self, ticket: TransferTicket, give_back: Callable[[], None]) -> Export:
        export = Export(ticket, give_back, scarce=not self._staging.eager)
        self._by_ticket[TicketId(ticket.ticket_id)] = export
        self._stagers[export] = Stager(
            self._staging, partial(self._announce, export), partial(self._cannot_stage, export)
        )
        self._num_opened += 1
        return export

    def publish(self, request_id: RequestId, first_block: int, block_ids: Sequence[int]) -> None:
        """Blocks first_block, ... of the request are final: nothing writes into them until they are released.

        Returns at once; they are announced in this order when they have been staged. Block ids are the engine's.
        """
        export = self._by_request.get(request_id)
        if export is not None and block_ids:
            self._submit(export, first_block, tuple(block_ids))

    def _submit(self, export: Export, first_block: int, block_ids: tuple[int, ...]) -> None:
        export.submit(first_block, len(block_ids))
        self._stagers[export].publish(block_ids)

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
        unknown, has ended, belongs to another incarnation, or has a reader attached."""
        export = self._find(message.ticket_id, message.incarnation)
        if export is None:
            raise lease_gone("ticket unknown, expired, released, or of an earlier incarnation")
        if export.attached:
            raise lease_gone("another reader is attached to this ticket")
        return self._frames(export, message.skip_blocks)

    def renew(self, message: RenewLease) -> LeaseState:
        export = self._find(message.ticket_id, message.incarnation)
        if export is None:
            return LeaseState(held=False)
        export.renew(self._clock.now())
        return LeaseState(held=True)

    def landed(self, message: BlocksLanded) -> LeaseState:
        """The reader has leading blocks: where their memory is scarce it is for the next ones now."""
        export = self._find(message.ticket_id, message.incarnation)
        if export is None:
            return LeaseState(held=False)
        export.withdraw(self._stagers[export].landed(message.num_blocks))
        return LeaseState(held=True)

    def release(self, message: ReleaseLease) -> LeaseState:
        """Idempotent; False says that the lease had ended before."""
        export = self._find(message.ticket_id, message.incarnation)
        if export is None:
            return LeaseState(held=False)
        self._end(export, "released", None)
        return LeaseState(held=True)

    def may_read(self, ticket_id: TicketId, block_ids: Sequence[int]) -> bool:
        """Whether the holder of the ticket may read these blocks now: announced, and the lease holds. Any thread."""
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

    async def close(self) -> None:
        """End what is left, as failed. For the end of the process, after draining."""
        for export in list(self._by_ticket.values()):
            self._end(export, "failed", PeerLost(f"{self._owner} stops"))

    def _find(self, ticket_id: str, incarnation: str) -> Export | None:
        if incarnation != self._incarnation:
            return None
        export = self._by_ticket.get(TicketId(ticket_id))
        if export is not None and export.expired(self._clock.now()):
            self.reap()
            return None
        return export

    def _announce(self, export: Export, first_block: int, staged: StagedBlocks) -> None:
        assert first_block == export.num_announced, f"block {first_block} is staged after {export.num_announced}"
        export.announce(staged.wire_ids, staged.checksums)
        self._num_blocks_announced += len(staged.wire_ids)

    def _cannot_stage(self, export: Export, error: Exception) -> None:
        if not export.ended:
            log.error("%s: cannot export its blocks", export.ticket.request_id, exc_info=error)
            self._end(export, "failed", InternalError("the owner could not export its KV blocks"))

    def _end(self, export: Export, ending: Ending, error: HeadraceError | None) -> None:
        del self._by_ticket[TicketId(export.ticket.ticket_id)]
        self._endings[ending] += 1
        self._stagers.pop(export).end()
        export.end(error)
        export.give_back()

    async def _frames(self, export: Export, cursor: int) -> AsyncIterator[bytes]:
        if export.attached:  # two attached before either was read from
            yield encode_frame(HandoffFailed(lease_gone("another reader is attached to this ticket").to_info()))
            return
        export.attached = True
        if not self._staging.eager and not export.ended:
            self._stagers[export].attach(cursor)
            export.restart(cursor)
        told_all = False
        sign_of_life_s = self._options.stall_timeout_s / SIGNS_OF_LIFE_PER_STALL
        try:
            yield encode_frame(BlocksReady(cursor, (), ()))
            while True:
                export.changed.clear()
                message = export.next_message(cursor, self._clock.now())
                if message is not None:
                    yield encode_frame(message)
                    if not isinstance(message, BlocksReady):
                        told_all = True
                        return
                    cursor += len(message.block_ids)
                elif export.ended:
                    return
                elif not await _set_within(export.changed, sign_of_life_s):
                    yield encode_frame(BlocksReady(cursor, (), ()))
        finally:
            export.attached = False
            if not told_all and not export.ended:  # the stream broke: nobody reads what was staged for it
                export.withdraw(self._stagers[export].detach())


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
