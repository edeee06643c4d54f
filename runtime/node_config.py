"""NodeConfig: everything a prefill or decode node can be told, in slices that travel down to the part they concern.

Loaded by runtime.config from TOML and flags; frozen afterwards. What is measured at start (how many blocks fit) is a
return value of whoever measured it, not a field here.
"""

from typing import Annotated, Literal

import msgspec

from protocol.transfer import Direction, TransportKind

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
MAX_THREADS = 4096


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is served, and how it is computed.

    `model`: built-in name, local Hugging Face folder, GGUF file or hub id. `served_name`: what clients call it.
    `runner` "simulated" computes tokens by arithmetic instead of the model, for tests of everything around it.
    `quantization` "int8" keeps weights as bytes, on CPUs: faster, a little less exact.
    `threads` 0: all cores this process may use. `max_model_len` 0: what the model was trained for. `device` "auto" is cuda
    where there is a GPU.
    """

    model: str = "smollm2-135m-instruct"
    served_name: str | None = None
    runner: Literal["torch", "simulated"] = "torch"
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "int8"] = "none"
    threads: Annotated[int, msgspec.Meta(ge=0, le=MAX_THREADS)] = 0
    max_model_len: Annotated[int, msgspec.Meta(ge=0)] = 0
    seed: int = 0


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paged KV cache. `num_blocks` wins over `memory` (a size such as "512MiB" or "2GiB"). On a GPU the cache gets what
    weights and steps leave of `gpu_memory_utilization`, a share of the device's memory, and `memory` means nothing.

    `page_format` "auto" is what this machine attends to fastest. Nodes on machines that differ in it (one has no compiler,
    say) exchange KV only if both are told "plain".
    """

    block_size: Literal[8, 16, 32, 64, 128] = 16
    memory: str = "512MiB"
    num_blocks: Annotated[int, msgspec.Meta(ge=0)] = 0
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    prefix_cache: bool = True
    page_format: Literal["auto", "plain"] = "auto"


class SchedulerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`max_num_batched_tokens` is the token budget of one step; 0: 128 on a CPU, 2048 on a GPU. `max_prefill_chunk`:
    tokens of one prompt in one step, at most; 0 leaves it to the budget. `async_scheduling`: plan the next step while one computes; "auto" where that gains time.

    `speculation` "ngram" guesses up to `num_draft_tokens` tokens a step and sequence, by looking up the last `ngram_max` to
    `ngram_min` tokens (8 at most) in the last 8,192 to 16,384 that came before; with the C++ kernels the tokens are the
    same as without.
    """

    max_num_batched_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_num_seqs: PositiveInt = 64
    max_waiting_tokens: PositiveInt = 262_144
    max_prefill_chunk: Annotated[int, msgspec.Meta(ge=0)] = 0
    async_scheduling: Literal["auto", "on", "off"] = "auto"
    speculation: Literal["off", "ngram"] = "off"
    num_draft_tokens: PositiveInt = 4
    ngram_min: PositiveInt = 2
    ngram_max: PositiveInt = 4


class TransferOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How KV moves. `lease_ttl_s`: how long an export outlives its last sign of interest. `stall_timeout_s`: silence
    of the other node after which a hand-off is given up and the context recomputed. `borrow`: take the KV of a prompt's
    beginning from another node that has it; "auto" where that is faster than computing it, as far as this node has measured.

    `transport` "auto" runs all of `allowed` that can start; two nodes that meet measure those that both run and take the
    fastest, and of some that are about as fast the one that stands first. Any other value is the one transport that is
    used. `direction`: whether the reader pulls or the owner pushes; "auto" pulls where pushing is not measured to be much
    faster. `max_bytes_in_flight`: of all requests together, to or from one peer.

    Of a GPU's KV: `device_memory` "direct" lets the transport reach it where it is, "staged" copies through pinned host
    memory, "auto" does that only where the other cannot be. `staging_memory` is how much of it: a size, or "auto", 64
    blocks or 256 MiB, whichever is less.
    """

    transport: TransportKind | Literal["auto"] = "auto"
    allowed: Annotated[tuple[TransportKind, ...], msgspec.Meta(min_length=1)] = ("shm", "nixl", "ucx", "tcp")
    direction: Direction | Literal["auto"] = "auto"
    max_bytes_in_flight: PositiveInt = 64 << 20
    device_memory: Literal["auto", "direct", "staged"] = "auto"
    staging_memory: str = "auto"
    lease_ttl_s: PositiveFloat = 30.0
    stall_timeout_s: PositiveFloat = 5.0
    borrow: Literal["auto", "always", "never"] = "auto"


class StoreOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where KV blocks stay when the device forgets them.

    `host_memory` and `disk_size` are sizes ("4GiB"), or shares of the machine's (or its container's) memory and of the disk
    that `disk_path` is on ("25%"); "0" is none. `host_memory` "auto": a quarter of the available memory on a GPU node or a store; on a
    CPU node as much as its KV cache, an eighth of the available memory at most. `disk_path`: a folder that no other node uses,
    made if it is missing, whose blocks outlive the process; whatever else is in it stays as it is. None: no disk tier.

    `write` "back" saves blocks when the device is about to forget them, "through" as soon as they are computed: more
    writing, and nothing is lost with the node. `admission` "all" keeps what is saved, "second-touch" only what has been
    wanted twice; "auto" changes from the first to the second while blocks are evicted unused. `policy`: who is evicted.
    `tenant_share`: of each tier, that one cache salt may fill at most; it does not bind requests without a salt, which have no tenant in
    common. `quotas`: of single tenants, each as "tenant=size", one KV block at least, with the names that `headrace cache` gives them ("none": all without a salt).

    `stores`: control URLs of store nodes, which get a copy of what the host tier takes in; those that the index knows need not be
    named. `redis`: URL of the index through which nodes find each other's blocks; none, or no host tier: no index. `namespace` keeps clusters on one server apart.
    `redis_budget_s`: how long a request waits for it.
    """

    host_memory: str = "auto"
    disk_path: str | None = None
    disk_size: str = "10GiB"
    policy: Literal["lru", "arc", "s3fifo", "density"] = "density"
    write: Literal["back", "through"] = "back"
    admission: Literal["auto", "all", "second-touch"] = "auto"
    load: Literal["auto", "always", "never"] = "auto"
    tenant_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    quotas: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()
    redis: str | None = None
    redis_budget_s: PositiveFloat = 0.002
    namespace: Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] = "headrace"


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`port` 0 takes a free one. `advertise_url` is how routers and other nodes reach this node, where that differs
    from host and port. `drain_timeout_s`: how long SIGTERM waits for running requests."""

    worker_id: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    advertise_url: str | None = None
    routers: tuple[str, ...] = ("http://127.0.0.1:8001",)
    cluster_key: str | None = None
    drain_timeout_s: PositiveFloat = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    model: ModelOptions = ModelOptions()
    cache: CacheOptions = CacheOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    transfer: TransferOptions = TransferOptions()
    store: StoreOptions = StoreOptions()
