"""The prefill node's process: from configuration to exit."""

import asyncio
from contextlib import AsyncExitStack

from engine.build import BuiltEngine, build_engine, plan_engine
from engine.events import on_loop
from engine.telemetry import EngineTelemetry
from kv_transfer.arena import HostArena, scratch_blocks
from kv_transfer.exports import ExportTable
from kv_transfer.factory import make_transport
from kv_transfer.routes import kv_routes
from kv_transfer.telemetry import TransferTelemetry
from prefill_node.node import PrefillNode
from prefill_node.service import PrefillService
from protocol.errors import ConfigError
from protocol.ids import Incarnation, WorkerId, new_incarnation
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
    if plan.on_device:
        raise ConfigError(
            "model.device cuda: a prefill node hands its KV over, and no transport reaches device memory yet; a decode node"
            " alone computes its own prompts on a GPU: headrace up --prefill 0 --set decode.model.device=cuda",
            param="model.device",
        )
    block_bytes = plan.layout.block_bytes
    arena = HostArena(plan.num_host_blocks, block_bytes, scratch_blocks(block_bytes))
    built = build_engine(config, plan, incarnation, arena.tensor())
    run_on_event_loop(_serve(config, incarnation, built, arena))
    return 0


async def _serve(config: NodeConfig, incarnation: Incarnation, built: BuiltEngine, arena: HostArena) -> None:
    engine = built.engine
    life = ProcessLife()
    install_signal_handlers(life)
    registry = new_registry()
    bound = bind_socket(config.host, config.port)
    url = config.advertise_url or socket_url(bound)
    info = describe_worker(config, "prefill", incarnation, url, built.model)
    shell = NodeShell(config, info, life, registry)
    exports = ExportTable(
        arena,
        owner=WorkerId(info.worker_id),
        incarnation=incarnation,
        layout=info.layout,
        control_url=url,
        options=config.transfer,
        clock=MonotonicClock(),
        on_released=engine.release,
    )
    transport = make_transport(
        config.transfer.transport,
        arena,
        incarnation=incarnation,
        host=config.host,
        advertise_host=advertised_host(url),
        may_read=exports.may_read,
    )
    service = PrefillService(
        engine, exports, shell.outbox, NodeMetrics(registry), info.vocab_size, info.layout.identity
    )
    routes = kv_routes(
        exports,
        transport,
        arena,
        info.layout,
        worker_id=WorkerId(info.worker_id),
        incarnation=incarnation,
        cluster_key=config.cluster_key,
    )
    node = PrefillNode(
        shell,
        service,
        exports,
        routes,
        EngineTelemetry(engine, EngineMetrics(registry)),
        TransferTelemetry(TransferMetrics(registry), transport, exports=exports),
        config.cluster_key,
    )
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(RpcClient(config.cluster_key))
        stack.push_async_callback(transport.close)
        stack.push_async_callback(exports.close)
        engine.start(on_loop(loop, service.on_engine_events))
        stack.push_async_callback(asyncio.to_thread, engine.stop, ENGINE_STOP_TIMEOUT_S)
        feed = KVEventFeed(engine.take_kv_events, engine.kv_snapshot)
        await shell.run(bound, node, client, feed, exports.run())
