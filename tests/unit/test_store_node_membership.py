"""What a node tells the index of itself, before any server is asked."""

import msgspec
import pytest
from store_parts import PlainMemory, TailsFirst

from kv_store.settings import StoreSettings
from kv_store.store import KVStore
from protocol.errors import ConfigError
from protocol.kv_layout import KVLayout
from protocol.workers import WorkerInfo
from runtime.node_config import NodeConfig, StoreOptions
from store_node.membership import open_index

KEY = "0123456789abcdef"
INFO = WorkerInfo(
    worker_id="p0",
    incarnation="i",
    wire_version=1,
    role="prefill",
    control_url="http://127.0.0.1:1",
    served_model="m",
    vocab_size=10,
    max_model_len=20,
    num_blocks=30,
    layout=KVLayout(
        model="m", revision="r", dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, block_size=256, rope="x"
    ),
    transports=("tcp",),
)


async def test_the_owner_is_this_node_with_as_many_buckets_as_its_store_needs() -> None:
    async with KVStore(PlainMemory(5000), 5000, TailsFirst(), StoreSettings(256, load="always"), copier=None) as store:
        index = open_index(NodeConfig(store=StoreOptions(redis="unix:///a.sock"), cluster_key=KEY), INFO, store)
        assert index is not None
        owner = index.owner
        assert (owner.worker_id, owner.incarnation, owner.control_url) == ("p0", "i", "http://127.0.0.1:1")
        assert owner.fingerprint == INFO.layout.fingerprint
        assert (owner.capacity_blocks, owner.block_size, owner.num_buckets) == (5000, 256, 8)
        assert KEY.encode() not in msgspec.msgpack.encode(owner)
        assert open_index(NodeConfig(), INFO, store) is None
        with pytest.raises(ConfigError, match=r"store\.redis"):
            open_index(NodeConfig(store=StoreOptions(redis="redis://h?x=1")), INFO, store)
