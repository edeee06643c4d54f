"""Peers: the owners that a reader has met. Meets each incarnation once, whoever asks first; forgets it when it is lost.

A meeting has two phases. Nothing of a peer is decoded before its Hello has shown a wire version we speak, and nothing
of its transport metadata is used before it is verified; then the transports are tried (kv_transfer.meeting.meeting). Meetings of
one peer that coincide are one meeting. A failed one is not remembered: the next use tries again.

An owner that left says nothing to its readers, and one that restarts may come back under another address. So owners that
are not used are looked at now and then, and forgotten with all that is held for them: links, mapped memory, metrics.
"""

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kv_transfer.meeting.meeting import Meeting, PeerLink
from kv_transfer.routes import CONNECT_PATH, HELLO_PATH
from kv_transfer.transport import check_introduction, close_link
from kv_transfer.transports.transport_set import TransportSet
from protocol.errors import HeadraceError, LayoutMismatch, LeaseExpired, NodeLost, PeerLost, TransferError
from protocol.ids import Incarnation, WorkerId
from protocol.kv_layout import KVLayout
from protocol.transfer import Introduction
from protocol.wire import Hello, check_wire_version
from runtime.clock import Clock
from runtime.node_config import TransferOptions
from runtime.rpc_client import RpcClient

OWNER_IDLE_S = 900.0
LOOK_INTERVAL_S = 60.0
"""How often an owner that is not used is asked whether it is still there, in the same life."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reader:
    """Who we are to our peers."""

    worker_id: WorkerId
    incarnation: Incarnation
    layout: KVLayout


_Meeting = asyncio.Task[PeerLink | TransferError]
_Key = tuple[str, str]
"""Control URL and incarnation."""


@dataclass(slots=True)
class _KnownOwner:
    meeting: _Meeting
    used_at: float


class Peers:
    """`tasks` is the group that meetings and farewells run in; it must outlive this. `prefers_pull`: see Meeting. Event loop
    only."""

    def __init__(
        self,
        client: RpcClient,
        transports: TransportSet,
        reader: Reader,
        options: TransferOptions,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        *,
        prefers_pull: bool = False,
    ) -> None:
        self._prefers_pull = prefers_pull
        self._client = client
        self._transports = transports
        self._reader = reader
        self._options = options
        self._clock = clock
        self._tasks = tasks
        self._owners: dict[_Key, _KnownOwner] = {}
        self._num_uses: Counter[_Key] = Counter()
        """Under way. Those that have none are left out."""
        self._tidying: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look after owners, in the task group, until `close`."""
        self._tidying = self._tasks.create_task(self._tidy(), name="kv-owners")

    @property
    def num_known(self) -> int:
        return len(self._owners)

    def links(self) -> list[PeerLink]:
        """Of all peers that have been met and not been lost since."""
        outcomes = (owner.meeting.result() for owner in self._owners.values() if owner.meeting.done())
        return [outcome for outcome in outcomes if isinstance(outcome, PeerLink)]

    async def meet(self, control_url: str, incarnation: str, worker: str) -> PeerLink:
        """The way to an owner in this life of it, after meeting it if need be. Raises TransferError."""
        key = (control_url, incarnation)
        owner = self._owners.get(key)
        if owner is None:
            meeting = self._tasks.create_task(self._meet(control_url, incarnation, worker), name=f"kv-meet:{worker}")
            owner = self._owners[key] = _KnownOwner(meeting, self._clock.now())
            meeting.add_done_callback(functools.partial(self._drop_failed, key))
        owner.used_at = self._clock.now()
        outcome = await asyncio.shield(owner.meeting)
        if isinstance(outcome, TransferError):
            raise outcome
        return outcome

    @contextmanager
    def using(self, control_url: str, incarnation: str) -> Iterator[None]:
        """Within, this life of an owner is not forgotten for want of use, whether it has been met before or is now."""
        key = (control_url, incarnation)
        self._num_uses[key] += 1
        try:
            yield
        finally:
            self._num_uses[key] -= 1
            if not self._num_uses[key]:
                del self._num_uses[key]
            if (owner := self._owners.get(key)) is not None:
                owner.used_at = self._clock.now()

    def forget(self, control_url: str, incarnation: str) -> None:
        """The owner is lost: close the link to this life of it, if there is one. The next use meets it anew."""
        owner = self._owners.pop((control_url, incarnation), None)
        if owner is not None:
            self._tasks.create_task(_close(owner.meeting), name="kv-goodbye")

    def close(self) -> None:
        """Close every link, in the task group."""
        if self._tidying is not None:
            self._tidying.cancel()
        for control_url, incarnation in list(self._owners):
            self.forget(control_url, incarnation)

    async def tidy(self) -> None:
        """Forget owners that were not used for OWNER_IDLE_S, and of those not used for LOOK_INTERVAL_S the ones that do not
        answer, or in another life."""
        now = self._clock.now()
        idle_s = {key: now - owner.used_at for key, owner in self._owners.items() if self._is_unused(key, owner)}
        for key in [key for key, seconds in idle_s.items() if seconds >= OWNER_IDLE_S]:
            self.forget(*key)
        to_look_at = [key for key, seconds in idle_s.items() if LOOK_INTERVAL_S <= seconds < OWNER_IDLE_S]
        await asyncio.gather(*(self._look_at(key) for key in to_look_at))

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            await self.tidy()

    def _is_unused(self, key: _Key, owner: _KnownOwner) -> bool:
        return owner.meeting.done() and key not in self._num_uses

    async def _look_at(self, key: _Key) -> None:
        owner = self._owners[key]
        used_at = owner.used_at
        control_url, incarnation = key
        try:
            hello = await self._client.get(control_url + HELLO_PATH, Hello, self._options.stall_timeout_s)
        except HeadraceError as error:
            problem = error.message
        else:
            if hello.incarnation == incarnation:
                return
            problem = f"it is in incarnation {hello.incarnation} now"
        used_since = owner.used_at != used_at or not self._is_unused(key, owner)
        if not used_since and self._owners.get(key) is owner:
            log.info("forgetting the owner of KV at %s: %s", control_url, problem)
            self.forget(control_url, incarnation)

    async def _meet(self, control_url: str, incarnation: str, worker: str) -> PeerLink | TransferError:
        """Never raises what a peer can cause: this runs in a group that others depend on."""
        try:
            reader = self._reader
            ours = self._transports.introduce(reader.worker_id, reader.incarnation, reader.layout)
            owner = await self._introduce(ours, control_url, incarnation, worker)
            check_introduction(owner, incarnation=Incarnation(incarnation), layout=reader.layout)
            meeting = Meeting(
                self._transports,
                self._client,
                self._options,
                ours,
                owner,
                control_url,
                prefers_pull=self._prefers_pull,
            )
            peer = await meeting.hold(self._clock.now())
        except HeadraceError as error:
            log.warning("cannot read KV from %s: %s", worker, error.message)
            return as_transfer_error(error)
        except Exception:
            log.exception("meeting %s failed", worker)
            return TransferError(f"meeting {worker} failed; see this process's log")
        log.info("KV comes from %s (%s) by %s", worker, control_url, peer.choice.why)
        if peer.choice.warning is not None:
            log.warning("KV from %s: %s", worker, peer.choice.warning)
        for url, other in list(self._owners):
            if url == control_url and other != incarnation:
                self.forget(url, other)  # who answers there now has shown that the earlier life is over
        return peer

    async def _introduce(self, ours: Introduction, control_url: str, incarnation: str, worker: str) -> Introduction:
        timeout_s = self._options.stall_timeout_s
        hello = await self._client.get(control_url + HELLO_PATH, Hello, timeout_s)
        check_wire_version(hello.wire_version, worker)
        if hello.incarnation != incarnation:
            raise LeaseExpired(f"{worker} restarted; its earlier exports are gone")
        url = control_url + CONNECT_PATH
        if hello.layout_fingerprint != ours.layout.fingerprint:
            await self._client.notify(url, ours, timeout_s)  # refused, with the fields that differ
            raise LayoutMismatch(f"KV of {worker} has the fingerprint {hello.layout_fingerprint}, not ours")
        return await self._client.call(url, ours, Introduction, timeout_s)

    def _drop_failed(self, key: _Key, meeting: _Meeting) -> None:
        """Whether or not anybody is still waiting for it: else the next to ask would hear of an old failure."""
        failed = meeting.cancelled() or isinstance(meeting.result(), TransferError)
        owner = self._owners.get(key)
        if failed and owner is not None and owner.meeting is meeting:
            del self._owners[key]


async def _close(meeting: _Meeting) -> None:
    outcome = await meeting
    if isinstance(outcome, PeerLink) and outcome.link is not None:
        await close_link(outcome.link)


def as_transfer_error(error: HeadraceError) -> TransferError:
    """What a failure of any kind means to a hand-off. The original stays the cause."""
    if isinstance(error, TransferError):
        return error
    kind = PeerLost if isinstance(error, NodeLost) else TransferError
    mapped = kind(error.message)
    mapped.__cause__ = error
    return mapped
