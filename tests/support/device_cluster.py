"""A cluster in the test's own event loop whose nodes compute on a stand-in GPU: the nodes' real compositions, from which
model loading and the measuring of device memory are left out."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

import decode_node.main
import prefill_node.main
from engine.build import BuiltEngine, engine_config, plan_engine
from engine.cuda.build import runner_with_blocks
from engine.cuda.device import HostDevice
from engine.cuda.limits import BatchLimits
from engine.engine import Engine
from engine.model.llama import LlamaModel
from engine.runner import Runner
from protocol.ids import Incarnation, new_incarnation
from router.config import RouterConfig
from router.main import load_model
from runtime.clock import MonotonicClock
from runtime.life import ProcessLife
from runtime.node_config import CacheOptions, ModelOptions, NodeConfig, SchedulerOptions, TransferOptions
from store_node.beside_engine import BuiltNode
from tests.support.router_process import running_router

NUM_BLOCKS = 64
NUM_SCRATCH_BLOCKS = 2
MAX_NUM_SEQS = 4
MAX_BATCHED_TOKENS = 64

Serve = Callable[..., Coroutine[Any, Any, None]]
ROLES: dict[str, Serve] = {"prefill": prefill_node.main._serve, "decode": decode_node.main._serve}


@dataclass(frozen=True)
class DeviceCluster:
    url: str
    engines: dict[str, Engine]

    async def at_rest(self) -> None:
        """Until every engine has all its blocks back."""
        async with asyncio.timeout(10):
            while any(engine.load().free_blocks != NUM_BLOCKS for engine in self.engines.values()):
                await asyncio.sleep(0.01)


def node_config(role: str, folder: str, transfer: TransferOptions, routers: tuple[str, ...]) -> NodeConfig:
    return NodeConfig(
        worker_id=f"{role}-0",
        routers=routers,
        drain_timeout_s=5.0,
        model=ModelOptions(model=folder, dtype="float32"),
        cache=CacheOptions(num_blocks=NUM_BLOCKS, page_format="plain"),
        scheduler=SchedulerOptions(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_BATCHED_TOKENS),
        transfer=transfer,
    )


def build_on_stand_in(config: NodeConfig, model: LlamaModel, incarnation: Incarnation) -> BuiltEngine:
    """What build_engine makes where there is a GPU. Its device runs late."""
    plan, settings = plan_engine(config), engine_config(config, "cuda")
    limits = BatchLimits(MAX_NUM_SEQS, MAX_BATCHED_TOKENS)
    max_model_len = plan.served(NUM_BLOCKS).max_model_len
    device = HostDevice(late=True)
    made, blocks = runner_with_blocks(model, plan.layout, NUM_BLOCKS, NUM_SCRATCH_BLOCKS, max_model_len, limits, device)
    made.warm_up(lambda _line: None)
    runner: Runner = made
    return BuiltEngine(Engine(runner, settings, MonotonicClock(), incarnation), plan.served(NUM_BLOCKS), blocks)


@contextlib.asynccontextmanager
async def running_device_cluster(
    folder: str, model: LlamaModel, transfer: TransferOptions, patch: pytest.MonkeyPatch
) -> AsyncIterator[DeviceCluster]:
    """One prefill and one decode node, and a router that sends them every prompt."""
    lives: list[ProcessLife] = []
    for module in (prefill_node.main, decode_node.main):
        patch.setattr(module, "install_signal_handlers", lives.append)
    router_config = RouterConfig(model=folder)
    async with running_router(load_model(router_config), local_prefill_tokens=0) as router:
        engines: dict[str, Engine] = {}
        async with asyncio.TaskGroup() as nodes:
            for role, serve in ROLES.items():
                config = node_config(role, folder, transfer, (router.control_url,))
                incarnation = new_incarnation()
                built = build_on_stand_in(config, model, incarnation)
                assert built.device_blocks is not None
                engines[role] = built.engine
                nodes.create_task(serve(config, incarnation, BuiltNode(built, built.device_blocks, None)))
            try:
                await _ready(router.url)
                yield DeviceCluster(router.url, engines)
            finally:
                for life in lives:
                    life.drain("the test is over")


async def _ready(url: str) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(20):
        while (await session.get(f"{url}/ready")).status != 200:
            await asyncio.sleep(0.05)
