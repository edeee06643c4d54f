"""Presence: whether an owner that may write into our blocks still lives.

    opened, and held open for as long as both live -> cut -> opened again, by the same incarnation, or it is dead

One connection to each owner that pushes, opened before the first push is asked for. When a process dies its kernel cuts its
connections, also if it stood still before; a network may cut them too. So a cut alone proves nothing. After it either the
same incarnation answers again; or nobody listens at its address any more, or another incarnation does: then it is dead.
An owner that stops in good order ends its writes first (ExportTable.stop), so what looks like its death says as much.
"""

import asyncio
import errno
import logging
from contextlib import AsyncExitStack

from kv_transfer.routes import PRESENCE_PATH
from protocol.errors import HeadraceError, LeaseExpired, NodeLost, PeerLost
from protocol.transfer import TransferTicket
from protocol.wire import Hello, decode
from runtime.rpc_client import RpcClient

FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 5.0

log = logging.getLogger(__name__)

_Owner = tuple[str, str]
"""Control URL and incarnation."""


class Presence:
    """Of one owner in one life of it. Made by Presences."""

    def __init__(self) -> None:
        self.num_users = 0
        self.here = asyncio.Event()
        """The connection stands."""
        self.dead = asyncio.Event()
        """Proven: it has died, and starts no more writes."""
        self.restarted = False
        """Somebody else answers at its address: its next life."""

    async def seen(self) -> None:
        """Return once the connection stands. Raises PeerLost if that will never be, LeaseExpired if the owner restarted."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.here, self.dead)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.restarted:
            raise LeaseExpired("the owner restarted; its earlier exports are gone")
        if self.dead.is_set():
            raise PeerLost("the owner has died")


class Presences:
    """One per reader, for its life; event loop only. `tasks` is the group that connections are held in."""

    def __init__(self, client: RpcClient, reader: Hello, timeout_s: float, tasks: asyncio.TaskGroup) -> None:
        self._client = client
        self._reader = reader
        self._timeout_s = timeout_s
        self._tasks = tasks
        self._presences: dict[_Owner, Presence] = {}
        self._watching: set[asyncio.Task[None]] = set()

    def take(self, ticket: TransferTicket) -> Presence:
        """The presence of this ticket's owner, watched until `let_go`: await `seen` before a push is asked for."""
        owner = (ticket.control_url, ticket.incarnation)
        presence = self._presences.get(owner)
        if presence is None:
            presence = self._presences[owner] = Presence()
            watching = self._tasks.create_task(self._watch(owner, presence), name=f"kv-presence:{ticket.owner}")
            self._watching.add(watching)
            watching.add_done_callback(self._watching.discard)
        presence.num_users += 1
        return presence

    def let_go(self, presence: Presence) -> None:
        """No push of this user is unsettled. The connection stays for the next one, until it is cut."""
        presence.num_users -= 1

    def close(self) -> None:
        for task in self._watching:
            task.cancel()

    async def _watch(self, owner: _Owner, presence: Presence) -> None:
        """Until it is dead, or cut and of no use to anybody. Raises nothing: the group that it runs in is everybody's."""
        pause_s = FIRST_PAUSE_S
        while presence.num_users and not presence.dead.is_set():
            try:
                await self._stay_connected(owner, presence)
            except HeadraceError as error:
                log.info("%s is not seen: %s", owner[0], error.message)
                if _nobody_listens(error):
                    presence.dead.set()
            if presence.here.is_set():
                presence.here.clear()
                pause_s = FIRST_PAUSE_S
            if not presence.dead.is_set():
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        del self._presences[owner]

    async def _stay_connected(self, owner: _Owner, presence: Presence) -> None:
        """Return or raise HeadraceError when the connection is cut, or did not come to be."""
        url, incarnation = owner
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._timeout_s):
                    opening = self._client.stream(url + PRESENCE_PATH, self._reader, idle_timeout_s=None)
                    frames = await stack.enter_async_context(opening)
                    hello = decode(await anext(frames), Hello)
            except TimeoutError as error:
                raise NodeLost(f"{url} was silent for {self._timeout_s:g} s") from error
            except StopAsyncIteration:
                raise NodeLost(f"{url} does not stay") from None
            if hello.incarnation != incarnation:
                presence.restarted = True
                presence.dead.set()
                return
            presence.here.set()
            async for _ in frames:
                log.debug("%s says more than it was asked for", url)


def _nobody_listens(error: HeadraceError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno == errno.ECONNREFUSED
