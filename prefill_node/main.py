"""The prefill node's process: from configuration to exit."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial

from engine.build import BuiltEngine, build_engine, plan_engine
from engine.telemetry import EngineTelemetry
from kv_transfer.arena import HostArena, scratch_blocks
from kv_transfer.device_blocks import DeviceBlocks, open_staging
from kv_transfer.exports import ExportTable
from kv_transfer.factory import start_transports
from kv_transfer.link_report import LinkReporter
from kv_transfer.pushers import Pushers
from kv_transfer.routes import kv_routes
from kv_transfer.telemetry import TransferTelemetry
from prefill_node.node import PrefillNode
from prefill_node.service import PrefillService
from protocol.ids import Incarnation, TicketId, WorkerId, new_incarnation
from runtime.auth import check_bind
from runtime.clock import MonotonicClock
from runtime.life import ProcessLife, install_signal_handlers
from runtime.metrics import EngineMetrics, NodeMetrics, TransferMetrics, new_registry
from runtime.node_config import NodeConfig
from runtime.node_shell import NodeShell, advertised_host, describe_worker
from runtime.registration import KVEventFeed
from runtime.rpc_client import RpcClient
from runtime.serving import bind_socket, run_on_event_loop, socket_url

ENGINE_STOP_TIMEOUT_S = 10.0


def run(config: NodeConfig) -> int:
    """Load the model, serve until told to end, return the exit code. Raises ConfigError before anything is served."""
    check_bind(config.host, config.cluster_key)
    incarnation = new_incarnation()
    plan = plan_engine(config)
    block_bytes = plan.layout.block_bytes
    num_scratch_blocks = scratch_blocks(block_bytes)
    arena = None if plan.on_device else HostArena(plan.num_blocks, block_bytes, num_scratch_blocks)
    built = build_engine(config, plan, incarnation, arena.tensor() if arena else None, num_scratch_blocks)
    memory = arena or built.device_blocks
    assert memory is not None, "a KV cache is in host memory or on a device"
    run_on_event_loop(_serve(config, incarnation, built, memory))
    return 0


async def _serve(
    config: NodeConfig, incarnation: Incarnation, built: BuiltEngine, memory: HostArena | DeviceBlocks
) -> None:
    engine = built.engine
    life = ProcessLife()
    install_signal_handlers(life)
    registry = new_registry()
    bound = bind_socket(config.host, config.port)
    url = config.advertise_url or socket_url(bound)

    def may_read(ticket_id: TicketId, block_ids: Sequence[int]) -> bool:
        return exports.may_read(ticket_id, block_ids)

    start = partial(
        start_transports,
        config.transfer,
        incarnation=incarnation,
        host=config.host,
        advertise_host=advertised_host(url),
        may_read=may_read,
    )
    staging, transports = open_staging(memory, config.transfer, start)
    info = describe_worker(config, "prefill", incarnation, url, built.model, transports.kinds)
    shell = NodeShell(config, info, life, registry)
    clock = MonotonicClock()
    pushers = Pushers(transports, clock)
    exports = ExportTable(
        staging,
        owner=WorkerId(info.worker_id),
        incarnation=incarnation,
        layout=info.layout,
        control_url=url,
        options=config.transfer,
        clock=clock,
        on_released=engine.release,
        push_links=pushers,
    )
    service = PrefillService(
        engine, exports, shell.outbox, NodeMetrics(registry), info.vocab_size, info.layout.identity
    )
    routes = kv_routes(
        exports,
        transports,
        pushers,
        info.layout,
        worker_id=WorkerId(info.worker_id),
        incarnation=incarnation,
        cluster_key=config.cluster_key,
    )
    reporter = LinkReporter(WorkerId(info.worker_id), transports, clock, pushers=pushers)
    node = PrefillNode(
        shell,
        service,
        exports,
        [*routes, reporter.route(config.cluster_key)],
        EngineTelemetry(engine, EngineMetrics(registry)),
        TransferTelemetry(TransferMetrics(registry), transports, exports=exports),
        config.cluster_key,
    )
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(RpcClient(config.cluster_key))
        stack.push_async_callback(transports.close)
        await stack.enter_async_context(pushers)
        stack.push_async_callback(staging.close)
        await stack.enter_async_context(exports)
        engine.start(service.listener(loop))
        stack.push_async_callback(asyncio.to_thread, engine.stop, ENGINE_STOP_TIMEOUT_S)
        feed = KVEventFeed(engine.take_kv_events, engine.kv_snapshot)
        await shell.run(bound, node, client, feed, exports.run())
