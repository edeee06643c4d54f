"""PrefillNode: the prefill role as the node shell sees it."""

from collections.abc import Iterable

from starlette.routing import Route

from engine.telemetry import EngineTelemetry
from kv_transfer.exports import ExportTable
from kv_transfer.telemetry import TransferTelemetry
from prefill_node.service import PrefillService
from protocol.ids import RequestId
from protocol.requests import PrefillAccepted, PrefillRequest
from protocol.workers import WorkerLoad
from runtime.node_shell import NodeShell
from runtime.rpc_server import message_route


class PrefillNode:
    """`kv_routes` are those that readers use (kv_transfer.routes)."""

    def __init__(
        self,
        shell: NodeShell,
        service: PrefillService,
        exports: ExportTable,
        kv_routes: list[Route],
        engine_telemetry: EngineTelemetry,
        transfer_telemetry: TransferTelemetry,
        cluster_key: str | None,
    ) -> None:
        self._shell = shell
        self._service = service
        self._exports = exports
        self._kv_routes = kv_routes
        self._engine_telemetry = engine_telemetry
        self._transfer_telemetry = transfer_telemetry
        self._cluster_key = cluster_key

    def routes(self) -> list[Route]:
        return [message_route("/node/v1/prefill", PrefillRequest, self._prefill, self._cluster_key), *self._kv_routes]

    def cancel(self, request_ids: Iterable[RequestId]) -> None:
        self._service.cancel(request_ids)

    def load(self) -> WorkerLoad:
        return self._engine_telemetry.worker_load(self._shell.draining)

    def stuck(self) -> str | None:
        return self._engine_telemetry.stuck()

    def idle(self) -> bool:
        exports = self._exports.stats()
        return self._engine_telemetry.idle() and exports.num_open == 0 and exports.num_unsettled == 0

    def report(self) -> None:
        self._engine_telemetry.update()
        self._transfer_telemetry.update()

    async def _prefill(self, request: PrefillRequest) -> PrefillAccepted:
        self._shell.check_admitting()
        return self._service.prefill(request)
