"""NodeStore: what a node keeps beside its device, put together; the same for prefill and decode nodes.

    engine ──offers──▶ Offers ──▶ KVStore ──▶ ServedStore      peers read from it, like from the engine's own cache
    engine ◀──────── NearStore ◀──┘  │ └────▶ TierLog          routers hear what it has
    requests ──▶ `prepare` ◀── RedisIndex     PutQueue ──▶ store nodes

Used as `async with`, inside the RpcClient and around the node's exchange and its engine's life: when it is left, the engine has
stopped and nobody loads any more. `WithoutStore` is what a node has that keeps nothing.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol, Self

from prometheus_client import CollectorRegistry
from starlette.routing import Route

from engine.engine import Engine
from kv_store.admin import admin_routes
from kv_store.managed import ManagedKVStore
from kv_store.telemetry import StoreHistograms, StoreTelemetry
from kv_store.tiers import BlockCopier, TierListener
from kv_transfer.exchange import NodeExchange
from kv_transfer.lending.near import NearSource, NoNearSource
from kv_transfer.lending.source_search import NobodyElse, Request, SourceSearch
from kv_transfer.memory.arena import HostArena
from protocol.ids import BlockHash, Incarnation, WorkerId
from protocol.workers import WorkerInfo
from runtime.clock import MonotonicClock
from runtime.metrics import StoreMetrics, TransferMetrics
from runtime.node_config import NodeConfig
from runtime.rpc_client import RpcClient
from store_node.arrivals import Arrivals
from store_node.best_lender import BestLender
from store_node.build import DRAIN_S, build_store
from store_node.membership import StoreDirectory, open_index, source_of
from store_node.near_store import NearStore
from store_node.offers import Offers, Receive
from store_node.put_queue import PutQueue
from store_node.put_receiver import refuse_puts
from store_node.served_store import STORE_PREFIX, ServedStore, open_store_wires
from store_node.store_owner import StoreOwner
from store_node.tier_log import TierLog


class StoreBeside(Protocol):
    """What a node asks of what it keeps beside its device. Used as `async with`."""

    near: NearSource

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def prepare(self, request: Request) -> Request:
        """Before the engine hears of it. Raises nothing; whoever cancels it leaves nothing behind."""
        ...

    def listening(self, loop: asyncio.AbstractEventLoop, receive: Receive) -> Receive:
        """`receive`, for an engine whose blocks are kept here."""
        ...

    def routes(self, exchange: NodeExchange) -> list[Route]:
        """Those of the node's exchange, and its own."""
        ...

    def duties(self) -> list[Coroutine[Any, Any, None]]: ...

    def idle(self) -> bool:
        """Nobody holds a lease on anything here."""
        ...

    async def farewell(self) -> None: ...

    def report(self) -> None: ...


class WithoutStore:
    """What the device forgets is gone."""

    def __init__(self, worker_id: str, engine: Engine, cluster_key: str | None) -> None:
        self.near: NearSource = NoNearSource()
        self._managed = ManagedKVStore(WorkerId(worker_id), None, clear_device=engine.clear_prefix_cache)
        self._cluster_key = cluster_key

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """There is nothing to leave."""

    async def prepare(self, request: Request) -> Request:
        return request

    def listening(self, loop: asyncio.AbstractEventLoop, receive: Receive) -> Receive:  # noqa: ARG002  # nothing is offered
        return receive

    def routes(self, exchange: NodeExchange) -> list[Route]:
        return [*exchange.routes(), *admin_routes(self._managed, self._cluster_key)]

    def duties(self) -> list[Coroutine[Any, Any, None]]:
        return []

    def idle(self) -> bool:
        return True

    async def farewell(self) -> None:
        """Nobody reads from it."""

    def report(self) -> None:
        """There is nothing to tell."""


class NodeStore:
    """Made on the event loop, before the engine starts. The host tier is `slab`, which outlives it. Raises ConfigError."""

    def __init__(
        self,
        config: NodeConfig,
        info: WorkerInfo,
        engine: Engine,
        slab: HostArena,
        copier: BlockCopier,
        client: RpcClient,
        registry: CollectorRegistry,
        transfers: TransferMetrics,
    ) -> None:
        metrics = StoreMetrics(registry)
        self.store, disk = build_store(
            config.store, info.layout, slab, copier, lambda: engine.prefill_tokens_per_s, StoreHistograms(metrics)
        )
        self.near: NearSource = NearStore(self.store)
        self._layout = info.layout
        self._cluster_key = config.cluster_key
        self._stack = AsyncExitStack()
        owner = StoreOwner(self.store)
        wires = open_store_wires(config, Incarnation(info.incarnation), info.control_url, slab, owner)
        self._served = ServedStore(config, info, wires, owner, client, transfers, STORE_PREFIX)
        self._index = open_index(config, info, self.store)
        self._search = SourceSearch(self._index or NobodyElse(), WorkerId(info.worker_id))
        self._arrivals = Arrivals(self.store, info.layout.identity, info.layout.block_size, engine.num_held)
        self._offers = Offers(self.store, engine)
        stores = StoreDirectory(config.store, info, self._index)
        self._puts = PutQueue(client, source_of(info), stores.lives, MonotonicClock(), info.layout.block_bytes)
        self._listeners: list[TierListener] = [TierLog(engine.note_stored, engine.note_removed), self._puts]
        index_state = None if self._index is None else self._index.state
        disk_stats = None if disk is None else disk.stats
        self._telemetry = StoreTelemetry(metrics, self.store.stats, disk_stats, index_state, self._puts.stats)
        self._managed = ManagedKVStore(
            WorkerId(info.worker_id),
            self.store,
            disk=disk_stats,
            index=index_state,
            clear_device=engine.clear_prefix_cache,
        )
        engine.back_with(self.store)

    async def __aenter__(self) -> Self:
        """Whoever listens is told first of what an earlier life has left on disk."""
        for listener in self._listeners:
            self.store.events.add(listener)
            listener.stored(self.store.snapshot())
        self._stack.push_async_callback(self.store.close)
        self._stack.push_async_callback(self.store.drain, DRAIN_S)
        if self._index is not None:
            self.store.events.add(self._index)
            await self._stack.enter_async_context(self._index)
        await self._stack.enter_async_context(self._served)
        await self._stack.enter_async_context(self._offers)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def prepare(self, request: Request) -> Request:
        brought, num_held = await self._arrivals.note(request)
        return await self._search.complete(request, brought, num_held, self._layout.block_size)

    def listening(self, loop: asyncio.AbstractEventLoop, receive: Receive) -> Receive:
        return self._offers.listening(loop, receive)

    def routes(self, exchange: NodeExchange) -> list[Route]:
        lender = BestLender(exchange, self._served.exchange, self._layout.block_size, self._num_held)
        return [
            *exchange.routes(lender.lend),
            *self._served.routes(),
            refuse_puts(self._cluster_key),
            *admin_routes(self._managed, self._cluster_key),
        ]

    def duties(self) -> list[Coroutine[Any, Any, None]]:
        return [self._served.exchange.run(), self._puts.run()]

    def idle(self) -> bool:
        return self._served.exchange.idle()

    async def farewell(self) -> None:
        await self._served.exchange.exports.stop()

    def report(self) -> None:
        self._telemetry.update()
        self._served.exchange.telemetry.update()

    def _num_held(self, block_hashes: Sequence[BlockHash]) -> int:
        return self.store.match(block_hashes).total
