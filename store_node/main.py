"""The store node's process: from configuration to exit. It reads what a model's KV looks like, and loads no weights."""

from contextlib import AsyncExitStack

from engine.build import EnginePlan, plan_engine
from engine.kv_event_log import KVEventLog
from kv_store.managed import ManagedKVStore
from kv_store.telemetry import StoreHistograms, StoreTelemetry
from kv_transfer.memory.arena import HostArena
from protocol.errors import ConfigError
from protocol.ids import Incarnation, WorkerId, new_incarnation
from runtime.auth import check_bind
from runtime.life import ProcessLife, install_signal_handlers
from runtime.metrics import StoreMetrics, TransferMetrics, new_registry
from runtime.node_config import NodeConfig
from runtime.node_shell import NodeShell, describe_worker
from runtime.registration import KVEventFeed
from runtime.rpc_client import RpcClient
from runtime.serving import bind_socket, run_on_event_loop, socket_url
from store_node.build import DRAIN_S, build_store, reserve_host_tier
from store_node.membership import open_index
from store_node.node import StoreNode
from store_node.put_receiver import PutReceiver
from store_node.served_store import ServedStore, open_store_wires
from store_node.store_owner import StoreOwner
from store_node.tier_log import TierLog


def run(config: NodeConfig) -> int:
    """Serve until told to end, return the exit code. Raises ConfigError before anything is served."""
    check_bind(config.host, config.cluster_key)
    plan = plan_engine(config)
    slab = reserve_host_tier(config.store, plan.layout.block_bytes, cache_bytes=None)
    if slab is None:
        raise ConfigError(
            f"store.host_memory {config.store.host_memory} leaves a store without memory: what it lends and what it is"
            " sent passes through there",
            param="store.host_memory",
        )
    with slab:
        run_on_event_loop(_serve(config, new_incarnation(), plan, slab))
    return 0


async def _serve(config: NodeConfig, incarnation: Incarnation, plan: EnginePlan, slab: HostArena) -> None:
    life = ProcessLife()
    install_signal_handlers(life)
    registry = new_registry()
    metrics = StoreMetrics(registry)
    store, disk = build_store(config.store, plan.layout, slab, None, _computes_nothing, StoreHistograms(metrics))
    bound = bind_socket(config.host, config.port)
    url = config.advertise_url or socket_url(bound)
    owner = StoreOwner(store)
    wires = open_store_wires(config, incarnation, url, slab, owner)
    info = describe_worker(config, "store", incarnation, url, plan.served(slab.num_blocks), wires.transports.kinds)
    shell = NodeShell(config, info, life, registry)
    events = KVEventLog(incarnation)
    log, index = TierLog(events.stored, events.removed), open_index(config, info, store)
    log.stored(store.snapshot())
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        stack.push_async_callback(store.drain, DRAIN_S)
        client = await stack.enter_async_context(RpcClient(config.cluster_key))
        for listener in (log, index):
            if listener is not None:
                store.events.add(listener)
        if index is not None:
            await stack.enter_async_context(index)
        served = ServedStore(config, info, wires, owner, client, TransferMetrics(registry))
        await stack.enter_async_context(served)
        worker_id = WorkerId(info.worker_id)
        disk_stats = None if disk is None else disk.stats
        index_state = None if index is None else index.state
        node = StoreNode(
            shell,
            store,
            served,
            PutReceiver(store, served.exchange, worker_id, incarnation, shell.check_admitting),
            ManagedKVStore(worker_id, store, disk=disk_stats, index=index_state),
            StoreTelemetry(metrics, store.stats, disk_stats, index_state),
            config.cluster_key,
        )
        feed = KVEventFeed(events.take, events.snapshot)
        await shell.run(bound, node, client, feed, served.exchange.run())


def _computes_nothing() -> None:
    """The prefill rate of a store."""
