"""NodeShell: a node process around its engine, the same for both roles.

    serve the control routes -> register with the routers -> ready -> (SIGTERM) -> leave, stop admitting -> wait for what
    runs and for the leases on what was exported -> end the token streams -> say farewell to peers -> stopped

A role brings its routes and answers the shell's questions (NodeRole); the shell knows nothing of engines or transfers.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, Protocol
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.routing import Route

from protocol.errors import Draining
from protocol.ids import Incarnation, RequestId, RouterId
from protocol.requests import CancelRequest
from protocol.tokens import OpenTokenStream
from protocol.transfer import TransportKind
from protocol.wire import WIRE_VERSION
from protocol.workers import Role, WorkerInfo, WorkerLoad
from runtime.health import health_routes
from runtime.life import Phase, ProcessLife
from runtime.node_config import NodeConfig
from runtime.registration import KVEventFeed, Registration
from runtime.rpc_client import RpcClient
from runtime.rpc_server import message_route, stream_route
from runtime.served_model import ServedModel
from runtime.serving import announce, serve_sockets
from runtime.token_outbox import TokenOutbox

REPORT_INTERVAL_S = 1.0
DRAIN_POLL_S = 0.05

log = logging.getLogger(__name__)


class NodeRole(Protocol):
    """What distinguishes one node from another. Everything is called on the event loop."""

    def routes(self) -> list[Route]:
        """The role's own control routes."""
        ...

    def cancel(self, request_ids: Iterable[RequestId]) -> None:
        """Stop these requests and free what they hold."""
        ...

    def load(self) -> WorkerLoad: ...

    def stuck(self) -> str | None:
        """Why the engine makes no progress, None while it does or has nothing to do."""
        ...

    def idle(self) -> bool:
        """Nothing runs here and nobody holds a lease on what ran here."""
        ...

    async def farewell(self) -> None:
        """End what goes on between this node and its peers, and return when it has ended: whatever became of the drain, this
        node now stops to answer."""
        ...

    def report(self) -> None:
        """Bring the metrics up to date. Called before each scrape and once a second."""
        ...


class NodeShell:
    """Made once its socket is bound, so that `info` carries the address that peers are to use."""

    def __init__(self, config: NodeConfig, info: WorkerInfo, life: ProcessLife, registry: CollectorRegistry) -> None:
        self._config = config
        self._info = info
        self._life = life
        self._registry = registry
        self._role: NodeRole | None = None
        self._drained = False
        self.outbox = TokenOutbox(self._on_lost)

    @property
    def draining(self) -> bool:
        return self._life.phase >= Phase.DRAINING

    def check_admitting(self) -> None:
        """Raise Draining once the node has begun to drain."""
        if self.draining:
            raise Draining(f"{self._info.worker_id} is draining; send this request to another node")

    async def run(
        self,
        bound: socket.socket,
        role: NodeRole,
        client: RpcClient,
        kv_events: KVEventFeed,
        *duties: Coroutine[Any, Any, None],
    ) -> None:
        """From the first served request to the last; takes over the socket. Returns when the life has ended.

        `duties` are what the role has to do all the while; they never end by themselves, and their failure is the node's.
        """
        self._role = role
        registration = Registration(client, self._config.routers, self._info, role.load, kv_events)
        app = Starlette(routes=self._routes(role, registration))
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(registration.run(), name="registration"),
                tasks.create_task(self._report(role), name="report"),
                *(tasks.create_task(duty, name="duty") for duty in duties),
            ]

            async def drain() -> None:
                await registration.leave()
                while not role.idle():  # noqa: ASYNC110  # the engine ends on its own thread and has no event for it
                    await asyncio.sleep(DRAIN_POLL_S)
                self._drained = True
                self.outbox.close()

            def listening(urls: list[str]) -> None:
                self._life.ready()
                announce(self._info.role, urls[0], worker_id=self._info.worker_id)

            try:
                timeout_s = self._config.drain_timeout_s
                await serve_sockets([(app, bound)], self._life, drain, timeout_s, listening, role.farewell)
            finally:
                self.outbox.close()
                for task in background:
                    task.cancel()

    def _routes(self, role: NodeRole, registration: Registration) -> list[Route]:
        key = self._config.cluster_key

        async def tokens(message: OpenTokenStream) -> AsyncIterator[bytes]:
            if self._drained:
                self.check_admitting()
            return self.outbox.open(RouterId(message.router_id))

        async def cancel(message: CancelRequest) -> None:
            role.cancel(RequestId(request_id) for request_id in message.request_ids)

        return [
            stream_route("/node/v1/tokens", OpenTokenStream, tokens, key),
            message_route("/node/v1/cancel", CancelRequest, cancel, key),
            *role.routes(),
            *health_routes(self._life, role.stuck, registration.obstacle, self._registry, refresh=role.report),
        ]

    def _on_lost(self, request_ids: list[RequestId]) -> None:
        if self._role is not None:
            log.warning("a router's token stream ended; cancelling its %d requests", len(request_ids))
            self._role.cancel(request_ids)

    async def _report(self, role: NodeRole) -> None:
        while True:
            role.report()
            await asyncio.sleep(REPORT_INTERVAL_S)


def describe_worker(
    config: NodeConfig,
    role: Role,
    incarnation: Incarnation,
    control_url: str,
    model: ServedModel,
    transports: tuple[TransportKind, ...],
) -> WorkerInfo:
    """Who this node is to its routers. Without a configured name it is called after its role, host and port."""
    parts = urlsplit(control_url)
    return WorkerInfo(
        worker_id=config.worker_id or f"{role}-{socket.gethostname()}-{parts.port}",
        incarnation=incarnation,
        wire_version=WIRE_VERSION,
        role=role,
        control_url=control_url,
        served_model=config.model.served_name or model.name,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        num_blocks=model.num_blocks,
        layout=model.layout,
        transports=transports,
    )


def advertised_host(control_url: str) -> str:
    """The host part of the address that peers use."""
    return urlsplit(control_url).hostname or "127.0.0.1"
