"""KVExchange: all of kv_transfer that an owner of blocks is made of, put together. Every owner reads those of others, too.

    wires               how its KV blocks reach other processes: staging and transports
    exports, lender     what others may read: finished prompts, and loans of cached blocks
    importer            what it reads
    routes              how others talk to it, and what it tells of its links

NodeExchange is that of an engine: `prefixes` has the requests that wait for their first blocks.

Used as `async with`, inside the RpcClient. The engine is what the parts talk to from here on: it may start when all are made.
`prefixes` is a context of its own, to be left before the engine stops, because it owes the engine answers.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

from starlette.routing import Route

from kv_transfer.handoff.exports import ExportTable
from kv_transfer.handoff.imports import Importer
from kv_transfer.lending.borrowing import BorrowContext
from kv_transfer.lending.lender import Lend, Lender
from kv_transfer.lending.near import NearSource, NoNearSource
from kv_transfer.lending.prefix_imports import ImportTarget, PrefixImports
from kv_transfer.meeting.link_report import LinkReporter
from kv_transfer.meeting.peers import Reader
from kv_transfer.meeting.pushers import Pushers
from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.device_blocks import DeviceBlocks, open_staging
from kv_transfer.memory.staging import HostStaging, Staging
from kv_transfer.routes import kv_routes
from kv_transfer.telemetry import TransferTelemetry
from kv_transfer.transports.factory import start_transports
from kv_transfer.transports.transport_set import TransportSet
from protocol.ids import BlockHash, Incarnation, PinId, RequestId, TicketId, WorkerId
from protocol.transfer import KVSource
from protocol.workers import WorkerInfo
from runtime.clock import MonotonicClock
from runtime.metrics import KVMemory, TransferMetrics
from runtime.node_config import NodeConfig
from runtime.rpc_client import RpcClient


class BlockOwner(Protocol):
    """Whose blocks they are, as far as an exchange concerns it: an engine (engine.engine), or a store."""

    @property
    def prefill_tokens_per_s(self) -> float | None: ...

    def release(self, request_id: RequestId) -> None: ...

    def pin(self, pin_id: PinId, block_hashes: tuple[BlockHash, ...]) -> None: ...

    def unpin(self, pin_id: PinId) -> None: ...


class ExchangeEngine(BlockOwner, ImportTarget, Protocol):
    """See engine.engine."""


@dataclass(slots=True)
class Wires:
    """Open before anybody knows the node, because what it can do is part of what it says of itself. `may_read` is asked once
    there are exports: until then nobody may read anything."""

    staging: Staging
    transports: TransportSet
    may_read: Callable[[TicketId, Sequence[int]], bool]


def open_wires(
    config: NodeConfig,
    incarnation: Incarnation,
    advertise_host: str,
    memory: HostArena | DeviceBlocks,
    host_staging: Callable[[HostArena], Staging] = HostStaging,
) -> Wires:
    """`memory` holds the owner's KV blocks; how they are announced and proven where it is an arena is `host_staging`'s. Raises ConfigError without a transport that works."""
    opened: list[Wires] = []
    start = partial(
        start_transports,
        config.transfer,
        incarnation=incarnation,
        host=config.host,
        advertise_host=advertise_host,
        may_read=lambda ticket_id, block_ids: opened[0].may_read(ticket_id, block_ids),
    )
    staging, transports = open_staging(memory, config.transfer, start, host_staging)
    opened.append(Wires(staging, transports, lambda *_: False))
    return opened[0]


class KVExchange:
    """Takes over `wires`. `memory` is what its metrics are told apart by from those of another exchange in this process."""

    def __init__(
        self,
        config: NodeConfig,
        info: WorkerInfo,
        wires: Wires,
        owner: BlockOwner,
        client: RpcClient,
        metrics: TransferMetrics,
        near: NearSource | None = None,
        memory: KVMemory = "device",
    ) -> None:
        self._cluster_key = config.cluster_key
        self._info = info
        self._wires = wires
        self._worker_id, self._incarnation = WorkerId(info.worker_id), Incarnation(info.incarnation)
        self._stack = AsyncExitStack()
        clock, options = MonotonicClock(), config.transfer
        self._pushers = Pushers(wires.transports, clock)
        self.exports = ExportTable(
            wires.staging,
            owner=self._worker_id,
            incarnation=self._incarnation,
            layout=info.layout,
            control_url=info.control_url,
            options=options,
            clock=clock,
            on_released=owner.release,
            push_links=self._pushers,
        )
        wires.may_read = self.exports.may_read
        self.lender = Lender(
            self.exports,
            block_size=info.layout.block_size,
            num_blocks=info.num_blocks,
            pin=owner.pin,
            unpin=owner.unpin,
            timeout_s=options.stall_timeout_s / 2,
        )
        self.importer = Importer(
            client=client,
            transports=wires.transports,
            staging=wires.staging,
            reader=Reader(self._worker_id, self._incarnation, info.layout),
            options=options,
            clock=clock,
        )
        self.borrowing = BorrowContext(
            importer=self.importer,
            reader=self._worker_id,
            layout=info.layout,
            stall_timeout_s=options.stall_timeout_s,
            policy=options.borrow,
            estimate_seconds=self._estimate_seconds,
            compute_tokens_per_s=lambda: owner.prefill_tokens_per_s,
            near=near or NoNearSource(),
        )
        self.telemetry = TransferTelemetry(metrics, wires.transports, self.exports, self.importer, memory)
        self._reporter = LinkReporter(
            self._worker_id, wires.transports, clock, peers=self.importer.peers, pushers=self._pushers
        )

    async def __aenter__(self) -> Self:
        self._stack.push_async_callback(self._wires.transports.close)
        await self._stack.enter_async_context(self._pushers)
        self._stack.push_async_callback(self._wires.staging.close)
        await self._stack.enter_async_context(self.importer)
        await self._stack.enter_async_context(self.exports)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def routes(self, lend: Lend | None = None) -> list[Route]:
        """`lend` answers whoever wants to borrow; by default what the owner's cache holds is lent."""
        owner = kv_routes(
            self.exports,
            self._wires.transports,
            self._pushers,
            self._info.layout,
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            cluster_key=self._cluster_key,
            lend=lend or self.lender.lend,
        )
        return [*owner, self._reporter.route(self._cluster_key)]

    def idle(self) -> bool:
        """Nobody holds a lease on anything here, and nothing is being moved from it."""
        exports = self.exports.stats()
        return exports.num_open == 0 and exports.num_unsettled == 0

    async def run(self) -> None:
        """What there is to do all the while, until cancelled."""
        await self.exports.run()

    async def _estimate_seconds(self, source: KVSource, num_bytes: int) -> float | None:
        """By what was measured when the two nodes met. Raises TransferError."""
        peer = await self.importer.peers.meet(source.control_url, source.incarnation, source.worker)
        seconds = peer.estimate_seconds(num_bytes)
        return None if math.isinf(seconds) else seconds


class NodeExchange(KVExchange):
    """Of a node with an engine, whose requests may wait for their first blocks."""

    def __init__(
        self,
        config: NodeConfig,
        info: WorkerInfo,
        wires: Wires,
        engine: ExchangeEngine,
        client: RpcClient,
        metrics: TransferMetrics,
        near: NearSource | None = None,
    ) -> None:
        super().__init__(config, info, wires, engine, client, metrics, near)
        self.prefixes = PrefixImports(self.borrowing, engine)
