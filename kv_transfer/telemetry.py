"""TransferTelemetry: brings the transfer metrics up to date with what transports, exports and imports have counted."""

from kv_transfer.handoff.exports import ExportTable
from kv_transfer.handoff.imports import Importer
from kv_transfer.transports.transport_set import TransportSet
from runtime.metric_feeds import Total
from runtime.metrics import KVMemory, TransferMetrics


class TransferTelemetry:
    """Of the sides that it is given; the others stay at zero. A process may have one for each `memory`."""

    def __init__(
        self,
        metrics: TransferMetrics,
        transports: TransportSet,
        exports: ExportTable | None = None,
        importer: Importer | None = None,
        memory: KVMemory = "device",
    ) -> None:
        self._metrics = metrics
        self._memory = memory
        self._transports = transports
        self._exports = exports
        self._importer = importer
        self._expired = Total(metrics.leases_expired.labels(memory))
        self._released = Total(metrics.leases_released.labels(memory))
        self._failed = Total(metrics.leases_failed.labels(memory))
        self._retries = Total(metrics.retries.labels(memory))
        self._queue_seconds = Total(metrics.queue_seconds.labels(memory))

    def update(self) -> None:
        self._metrics.moved.set(self._moved(), (self._memory,))
        queues = [side.queue_stats() for side in (self._exports, self._importer) if side is not None]
        self._metrics.queued_blocks.labels(self._memory).set(sum(queue.num_waiting_blocks for queue in queues))
        self._metrics.blocks_in_flight.labels(self._memory).set(sum(queue.num_blocks_in_flight for queue in queues))
        self._queue_seconds.set(sum(queue.waited_s for queue in queues))
        if self._exports is not None:
            exported = self._exports.stats()
            self._metrics.leases_open.labels(self._memory).set(exported.num_open)
            self._expired.set(exported.num_expired)
            self._released.set(exported.num_released)
            self._failed.set(exported.num_failed)
            self._metrics.leases_unsettled.labels(self._memory).set(exported.num_unsettled)
        if self._importer is not None:
            imported = self._importer.stats()
            self._retries.set(imported.num_retries)
            self._metrics.checksum_failures.set(
                {(self._memory, peer): {"failures": count} for peer, count in imported.checksum_mismatches_of.items()},
                (self._memory,),
            )
            self._metrics.imports_unsettled.labels(self._memory).set(imported.num_unsettled)
            self._metrics.links.set(
                {
                    (self._memory, link.worker, link.kind, link.direction): {
                        "latency": link.measured.latency_s,
                        "bandwidth": link.measured.bytes_per_s,
                    }
                    for link in self._importer.peers.links()
                    if link.measured is not None
                },
                (self._memory,),
            )

    def _moved(self) -> dict[tuple[str, ...], dict[str, float]]:
        block_bytes = self._transports.arena.block_bytes
        return {
            (self._memory, peer, transport.kind, direction): {
                "bytes": moved.num_bytes,
                "blocks": moved.num_bytes // block_bytes,
                "descriptors": moved.num_copies,
                "transfers": moved.num_transfers,
                "failures": moved.num_failed,
                "seconds": moved.seconds,
                "quarantined": moved.num_quarantined,
            }
            for transport in self._transports
            for (peer, direction), moved in transport.stats().by_peer.items()
        }
