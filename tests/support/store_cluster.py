"""A cluster in the test's own event loop, of real nodes around simulated runners, with stores beside and between them.

A simulated runner's tokens depend on the bytes in its KV blocks, so that wrong KV shows in the answer.
"""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from completions import Answer, complete
from prometheus_client.parser import text_string_to_metric_families

import decode_node.main
import prefill_node.main
import store_node.main
from engine.build import plan_engine
from engine.engine import Engine
from engine.load import EngineLoad
from kv_store.admin import PATH
from kv_transfer.memory.arena import HostArena
from protocol.ids import new_incarnation
from protocol.store_admin import StoreReport, TierReport
from router.config import RouterConfig
from router.main import load_model
from runtime.life import ProcessLife
from runtime.node_config import CacheOptions, ModelOptions, NodeConfig, StoreOptions, TransferOptions
from runtime.rpc_client import RpcClient
from runtime.serving import bind_socket, socket_url
from store_node.beside_engine import build_node
from store_node.build import reserve_host_tier
from tests.support.router_process import running_router

NUM_BLOCKS = 320
BLOCK_SIZE = 16
TASKS_OF_REQUESTS = ("borrow:", "prefix:", "kv-hold:", "kv-inspect:", "kv-release:", "kv-save:", "fetch:")
MODULES = (prefill_node.main, decode_node.main, store_node.main)


@dataclass
class RunningNode:
    """`engine` None: of a store."""

    name: str
    url: str
    life: ProcessLife
    task: asyncio.Task[None]
    engine: Engine | None = None

    async def stop(self) -> None:
        self.life.stop("the test stops it")
        await self.task


@dataclass
class StoreCluster:
    url: str
    control_url: str
    folder: Path
    patch: pytest.MonkeyPatch
    client: RpcClient
    session: aiohttp.ClientSession
    model: dict[str, Any] = field(default_factory=lambda: {"runner": "simulated"})
    """Options of every node's model."""

    nodes: dict[str, RunningNode] = field(default_factory=dict)
    arenas: list[HostArena] = field(default_factory=list)
    """In production they end with the process."""

    async def start(self, role: str, name: str, *, num_blocks: int = NUM_BLOCKS, **store: Any) -> RunningNode:
        with contextlib.closing(bind_socket("127.0.0.1", 0)) as probe:
            url = socket_url(probe)
        config = NodeConfig(
            worker_id=name,
            port=int(url.rsplit(":", 1)[1]),
            routers=(self.control_url,),
            drain_timeout_s=5.0,
            model=ModelOptions(model=str(self.folder), **self.model),
            cache=CacheOptions(num_blocks=num_blocks, block_size=BLOCK_SIZE),
            transfer=TransferOptions(transport="tcp", borrow="always"),
            store=StoreOptions(**({"host_memory": "4MiB", "admission": "all", "load": "always"} | store)),
        )
        life, incarnation = ProcessLife(), new_incarnation()
        for module in MODULES:
            self.patch.setattr(module, "install_signal_handlers", lambda own: self._adopt(name, own))
        engine: Engine | None = None
        if role == "store":
            plan = plan_engine(config)
            slab = reserve_host_tier(config.store, plan.layout.block_bytes, None)
            assert slab is not None
            self.arenas.append(slab)
            serving = store_node.main._serve(config, incarnation, plan, slab)
        else:
            built = build_node(config, incarnation)
            engine = built.built.engine
            self.arenas += [arena for arena in (built.memory, built.slab) if isinstance(arena, HostArena)]
            module = prefill_node.main if role == "prefill" else decode_node.main
            serving = module._serve(config, incarnation, built)
        task = asyncio.create_task(serving, name=name)
        node = self.nodes[name] = RunningNode(name, url, life, task, engine)
        await self._ready(node)
        return node

    def _adopt(self, name: str, life: ProcessLife) -> None:
        self.nodes[name].life = life

    async def ask(self, prompt: list[int], num_tokens: int = 4, **options: Any) -> Answer:
        return await complete(self.session, self.url, prompt, num_tokens, **options)

    async def tier(self, name: str, tier: str = "host") -> TierReport:
        found = [each for each in await self._tiers(name) if each.tier == tier]
        assert found, f"{name} has no {tier} tier"
        return found[0]

    async def metric(self, name: str, metric: str, **labels: str) -> float:
        """The value of one metric of a node, summed over the series that carry `labels`."""
        async with self.session.get(f"{self.nodes[name].url}/metrics") as response:
            text = await response.text()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        )

    async def until_stored(self, name: str, num_blocks: int, tier: str = "host") -> None:
        async with asyncio.timeout(10):
            while (await self.tier(name, tier)).stored < num_blocks:
                await asyncio.sleep(0.02)

    async def at_rest(self) -> None:
        """Until every engine has all its blocks back, nobody reads from a store, and no task of a request is left."""
        await self.engines_at_rest()
        async with asyncio.timeout(10):
            for node in self.nodes.values():
                while any(tier.held for tier in await self._tiers(node.name)):
                    await asyncio.sleep(0.02)
            while any(task.get_name().startswith(TASKS_OF_REQUESTS) for task in asyncio.all_tasks()):
                await asyncio.sleep(0.02)

    async def engines_at_rest(self) -> None:
        async with asyncio.timeout(10):
            for node in self.nodes.values():
                while node.engine is not None and not _is_idle(node.engine.load()):
                    await asyncio.sleep(0.002)

    async def _tiers(self, name: str) -> tuple[TierReport, ...]:
        return (await self.client.get(f"{self.nodes[name].url}{PATH}/stats", StoreReport, 5.0)).tiers

    async def _ready(self, node: RunningNode) -> None:
        async with asyncio.timeout(20):
            while True:
                if node.task.done():
                    node.task.result()
                with contextlib.suppress(aiohttp.ClientError):
                    if (await self.session.get(f"{node.url}/ready")).status == 200:
                        return
                await asyncio.sleep(0.02)


def _is_idle(load: EngineLoad) -> bool:
    held = (load.running, load.waiting, load.num_importing, load.num_held, load.num_pins, load.num_offered_blocks)
    return not any(held) and load.free_blocks == load.total_blocks


@contextlib.asynccontextmanager
async def running_stores(
    folder: Path, patch: pytest.MonkeyPatch, model_options: dict[str, Any] | None = None, **router: Any
) -> AsyncIterator[StoreCluster]:
    """A router; nodes are for the test to start. All are stopped at the end."""
    model = load_model(RouterConfig(model=str(folder)))
    async with (
        running_router(model, **router) as running,
        RpcClient(None) as client,
        aiohttp.ClientSession() as session,
    ):
        cluster = StoreCluster(running.url, running.control_url, folder, patch, client, session)
        if model_options is not None:
            cluster.model = model_options
        try:
            yield cluster
        finally:
            for node in cluster.nodes.values():
                if not node.task.done():
                    await node.stop()
            for arena in cluster.arenas:
                arena.close()
            cluster.nodes.clear()
            gc.collect()  # engines and runners refer to each other, and to views of what their arenas have mapped
