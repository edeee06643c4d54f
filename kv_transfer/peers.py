"""Peers: the owners that a reader has met. Meets each incarnation once, whoever asks first; forgets it when it is lost.

A meeting has two phases. Nothing of a peer is decoded before its Hello has shown a wire version we speak, and nothing
of its transport metadata is used before it is verified. Meetings of one peer that coincide are one meeting. A failed
one is not remembered: the next use tries again.
"""

import asyncio
import logging
from dataclasses import dataclass

from kv_transfer.device_arena import Arena
from kv_transfer.routes import CONNECT_PATH, HELLO_PATH
from kv_transfer.transport import Link, Transport, check_introduction, find_endpoint, introduce
from protocol.errors import HeadraceError, LayoutMismatch, LeaseExpired, NodeLost, PeerLost, TransferError
from protocol.ids import Incarnation, WorkerId
from protocol.kv_layout import KVLayout
from protocol.transfer import Introduction, TransferTicket
from protocol.wire import Hello, check_wire_version
from runtime.rpc_client import RpcClient

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reader:
    """Who we are to our peers."""

    worker_id: WorkerId
    incarnation: Incarnation
    layout: KVLayout


_Meeting = asyncio.Task[Link | TransferError]


class Peers:
    """`tasks` is the group that meetings and farewells run in; it must outlive this. Event loop only."""

    def __init__(
        self,
        client: RpcClient,
        transport: Transport,
        arena: Arena,
        reader: Reader,
        timeout_s: float,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._client = client
        self._transport = transport
        self._arena = arena
        self._reader = reader
        self._timeout_s = timeout_s
        self._tasks = tasks
        self._meetings: dict[tuple[str, str], _Meeting] = {}
        """By control URL and incarnation."""

    @property
    def num_known(self) -> int:
        return len(self._meetings)

    async def link(self, ticket: TransferTicket) -> Link:
        """The link to the ticket's owner, meeting it first if need be. Raises TransferError."""
        key = (ticket.control_url, ticket.incarnation)
        meeting = self._meetings.get(key)
        if meeting is None:
            meeting = self._meetings[key] = self._tasks.create_task(self._meet(ticket), name=f"kv-meet:{ticket.owner}")
        outcome = await asyncio.shield(meeting)
        if isinstance(outcome, TransferError):
            if self._meetings.get(key) is meeting:
                del self._meetings[key]
            raise outcome
        return outcome

    def forget(self, ticket: TransferTicket) -> None:
        """The owner is lost: close the link to this life of it, if there is one. The next use meets it anew."""
        self._forget((ticket.control_url, ticket.incarnation))

    def close(self) -> None:
        """Close every link, in the task group."""
        for key in list(self._meetings):
            self._forget(key)

    async def _meet(self, ticket: TransferTicket) -> Link | TransferError:
        """Never raises what a peer can cause: this runs in a group that others depend on."""
        try:
            peer = await self._introduce(ticket)
            check_introduction(peer, incarnation=Incarnation(ticket.incarnation), layout=self._reader.layout)
            link = await self._transport.connect(peer, find_endpoint(peer, self._transport.kind))
        except HeadraceError as error:
            log.warning("cannot read KV from %s: %s", ticket.owner, error.message)
            return as_transfer_error(error)
        except Exception:
            log.exception("meeting %s failed", ticket.owner)
            return TransferError(f"meeting {ticket.owner} failed; see this process's log")
        log.info("reading KV from %s (%s) by %s", ticket.owner, ticket.control_url, self._transport.kind)
        for url, incarnation in list(self._meetings):
            if url == ticket.control_url and incarnation != ticket.incarnation:
                self._forget((url, incarnation))  # who answers there now has shown that the earlier life is over
        return link

    async def _introduce(self, ticket: TransferTicket) -> Introduction:
        hello = await self._client.get(ticket.control_url + HELLO_PATH, Hello, self._timeout_s)
        check_wire_version(hello.wire_version, ticket.owner)
        if hello.incarnation != ticket.incarnation:
            raise LeaseExpired(f"{ticket.owner} restarted; its earlier exports are gone")
        reader = self._reader
        message = introduce(reader.worker_id, reader.incarnation, reader.layout, self._arena, [self._transport])
        url = ticket.control_url + CONNECT_PATH
        if hello.layout_fingerprint != self._reader.layout.fingerprint:
            await self._client.notify(url, message, self._timeout_s)  # refused, with the fields that differ
            raise LayoutMismatch(f"KV of {ticket.owner} has the fingerprint {hello.layout_fingerprint}, not ours")
        return await self._client.call(url, message, Introduction, self._timeout_s)

    def _forget(self, key: tuple[str, str]) -> None:
        meeting = self._meetings.pop(key, None)
        if meeting is not None:
            self._tasks.create_task(_close(meeting), name="kv-goodbye")


async def _close(meeting: _Meeting) -> None:
    outcome = await meeting
    if not isinstance(outcome, TransferError):
        try:
            await outcome.close()
        except TransferError as error:
            log.info("a link did not close cleanly: %s", error.message)


def as_transfer_error(error: HeadraceError) -> TransferError:
    """What a failure of any kind means to a hand-off. The original stays the cause."""
    if isinstance(error, TransferError):
        return error
    kind = PeerLost if isinstance(error, NodeLost) else TransferError
    mapped = kind(error.message)
    mapped.__cause__ = error
    return mapped
