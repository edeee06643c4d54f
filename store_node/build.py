"""From StoreOptions to a KVStore: how large its tiers are, who is evicted from them, where the files lie."""

from collections.abc import Callable

from kv_store.disk.folder import segments_bytes
from kv_store.disk.tier import DiskTier
from kv_store.observer import StoreObserver
from kv_store.policy.factory import make_policy
from kv_store.quotas import Quotas
from kv_store.settings import StoreSettings
from kv_store.sizing import disk_bytes, disk_folder, host_slots, parse_quotas
from kv_store.store import KVStore
from kv_store.tier_events import TierEvents
from kv_store.tiers import BlockCopier
from kv_transfer.memory.arena import HostArena, scratch_blocks
from protocol.errors import ConfigError
from protocol.kv_layout import KVLayout
from runtime.node_config import StoreOptions

DRAIN_S = 10.0
"""At a planned end, for writing what is in host memory to disk: a few tens of gigabytes of a fast one."""

MIN_SLOTS = 4
"""Of a host tier: with fewer, one request at a time would find all of them in use."""


def reserve_host_tier(options: StoreOptions, block_bytes: int, cache_bytes: int | None) -> HostArena | None:
    """The slab of a node's host tier; None where it is to have none. `cache_bytes`: of a KV cache in the same memory. Raises
    ConfigError for what is more than there is, or less than is of use."""
    num_slots = host_slots(options.host_memory, block_bytes, cache_bytes=cache_bytes)
    if num_slots >= MIN_SLOTS:
        return HostArena(num_slots, block_bytes, scratch_blocks(block_bytes), setting="store.host_memory")
    if num_slots and options.host_memory != "auto":
        raise ConfigError(
            f"store.host_memory {options.host_memory} holds {num_slots} KV blocks of {block_bytes} bytes; make it"
            f' {MIN_SLOTS * block_bytes} bytes at least, or "0" for none',
            param="store.host_memory",
        )
    return None


def build_store(
    options: StoreOptions,
    layout: KVLayout,
    slab: HostArena,
    copier: BlockCopier | None,
    prefill_tokens_per_s: Callable[[], float | None],
    observer: StoreObserver | None = None,
) -> tuple[KVStore, DiskTier | None]:
    """The store and its disk, which belongs to it. Raises ConfigError."""
    events = TierEvents()
    quotas = parse_quotas(options.tenant_share, options.quotas, layout.block_bytes)
    disk = _open_disk(options, layout, quotas, events)
    settings = StoreSettings(
        block_size=layout.block_size,
        write_through=options.write == "through",
        admission=options.admission,
        load=options.load,
        quotas=quotas,
        prefill_tokens_per_s=prefill_tokens_per_s,
    )
    policy = make_policy(options.policy, slab.num_blocks)
    store = KVStore(slab, slab.num_blocks, policy, settings, copier=copier, disk=disk, observer=observer, events=events)
    return store, disk


def _open_disk(options: StoreOptions, layout: KVLayout, quotas: Quotas, events: TierEvents) -> DiskTier | None:
    if options.disk_path is None:
        return None
    path = disk_folder(options.disk_path)
    size = disk_bytes(options.disk_size, path, layout.block_bytes, used_bytes=segments_bytes(path))
    if not size:
        return None
    return DiskTier(path, layout.fingerprint, layout.block_bytes, size, quotas=quotas, removed=events.removed)
