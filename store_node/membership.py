"""What a process says of itself in the index, and the stores that it learns of: from its settings and from the index."""

from collections.abc import Callable

from kv_store.index.index import RedisIndex
from kv_store.index.members import owner_of
from kv_store.index.settings import IndexSettings
from kv_store.store import KVStore
from protocol.ids import Incarnation, WorkerId
from protocol.transfer import KVSource
from protocol.workers import WorkerInfo
from runtime.node_config import NodeConfig, StoreOptions


def open_index(config: NodeConfig, info: WorkerInfo, store: KVStore) -> RedisIndex | None:
    """Not entered yet; None where no index is wanted. Raises ConfigError."""
    settings = IndexSettings.of(config.store, config.cluster_key)
    if settings is None:
        return None
    owner = owner_of(
        WorkerId(info.worker_id),
        Incarnation(info.incarnation),
        info.role,
        info.control_url,
        info.layout,
        capacity_blocks=sum(tier.capacity for tier in store.stats().tiers),
    )
    return RedisIndex(settings, owner, store.snapshot)


def source_of(info: WorkerInfo) -> Callable[[int], KVSource]:
    """This node as a source of so many blocks."""

    def source(num_blocks: int) -> KVSource:
        return KVSource(
            worker=info.worker_id, incarnation=info.incarnation, control_url=info.control_url, num_blocks=num_blocks
        )

    return source


class StoreDirectory:
    """The stores that take what this node puts."""

    def __init__(self, options: StoreOptions, info: WorkerInfo, index: RedisIndex | None) -> None:
        self._configured = frozenset(url.rstrip("/") for url in options.stores)
        self._info = info
        self._index = index

    def lives(self) -> dict[str, Incarnation | None]:
        """By control URL; None where nobody has said which life a store is in."""
        lives: dict[str, Incarnation | None] = dict.fromkeys(self._configured)
        for member in () if self._index is None else self._index.members():
            if member.role == "store" and member.fingerprint == self._info.layout.fingerprint:
                lives[member.control_url] = member.incarnation
        lives.pop(self._info.control_url, None)
        return lives
