"""The decode node's process: from configuration to exit."""

import asyncio
from contextlib import AsyncExitStack

from decode_node.handoff import Handoffs
from decode_node.node import DecodeNode
from decode_node.service import DecodeService
from engine.events import on_loop
from engine.telemetry import EngineTelemetry
from kv_transfer.exchange import NodeExchange, open_wires
from protocol.ids import Incarnation, new_incarnation
from runtime.auth import check_bind
from runtime.life import ProcessLife, install_signal_handlers
from runtime.metrics import EngineMetrics, NodeMetrics, TransferMetrics, new_registry
from runtime.node_config import NodeConfig
from runtime.node_shell import NodeShell, advertised_host, describe_worker
from runtime.registration import KVEventFeed
from runtime.rpc_client import RpcClient
from runtime.serving import bind_socket, run_on_event_loop, socket_url
from store_node.beside_engine import BuiltNode, build_node

ENGINE_STOP_TIMEOUT_S = 10.0


def run(config: NodeConfig) -> int:
    """Load the model, serve until told to end, return the exit code. Raises ConfigError before anything is served."""
    check_bind(config.host, config.cluster_key)
    incarnation = new_incarnation()
    with build_node(config, incarnation) as node:
        run_on_event_loop(_serve(config, incarnation, node))
    return 0


async def _serve(config: NodeConfig, incarnation: Incarnation, node: BuiltNode) -> None:
    built, engine = node.built, node.built.engine
    life = ProcessLife()
    install_signal_handlers(life)
    registry = new_registry()
    bound = bind_socket(config.host, config.port)
    url = config.advertise_url or socket_url(bound)
    wires = open_wires(config, incarnation, advertised_host(url), node.memory)
    info = describe_worker(config, "decode", incarnation, url, built.model, wires.transports.kinds)
    shell = NodeShell(config, info, life, registry)
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(RpcClient(config.cluster_key))
        transfers = TransferMetrics(registry)
        store = await stack.enter_async_context(node.open_store(config, info, client, registry, transfers))
        exchange = await stack.enter_async_context(
            NodeExchange(config, info, wires, engine, client, transfers, store.near)
        )
        stack.push_async_callback(asyncio.to_thread, engine.stop, ENGINE_STOP_TIMEOUT_S)
        await stack.enter_async_context(exchange.prefixes)
        handoffs = await stack.enter_async_context(Handoffs(engine, exchange.borrowing))
        service = DecodeService(
            engine,
            exchange,
            handoffs,
            shell.outbox,
            NodeMetrics(registry),
            info.vocab_size,
            info.layout,
        )
        engine.start(store.listening(loop, on_loop(loop, service.on_engine_events)))
        telemetry = EngineTelemetry(engine, EngineMetrics(registry))
        role = DecodeNode(shell, service, exchange, store, telemetry, config.cluster_key)
        feed = KVEventFeed(engine.take_kv_events, engine.kv_snapshot)
        await shell.run(bound, role, client, feed, exchange.run(), *store.duties())
