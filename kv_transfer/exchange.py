"""KVExchange: all of kv_transfer that a node is made of, put together. Every node owns blocks and reads those of others.

    staging, transport    how its KV blocks reach the wire
    exports, lender       what others may read: finished prompts, and loans of the prefix cache
    importer, prefixes    what it reads: whole contexts, and the beginnings of others
    routes                how others talk to it

Used as `async with`, inside the RpcClient. The engine is what the parts talk to from here on: it may start when all are made.
`prefixes` is a context of its own, to be left before the engine stops, because it owes the engine answers.
"""

from contextlib import AsyncExitStack
from typing import Protocol, Self

from starlette.routing import Route

from kv_transfer.arena import HostArena
from kv_transfer.borrowing import BorrowContext
from kv_transfer.device_arena import Arena
from kv_transfer.device_blocks import DeviceBlocks, open_staging
from kv_transfer.exports import ExportTable
from kv_transfer.factory import make_transport
from kv_transfer.imports import Importer
from kv_transfer.lending import Lender
from kv_transfer.peers import Reader
from kv_transfer.prefix_imports import ImportTarget, PrefixImports
from kv_transfer.routes import kv_routes
from kv_transfer.telemetry import TransferTelemetry
from kv_transfer.transport import Transport
from protocol.ids import BlockHash, Incarnation, PinId, RequestId, WorkerId
from protocol.workers import WorkerInfo
from runtime.clock import MonotonicClock
from runtime.metrics import TransferMetrics
from runtime.node_config import NodeConfig
from runtime.node_shell import advertised_host
from runtime.rpc_client import RpcClient


class ExchangeEngine(ImportTarget, Protocol):
    """The engine, as far as an exchange concerns it. See engine.engine."""

    @property
    def prefill_tokens_per_s(self) -> float | None: ...

    def release(self, request_id: RequestId) -> None: ...

    def pin(self, pin_id: PinId, block_hashes: tuple[BlockHash, ...]) -> None: ...

    def unpin(self, pin_id: PinId) -> None: ...


class KVExchange:
    """`memory` holds the engine's KV blocks."""

    def __init__(
        self,
        config: NodeConfig,
        info: WorkerInfo,
        memory: HostArena | DeviceBlocks,
        engine: ExchangeEngine,
        client: RpcClient,
        metrics: TransferMetrics,
    ) -> None:
        self._config = config
        self._info = info
        worker_id, incarnation = WorkerId(info.worker_id), Incarnation(info.incarnation)
        clock = MonotonicClock()
        options = config.transfer
        self._staging, self._transport = open_staging(memory, options, self._open_transport)
        self.exports = ExportTable(
            self._staging,
            owner=worker_id,
            incarnation=incarnation,
            layout=info.layout,
            control_url=info.control_url,
            options=options,
            clock=clock,
            on_released=engine.release,
        )
        self.lender = Lender(
            self.exports,
            block_size=info.layout.block_size,
            num_blocks=info.num_blocks,
            pin=engine.pin,
            unpin=engine.unpin,
            timeout_s=options.stall_timeout_s / 2,
        )
        self.importer = Importer(
            client=client,
            transport=self._transport,
            staging=self._staging,
            reader=Reader(worker_id, incarnation, info.layout),
            options=options,
            clock=clock,
        )
        self.borrowing = BorrowContext(
            importer=self.importer,
            reader=worker_id,
            layout=info.layout,
            stall_timeout_s=options.stall_timeout_s,
            policy=options.borrow,
            estimate_seconds=self._estimate_seconds,
            compute_tokens_per_s=lambda: engine.prefill_tokens_per_s,
        )
        self.prefixes = PrefixImports(self.borrowing, engine)
        self.telemetry = TransferTelemetry(metrics, self._transport, exports=self.exports, importer=self.importer)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._stack.push_async_callback(self._staging.close)
        self._stack.push_async_callback(self._transport.close)
        await self._stack.enter_async_context(self.importer)
        self._stack.push_async_callback(self.exports.close)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def routes(self) -> list[Route]:
        return kv_routes(
            self.exports,
            self._transport,
            self._staging.arena,
            self._info.layout,
            worker_id=WorkerId(self._info.worker_id),
            incarnation=Incarnation(self._info.incarnation),
            cluster_key=self._config.cluster_key,
            lender=self.lender,
        )

    async def run(self) -> None:
        """What there is to do all the while, until cancelled."""
        await self.exports.run()

    def _open_transport(self, arena: Arena) -> Transport:
        return make_transport(
            self._config.transfer.transport,
            arena,
            incarnation=Incarnation(self._info.incarnation),
            host=self._config.host,
            advertise_host=advertised_host(self._info.control_url),
            may_read=lambda ticket_id, block_ids: self.exports.may_read(ticket_id, block_ids),
        )

    def _estimate_seconds(self, num_bytes: int) -> float | None:
        """By what reads have taken so far, whoever the peer was."""
        moved = self._transport.stats()
        return num_bytes * moved.seconds / moved.num_bytes if moved.num_bytes else None
