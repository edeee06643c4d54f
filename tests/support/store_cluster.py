"""A cluster in the test's own event loop, of real nodes around simulated runners, with stores beside and between them.

A simulated runner's tokens depend on the bytes in its KV blocks, so that wrong KV shows in the answer.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from completions import Answer, complete

import decode_node.main
import prefill_node.main
import store_node.main
from engine.build import plan_engine
from engine.engine import Engine
from kv_store.admin import PATH
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
    nodes: dict[str, RunningNode] = field(default_factory=dict)

    async def start(self, role: str, name: str, *, num_blocks: int = NUM_BLOCKS, **store: Any) -> RunningNode:
        with contextlib.closing(bind_socket("127.0.0.1", 0)) as probe:
            url = socket_url(probe)
        config = NodeConfig(
            worker_id=name,
            port=int(url.rsplit(":", 1)[1]),
            routers=(self.control_url,),
            drain_timeout_s=5.0,
            model=ModelOptions(model=str(self.folder), runner="simulated"),
            cache=CacheOptions(num_blocks=num_blocks, block_size=BLOCK_SIZE),
            transfer=TransferOptions(transport="tcp"),
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
            serving = store_node.main._serve(config, incarnation, plan, slab)
        else:
            built = build_node(config, incarnation)
            engine = built.built.engine
            module = prefill_node.main if role == "prefill" else decode_node.main
            serving = module._serve(config, incarnation, built)
        node = self.nodes[name] = RunningNode(name, url, life, asyncio.create_task(serving, name=name), engine)
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

    async def until_stored(self, name: str, num_blocks: int, tier: str = "host") -> None:
        async with asyncio.timeout(10):
            while (await self.tier(name, tier)).stored < num_blocks:
                await asyncio.sleep(0.02)

    async def at_rest(self) -> None:
        """Until every engine has all its blocks back, and nobody reads from a store."""
        async with asyncio.timeout(10):
            for node in self.nodes.values():
                while node.engine is not None and node.engine.load().free_blocks != NUM_BLOCKS:
                    await asyncio.sleep(0.02)
                while any(tier.held for tier in await self._tiers(node.name)):
                    await asyncio.sleep(0.02)

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


@contextlib.asynccontextmanager
async def running_stores(folder: Path, patch: pytest.MonkeyPatch, **router: Any) -> AsyncIterator[StoreCluster]:
    """A router; nodes are for the test to start. All are stopped at the end."""
    model = load_model(RouterConfig(model=str(folder)))
    async with (
        running_router(model, **router) as running,
        RpcClient(None) as client,
        aiohttp.ClientSession() as session,
    ):
        cluster = StoreCluster(running.url, running.control_url, folder, patch, client, session)
        try:
            yield cluster
        finally:
            for node in cluster.nodes.values():
                if not node.task.done():
                    await node.stop()
