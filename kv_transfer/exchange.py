"""KVExchange: all of kv_transfer that a node is made of, put together. Every node owns blocks and reads those of others.

    staging, transports   how its KV blocks reach the wire
    pushers               who it may write to
    exports, lender       what others may read: finished prompts, and loans of the prefix cache
    importer, prefixes    what it reads: whole contexts, and the beginnings of others
    routes                how others talk to it, and what it tells of its links

Used as `async with`, inside the RpcClient. The engine is what the parts talk to from here on: it may start when all are made.
`prefixes` is a context of its own, to be left before the engine stops, because it owes the engine answers.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Protocol, Self

from starlette.routing import Route

from kv_transfer.arena import HostArena
from kv_transfer.borrowing import BorrowContext
from kv_transfer.device_blocks import DeviceBlocks, open_staging
from kv_transfer.exports import ExportTable
from kv_transfer.factory import start_transports
from kv_transfer.imports import Importer
from kv_transfer.lending import Lender
from kv_transfer.link_report import LinkReporter
from kv_transfer.peers import Reader
from kv_transfer.prefix_imports import ImportTarget, PrefixImports
from kv_transfer.pushers import Pushers
from kv_transfer.routes import kv_routes
from kv_transfer.telemetry import TransferTelemetry
from protocol.ids import BlockHash, Incarnation, PinId, RequestId, TicketId, WorkerId
from protocol.workers import Role
from runtime.clock import MonotonicClock
from runtime.metrics import TransferMetrics
from runtime.node_config import NodeConfig
from runtime.node_shell import advertised_host, describe_worker
from runtime.rpc_client import RpcClient
from runtime.served_model import ServedModel


class ExchangeEngine(ImportTarget, Protocol):
    """The engine, as far as an exchange concerns it. See engine.engine."""

    @property
    def prefill_tokens_per_s(self) -> float | None: ...

    def release(self, request_id: RequestId) -> None: ...

    def pin(self, pin_id: PinId, block_hashes: tuple[BlockHash, ...]) -> None: ...

    def unpin(self, pin_id: PinId) -> None: ...


class KVExchange:
    """Its transports run from the construction on. `memory` holds the engine's KV blocks. `info` is what the node tells its
    routers, transports included. Raises ConfigError where the configured transports cannot be had."""

    def __init__(
        self,
        config: NodeConfig,
        role: Role,
        incarnation: Incarnation,
        control_url: str,
        model: ServedModel,
        memory: HostArena | DeviceBlocks,
        engine: ExchangeEngine,
        client: RpcClient,
        metrics: TransferMetrics,
    ) -> None:
        options, clock = config.transfer, MonotonicClock()
        start = partial(
            start_transports,
            options,
            incarnation=incarnation,
            host=config.host,
            advertise_host=advertised_host(control_url),
            may_read=self._may_read,
        )
        self._cluster_key = config.cluster_key
        self._staging, self._transports = open_staging(memory, options, start)
        self.info = describe_worker(config, role, incarnation, control_url, model, self._transports.kinds)
        worker_id, layout = WorkerId(self.info.worker_id), model.layout
        self._pushers = Pushers(self._transports, clock)
        self.exports = ExportTable(
            self._staging,
            owner=worker_id,
            incarnation=incarnation,
            layout=layout,
            control_url=control_url,
            options=options,
            clock=clock,
            on_released=engine.release,
            push_links=self._pushers,
        )
        self.lender = Lender(
            self.exports,
            block_size=layout.block_size,
            num_blocks=model.num_blocks,
            pin=engine.pin,
            unpin=engine.unpin,
            timeout_s=options.stall_timeout_s / 2,
        )
        self.importer = Importer(
            client=client,
            transports=self._transports,
            staging=self._staging,
            reader=Reader(worker_id, incarnation, layout),
            options=options,
            clock=clock,
        )
        self.borrowing = BorrowContext(
            importer=self.importer,
            reader=worker_id,
            layout=layout,
            stall_timeout_s=options.stall_timeout_s,
            policy=options.borrow,
            compute_tokens_per_s=lambda: engine.prefill_tokens_per_s,
        )
        self.prefixes = PrefixImports(self.borrowing, engine)
        self.telemetry = TransferTelemetry(metrics, self._transports, self.exports, self.importer)
        self._reporter = LinkReporter(
            worker_id, self._transports, clock, peers=self.importer.peers, pushers=self._pushers
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._stack.push_async_callback(self._transports.close)
        await self._stack.enter_async_context(self._pushers)
        self._stack.push_async_callback(self._staging.close)
        await self._stack.enter_async_context(self.importer)
        await self._stack.enter_async_context(self.exports)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    @property
    def idle(self) -> bool:
        """Nobody holds a lease here, and nothing of this node is being read or written by another."""
        exports = self.exports.stats()
        return exports.num_open == 0 and exports.num_unsettled == 0

    def routes(self) -> list[Route]:
        owner = kv_routes(
            self.exports,
            self._transports,
            self._pushers,
            self.info.layout,
            worker_id=WorkerId(self.info.worker_id),
            incarnation=Incarnation(self.info.incarnation),
            cluster_key=self._cluster_key,
            lender=self.lender,
        )
        return [*owner, self._reporter.route(self._cluster_key)]

    def _may_read(self, ticket_id: TicketId, block_ids: Sequence[int]) -> bool:
        """Transports are there before the exports that they ask."""
        return self.exports.may_read(ticket_id, block_ids)

    async def run(self) -> None:
        """What there is to do all the while, until cancelled."""
        await self.exports.run()
