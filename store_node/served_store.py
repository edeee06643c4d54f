"""ServedStore: a KVStore that other nodes read from, like from any owner of blocks.

    KVStore ── slots of a HostArena ──▶ StoreOwner ──▶ KVExchange with transports of its own ──▶ peers

Beside an engine its routes lie under /store, because the engine's own exchange has the others; alone in a process (a store
node) it is all there is. Used as `async with`, inside the RpcClient; its KVStore and its memory outlive it.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Self

import msgspec
from starlette.routing import Route

from kv_transfer.exchange import KVExchange, Wires, open_wires
from kv_transfer.memory.arena import HostArena
from protocol.ids import Incarnation
from protocol.workers import WorkerInfo
from runtime.metrics import TransferMetrics
from runtime.node_config import NodeConfig
from runtime.node_shell import advertised_host
from runtime.rpc_client import RpcClient
from store_node.slot_staging import SlotStaging
from store_node.store_owner import StoreOwner

STORE_PREFIX = "/store"


def open_store_wires(
    config: NodeConfig, incarnation: Incarnation, node_url: str, slab: HostArena, owner: StoreOwner
) -> Wires:
    """How a host tier reaches other processes. Raises ConfigError without a transport that works."""
    return open_wires(
        config, incarnation, advertised_host(node_url), slab, lambda arena: SlotStaging(arena, owner.checksum_of)
    )


class ServedStore:
    """Takes over `wires`. `info` is the node's, `prefix` what its control URL and paths have more than the node's."""

    def __init__(
        self,
        config: NodeConfig,
        info: WorkerInfo,
        wires: Wires,
        owner: StoreOwner,
        client: RpcClient,
        metrics: TransferMetrics,
        prefix: str = "",
    ) -> None:
        self._prefix = prefix
        self._owner = owner
        own = msgspec.structs.replace(
            info,
            control_url=info.control_url + prefix,
            num_blocks=wires.transports.arena.num_blocks,
            transports=wires.transports.kinds,
        )
        self.exchange = KVExchange(config, own, wires, owner, client, metrics, memory="host")
        owner.on_pinned = self.exchange.lender.pinned
        self.exchange.lender.on_doubt = owner.inspect
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._owner)
        await self._stack.enter_async_context(self.exchange)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def routes(self) -> list[Route]:
        return under(self._prefix, self.exchange.routes())


def under(prefix: str, routes: Sequence[Route]) -> list[Route]:
    """The same routes with a prefix before each path."""
    return [Route(prefix + route.path, route.endpoint, methods=sorted(route.methods or ())) for route in routes]
