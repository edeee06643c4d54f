"""What a node with an engine does at its start, the same whatever its role: memory for the KV cache and for the host tier, the
engine over the one, and the store in the other."""

from dataclasses import dataclass
from typing import Self

from prometheus_client import CollectorRegistry

from engine.build import BuiltEngine, build_engine, plan_engine
from kv_store.host_copier import HostCopier
from kv_store.tiers import BlockCopier
from kv_transfer.memory.arena import HostArena, scratch_blocks
from kv_transfer.memory.device_blocks import DeviceBlocks
from protocol.errors import ConfigError
from protocol.ids import Incarnation
from protocol.workers import WorkerInfo
from runtime.metrics import TransferMetrics
from runtime.node_config import NodeConfig
from runtime.rpc_client import RpcClient
from store_node.build import reserve_host_tier
from store_node.node_store import NodeStore, StoreBeside, WithoutStore


@dataclass(frozen=True, slots=True)
class BuiltNode:
    """All that takes long or fails, done. `memory` has the KV cache, and stays until the process ends; `slab` is the host
    tier's, None where there is none. Used as `with`, around the life of its event loop."""

    built: BuiltEngine
    memory: HostArena | DeviceBlocks
    slab: HostArena | None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.slab is not None:
            self.slab.close()

    def open_store(
        self,
        config: NodeConfig,
        info: WorkerInfo,
        client: RpcClient,
        registry: CollectorRegistry,
        transfers: TransferMetrics,
    ) -> StoreBeside:
        """On the event loop, before the engine starts. `transfers` are the process's. Raises ConfigError."""
        engine = self.built.engine
        if self.slab is None:
            return WithoutStore(info.worker_id, engine, config.cluster_key)
        return NodeStore(config, info, engine, self.slab, self._copier(self.slab), client, registry, transfers)

    def _copier(self, slab: HostArena) -> BlockCopier:
        blocks = self.built.device_blocks
        if blocks is None:
            assert isinstance(self.memory, HostArena), "a cache that is no device's is in host memory"
            return HostCopier(self.memory, slab)
        try:
            return blocks.slot_copier(slab.tensor().view(slab.num_blocks, slab.block_bytes))
        except RuntimeError as error:
            raise ConfigError(
                f"host memory for KV blocks cannot be pinned ({error}); make store.host_memory smaller, or raise what this"
                " process may lock",
                param="store.host_memory",
            ) from error


def build_node(config: NodeConfig, incarnation: Incarnation) -> BuiltNode:
    """Loads the model. Raises ConfigError."""
    plan = plan_engine(config)
    block_bytes = plan.layout.block_bytes
    num_scratch_blocks = scratch_blocks(block_bytes)
    arena = None if plan.on_device else HostArena(plan.num_blocks, block_bytes, num_scratch_blocks)
    cache_bytes = None if plan.on_device else plan.num_blocks * block_bytes
    slab = reserve_host_tier(config.store, block_bytes, cache_bytes) if config.cache.prefix_cache else None
    built = build_engine(config, plan, incarnation, arena.tensor() if arena else None, num_scratch_blocks)
    memory = arena or built.device_blocks
    assert memory is not None, "a KV cache is in host memory or on a device"
    return BuiltNode(built, memory, slab)
