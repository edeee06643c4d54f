"""TransferTelemetry: brings the transfer metrics up to date with what transport, exports and imports have counted."""

from kv_transfer.exports import ExportTable
from kv_transfer.imports import Importer
from kv_transfer.transport_set import TransportSet
from runtime.metrics import Total, TransferMetrics


class TransferTelemetry:
    """A node exports or imports; the part that it does not have stays at zero."""

    def __init__(
        self,
        metrics: TransferMetrics,
        transports: TransportSet,
        exports: ExportTable | None = None,
        importer: Importer | None = None,
    ) -> None:
        self._metrics = metrics
        self._transports = transports
        self._exports = exports
        self._importer = importer
        self._expired = Total(metrics.leases_expired)
        self._released = Total(metrics.leases_released)
        self._mismatches = Total(metrics.checksum_failures)

    def update(self) -> None:
        if self._exports is not None:
            exported = self._exports.stats()
            self._metrics.leases_open.set(exported.num_open)
            self._expired.set(exported.num_expired)
            self._released.set(exported.num_released)
        if self._importer is not None:
            imported = self._importer.stats()
            self._mismatches.set(imported.num_checksum_mismatches)
            self._metrics.imports_unsettled.set(imported.num_unsettled)
