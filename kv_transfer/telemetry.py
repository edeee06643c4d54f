"""TransferTelemetry: brings the transfer metrics up to date with what transport, exports and imports have counted."""

from kv_transfer.exports import ExportTable
from kv_transfer.imports import Importer
from kv_transfer.transport import Transport
from runtime.metrics import Total, TransferMetrics


class TransferTelemetry:
    """A node exports or imports; the part that it does not have stays at zero."""

    def __init__(
        self,
        metrics: TransferMetrics,
        transport: Transport,
        exports: ExportTable | None = None,
        importer: Importer | None = None,
    ) -> None:
        self._metrics = metrics
        self._transport = transport
        self._exports = exports
        self._importer = importer
        self._bytes = Total(metrics.bytes.labels(transport.kind))
        self._blocks = Total(metrics.blocks.labels(transport.kind))
        self._descriptors = Total(metrics.descriptors.labels(transport.kind))
        self._read_seconds = Total(metrics.read_seconds.labels(transport.kind))
        self._expired = Total(metrics.leases_expired)
        self._released = Total(metrics.leases_released)
        self._mismatches = Total(metrics.checksum_failures)

    def update(self) -> None:
        moved = self._transport.stats()
        self._bytes.set(moved.num_bytes)
        self._descriptors.set(moved.num_copies)
        self._read_seconds.set(moved.seconds)
        if self._exports is not None:
            exported = self._exports.stats()
            self._metrics.leases_open.set(exported.num_open)
            self._expired.set(exported.num_expired)
            self._released.set(exported.num_released)
        if self._importer is not None:
            imported = self._importer.stats()
            self._blocks.set(imported.num_blocks_moved)
            self._mismatches.set(imported.num_checksum_mismatches)
            self._metrics.imports_unsettled.set(imported.num_unsettled)
