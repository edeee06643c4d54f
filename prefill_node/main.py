"""The prefill node's process: from configuration to exit."""

import asyncio
from contextlib import AsyncExitStack

from engine.build import BuiltEngine, build_engine, plan_engine
from engine.telemetry import EngineTelemetry
from kv_transfer.exchange import NodeExchange, open_wires
from kv_transfer.memory.arena import HostArena, scratch_blocks
from kv_transfer.memory.device_blocks import DeviceBlocks
from prefill_node.node import PrefillNode
from prefill_node.service import PrefillService
from protocol.ids import Incarnation, new_incarnation
from runtime.auth import check_bind
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
    wires = open_wires(config, incarnation, advertised_host(url), memory)
    info = describe_worker(config, "prefill", incarnation, url, built.model, wires.transports.kinds)
    shell = NodeShell(config, info, life, registry)
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(RpcClient(config.cluster_key))
        exchange = await stack.enter_async_context(
            NodeExchange(config, info, wires, engine, client, TransferMetrics(registry))
        )
        stack.push_async_callback(asyncio.to_thread, engine.stop, ENGINE_STOP_TIMEOUT_S)
        await stack.enter_async_context(exchange.prefixes)
        service = PrefillService(
            engine, exchange, shell.outbox, NodeMetrics(registry), info.vocab_size, info.layout.identity
        )
        engine.start(service.listener(loop))
        telemetry = EngineTelemetry(engine, EngineMetrics(registry))
        node = PrefillNode(shell, service, exchange, telemetry, config.cluster_key)
        feed = KVEventFeed(engine.take_kv_events, engine.kv_snapshot)
        await shell.run(bound, node, client, feed, exchange.run())
