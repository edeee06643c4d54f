"""Registration: a node's membership in its routers, kept up for as long as the node lives.

For each router: register, then heartbeat at the interval the router asked for; register again when it does not know us
(it restarted) or when it was away. Losing a router changes nothing on the node: its token stream says so already.

A router may refuse a node, such as one whose KV the nodes that are there cannot read. The node says so and is of no use
meanwhile, but asks again: the other node may be the one that is about to be replaced.
"""

import asyncio
import logging
from collections.abc import Callable

from protocol.errors import HeadraceError, LayoutMismatch, ProtocolError, RequestError
from protocol.kv_events import KVEventBatch
from protocol.workers import Heartbeat, HeartbeatReply, Leave, Registered, WorkerInfo, WorkerLoad
from runtime.rpc_client import RpcClient

CALL_TIMEOUT_S = 3.0
RETRY_S = 0.5
REFUSED_RETRY_S = 5.0

REFUSALS = (LayoutMismatch, ProtocolError, RequestError)
"""What a router answers to a node that it cannot use as it is; it does not help to ask soon again."""

log = logging.getLogger(__name__)


class KVEventFeed:
    """What registration needs of the engine's KV events: new ones, or all of them as a snapshot.

    `take()` drains the events since the last call (None if there are none); `snapshot()` describes the whole cache.
    """

    def __init__(self, take: Callable[[], KVEventBatch | None], snapshot: Callable[[], KVEventBatch]) -> None:
        self.take = take
        self.snapshot = snapshot


class Registration:
    """`run()` for the node's whole life, in a task; `leave()` when it drains."""

    def __init__(
        self,
        client: RpcClient,
        router_urls: tuple[str, ...],
        info: WorkerInfo,
        load: Callable[[], WorkerLoad],
        kv_events: KVEventFeed | None = None,
    ) -> None:
        self._client = client
        self._router_urls = router_urls
        self._info = info
        self._load = load
        self._kv_events = kv_events
        self._registered_with: set[str] = set()
        self._asked: set[str] = set()
        self._refusals: dict[str, str] = {}
        self._leaving = False

    @property
    def registered_with(self) -> frozenset[str]:
        return frozenset(self._registered_with)

    def obstacle(self) -> str | None:
        """Why no router uses this node: one refuses it, or none has been asked yet. None when a router has taken it, and
        when the routers are merely away."""
        if self._registered_with:
            return None
        if self._refusals:
            return "; ".join(_refused(url, message) for url, message in sorted(self._refusals.items()))
        return None if self._asked.issuperset(self._router_urls) else "registering with the routers"

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for url in self._router_urls:
                tasks.create_task(self._keep_registered(url), name=f"registration:{url}")

    async def leave(self) -> None:
        """Tell the routers to send nothing new. A router that cannot be told will notice by itself."""
        self._leaving = True
        await asyncio.gather(*(self._leave(url) for url in sorted(self._registered_with)))

    async def _leave(self, url: str) -> None:
        message = Leave(self._info.worker_id, self._info.incarnation)
        try:
            await self._client.notify(f"{url}/internal/v1/workers/leave", message, CALL_TIMEOUT_S)
        except HeadraceError as error:
            log.info("could not say goodbye to router %s: %s", url, error.message)

    async def _keep_registered(self, url: str) -> None:
        complained = False
        while True:
            pause_s = RETRY_S
            try:
                interval_s = await self._register(url)
                complained = False
                if interval_s is None:
                    pause_s = REFUSED_RETRY_S
                else:
                    await self._heartbeat(url, interval_s)
            except HeadraceError as error:
                if not complained and not self._leaving:
                    log.warning("router %s does not answer, trying again: %s", url, error.message)
                complained = True
            self._asked.add(url)
            self._registered_with.discard(url)
            await asyncio.sleep(pause_s)

    async def _register(self, url: str) -> float | None:
        """The heartbeat interval in seconds, None if the router refuses this node. Raises HeadraceError if it does not
        answer, which takes back no refusal."""
        try:
            answer = await self._client.call(
                f"{url}/internal/v1/workers/register", self._info, Registered, CALL_TIMEOUT_S
            )
        except REFUSALS as error:
            if self._refusals.get(url) != error.message and not self._leaving:
                log.error("%s", _refused(url, error.message))
            self._refusals[url] = error.message
            return None
        log.info("registered with router %s", url)
        self._refusals.pop(url, None)
        self._registered_with.add(url)
        return answer.heartbeat_interval_s

    async def _heartbeat(self, url: str, interval_s: float) -> None:
        """Returns when the router no longer knows us."""
        resync = True
        while True:
            message = Heartbeat(
                worker_id=self._info.worker_id,
                incarnation=self._info.incarnation,
                load=self._load(),
                kv_events=self._events(resync),
            )
            reply = await self._client.call(
                f"{url}/internal/v1/workers/heartbeat", message, HeartbeatReply, CALL_TIMEOUT_S
            )
            if not reply.known:
                return
            resync = reply.resync
            await asyncio.sleep(interval_s)

    def _events(self, resync: bool) -> KVEventBatch | None:
        if self._kv_events is None:
            return None
        return self._kv_events.snapshot() if resync else self._kv_events.take()


def _refused(url: str, message: str) -> str:
    return f"router {url} refuses this node: {message}"
