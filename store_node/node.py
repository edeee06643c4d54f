"""StoreNode: the store role as the node shell sees it. It computes nothing: no request ever runs here."""

from collections.abc import Iterable

from starlette.routing import Route

from kv_store.admin import admin_routes
from kv_store.managed import ManagedKVStore
from kv_store.store import KVStore
from kv_store.telemetry import StoreTelemetry
from protocol.ids import RequestId
from protocol.workers import WorkerLoad
from runtime.node_shell import NodeShell
from store_node.put_receiver import PutReceiver
from store_node.served_store import ServedStore


class StoreNode:
    def __init__(
        self,
        shell: NodeShell,
        store: KVStore,
        served: ServedStore,
        receiver: PutReceiver,
        managed: ManagedKVStore,
        telemetry: StoreTelemetry,
        cluster_key: str | None,
    ) -> None:
        self._shell = shell
        self._store = store
        self._served = served
        self._receiver = receiver
        self._managed = managed
        self._telemetry = telemetry
        self._cluster_key = cluster_key

    def routes(self) -> list[Route]:
        return [
            self._receiver.route(self._cluster_key),
            *self._served.routes(),
            *admin_routes(self._managed, self._cluster_key),
        ]

    def cancel(self, request_ids: Iterable[RequestId]) -> None:
        """There are none."""

    def load(self) -> WorkerLoad:
        host = self._store.stats().tiers[0]
        return WorkerLoad(
            running=0,
            waiting=0,
            waiting_tokens=0,
            free_blocks=host.capacity - host.used,
            steps=0,
            draining=self._shell.draining,
        )

    def stuck(self) -> str | None:
        """What it waits for has its deadlines."""
        return None

    def idle(self) -> bool:
        return self._receiver.idle and self._served.exchange.idle()

    async def farewell(self) -> None:
        await self._served.exchange.exports.stop()

    def report(self) -> None:
        self._served.exchange.telemetry.update()
        self._telemetry.update()
