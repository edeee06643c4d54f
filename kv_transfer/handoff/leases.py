"""Leases: the reader's side of every lease: kept while something is wanted, given back when it is not.

Kept leases are renewed RENEWALS_PER_TTL times per ttl, those of one owner in one message. One that is released while the
owner pushes is asked after until the owner says that its last write has ended, or has died (kv_transfer.handoff.presence).
After its death as long passes as a message may take, for what the network still holds. Without either the blocks stay in
quarantine, are counted, and come back with the reader's restart.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from kv_transfer.handoff.presence import Presence
from kv_transfer.routes import RELEASE_PATH, RENEW_PATH
from protocol.errors import HeadraceError
from protocol.ids import TicketId
from protocol.transfer import LeasesHeld, LeaseState, ReleaseLease, RenewLease, TransferTicket
from runtime.rpc_client import RpcClient

RENEWALS_PER_TTL = 3
RELEASE_ATTEMPTS = 3
RELEASE_PAUSE_S = 0.2
MAX_PUSH_PAUSE_S = 5.0

log = logging.getLogger(__name__)

_Owner = tuple[str, str]
"""Control URL and incarnation."""


@dataclass(frozen=True, slots=True)
class _Kept:
    ticket: TransferTicket
    on_lost: Callable[[], None]


class Leases:
    """One per reader, for its life; event loop only. `tasks` is the group that messages are sent in."""

    def __init__(self, client: RpcClient, timeout_s: float, tasks: asyncio.TaskGroup) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._tasks = tasks
        self._kept: dict[_Owner, dict[TicketId, _Kept]] = {}
        self._renewing: dict[_Owner, asyncio.Task[None]] = {}

    def keep(self, ticket: TransferTicket, on_lost: Callable[[], None]) -> None:
        """Renew this lease until `drop`. `on_lost` is called if the owner says that it has ended. Who keeps it already is
        replaced."""
        owner = (ticket.control_url, ticket.incarnation)
        self._kept.setdefault(owner, {})[TicketId(ticket.ticket_id)] = _Kept(ticket, on_lost)
        if owner not in self._renewing:
            self._renewing[owner] = self._tasks.create_task(self._renew(owner), name=f"kv-renew:{ticket.owner}")

    def drop(self, ticket: TransferTicket) -> None:
        """Let it run out. Unknown tickets are no error."""
        owner = (ticket.control_url, ticket.incarnation)
        kept = self._kept.get(owner, {})
        kept.pop(TicketId(ticket.ticket_id), None)
        if not kept and owner in self._renewing:
            del self._kept[owner]
            self._renewing.pop(owner).cancel()

    async def release(self, ticket: TransferTicket, damaged: int | None = None) -> bool | None:
        """Whether the lease still held, None if the owner did not say. Tries a little; the lease's end does the rest.
        `damaged`: see ReleaseLease. Raises nothing: the group that this runs in is everybody's."""
        for attempt in range(RELEASE_ATTEMPTS):
            if attempt:
                await asyncio.sleep(RELEASE_PAUSE_S)
            try:
                return (await self._say_released(ticket, damaged)).held
            except HeadraceError as error:
                log.info("%s: the lease was not released: %s", ticket.request_id, error.message)
        return None

    async def release_push(self, ticket: TransferTicket, presence: Presence, damaged: int | None = None) -> None:
        """Return when no more bytes of the owner's push can land here. That may be never: see above."""
        pause_s = RELEASE_PAUSE_S
        while not presence.dead.is_set():
            try:
                state = await self._say_released(ticket, damaged)
            except HeadraceError as error:
                log.info("%s: its push was not released: %s", ticket.request_id, error.message)
            else:
                if state.known and not state.writing:
                    return
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await presence.dead.wait()
            pause_s = min(2 * pause_s, MAX_PUSH_PAUSE_S)
        log.warning("%s: %s died while it pushed", ticket.request_id, ticket.owner)
        await asyncio.sleep(self._timeout_s)

    def close(self) -> None:
        for task in self._renewing.values():
            task.cancel()

    async def _say_released(self, ticket: TransferTicket, damaged: int | None) -> LeaseState:
        message = ReleaseLease(ticket.ticket_id, ticket.incarnation, damaged)
        return await self._client.call(ticket.control_url + RELEASE_PATH, message, LeaseState, self._timeout_s)

    async def _renew(self, owner: _Owner) -> None:
        """Until cancelled, which happens when the last lease of this owner is dropped."""
        url, incarnation = owner
        while True:
            await asyncio.sleep(min(kept.ticket.ttl_s for kept in self._kept[owner].values()) / RENEWALS_PER_TTL)
            asked = dict(self._kept[owner])
            message = RenewLease(tuple(asked), incarnation)
            try:
                answer = await self._client.call(url + RENEW_PATH, message, LeasesHeld, self._timeout_s)
            except HeadraceError as error:
                log.info("%d leases of %s were not renewed: %s", len(asked), url, error.message)
                continue
            for (ticket_id, kept), held in zip(asked.items(), answer.held, strict=False):
                if not held and self._kept.get(owner, {}).get(ticket_id) is kept:
                    kept.on_lost()
