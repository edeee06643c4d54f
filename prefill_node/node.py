"""PrefillNode: the prefill role as the node shell sees it."""

from collections.abc import Iterable

from starlette.routing import Route

from engine.telemetry import EngineTelemetry
from kv_transfer.exchange import NodeExchange
from prefill_node.service import PrefillService
from protocol.ids import RequestId
from protocol.requests import PrefillAccepted, PrefillRequest
from protocol.workers import WorkerLoad
from runtime.node_shell import NodeShell
from runtime.rpc_server import message_route
from store_node.node_store import StoreBeside


class PrefillNode:
    def __init__(
        self,
        shell: NodeShell,
        service: PrefillService,
        exchange: NodeExchange,
        store: StoreBeside,
        engine_telemetry: EngineTelemetry,
        cluster_key: str | None,
    ) -> None:
        self._shell = shell
        self._service = service
        self._exchange = exchange
        self._store = store
        self._engine_telemetry = engine_telemetry
        self._cluster_key = cluster_key

    def routes(self) -> list[Route]:
        return [
            message_route("/node/v1/prefill", PrefillRequest, self._prefill, self._cluster_key),
            *self._store.routes(self._exchange),
        ]

    def cancel(self, request_ids: Iterable[RequestId]) -> None:
        self._service.cancel(request_ids)

    def load(self) -> WorkerLoad:
        return self._engine_telemetry.worker_load(self._shell.draining)

    def stuck(self) -> str | None:
        return self._engine_telemetry.stuck()

    def idle(self) -> bool:
        return self._engine_telemetry.idle() and self._exchange.idle() and self._store.idle()

    async def farewell(self) -> None:
        await self._exchange.exports.stop()
        await self._store.farewell()

    def report(self) -> None:
        self._engine_telemetry.update()
        self._exchange.telemetry.update()
        self._store.report()

    async def _prefill(self, request: PrefillRequest) -> PrefillAccepted:
        self._shell.check_admitting()
        prepared = await self._store.prepare(request)
        self._shell.check_admitting()
        return self._service.prefill(prepared)
