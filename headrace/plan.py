"""ClusterPlan: which processes a cluster on one machine consists of, and what each is told. Values in, values out."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from headrace.cores import divide_cores, format_cpus
from headrace.serve import CONFIG_TYPES, NodeRole, Role
from headrace.settings import given
from protocol.errors import ConfigError
from runtime.config import ENVIRONMENT_KEYS, load_config, parse_size
from runtime.node_config import MAX_THREADS, NodeConfig

_SETTING_GROUPS = ("router", "node", "prefill", "decode", "store")
INDEX_VARIABLE = "HEADRACE_REDIS_URL"
_LAYOUT_SETTINGS = (
    "model.model",
    "model.dtype",
    "model.quantization",
    "model.load_format",
    "model.seed",
    "cache.block_size",
    "cache.page_format",
)
"""What decides the meaning of a KV block's bytes: a router refuses a node that differs in it from those it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What the user asked of `headrace up`. None: the setting's own default. `settings` are dotted keys that begin with
    router, node (all kinds), prefill, decode or store. `redis`: a URL, "embedded" or "none"; None is the environment's URL
    if there is one, and embedded otherwise. `disk`: a folder in which every node has one of its own."""

    model: str | None = None
    served_name: str | None = None
    num_prefill: int = 1
    num_decode: int = 1
    num_stores: int = 0
    redis: str | None = None
    host_memory: str | None = None
    disk: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    control_port: int = 0
    transport: str = "nixl"
    dtype: str | None = None
    quantization: str | None = None
    load_format: str | None = None
    threads: int = 0
    max_model_len: int | None = None
    kv_memory: str | None = None
    gpu_memory_utilization: float | None = None
    log_dir: Path | None = None
    restart: bool = True
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process: `headrace serve <role>` with these settings. `cpus` empty: not pinned. Secrets among the settings
    travel in `environment`, because a command line is public."""

    name: str
    role: Role
    settings: Mapping[str, object]
    drain_timeout_s: float
    cpus: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, late_settings: Mapping[str, object]) -> list[str]:
        """What follows `headrace`. `late_settings` are known only once other processes run."""
        command = ["serve", self.role]
        if self.cpus:
            command += ["--cpu-affinity", format_cpus(self.cpus)]
        for key, value in {**self.settings, **late_settings}.items():
            command += ["--set", f"{key}={_as_text(value)}"]
        return command


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    router: ChildSpec
    nodes: tuple[ChildSpec, ...]

    @property
    def children(self) -> tuple[ChildSpec, ...]:
        return (self.router, *self.nodes)


def make_plan(
    options: UpOptions, cores: Sequence[int], environ: Mapping[str, str], index_url: str | None = None
) -> ClusterPlan:
    """Every process's settings are checked here as the process itself will check them. `index_url`: where the nodes find
    each other's blocks, None where there is no index. Raises ConfigError."""
    if options.num_decode < 1:
        raise ConfigError("a cluster needs at least one decode node: --decode 1", param="--decode")
    if options.num_prefill < 0:
        raise ConfigError(f"--prefill {options.num_prefill}: a number of nodes, or 0 for none", param="--prefill")
    if options.num_stores < 0:
        raise ConfigError(f"--stores {options.num_stores}: a number of nodes, or 0 for none", param="--stores")
    if not 0 <= options.threads <= MAX_THREADS:
        raise ConfigError(f"--threads {options.threads}: from 0 to {MAX_THREADS}; 0: a node's cores", param="--threads")
    by_group = _by_group(options.settings)
    names: list[tuple[str, NodeRole]] = [(f"prefill-{i}", "prefill") for i in range(options.num_prefill)]
    names += [(f"decode-{i}", "decode") for i in range(options.num_decode)]
    shares = divide_cores(cores, len(names), options.threads)
    exclusive = len(set(shares)) == len(names)
    index = _index_settings(index_url, environ)
    nodes = []
    for (name, role), cpus in zip(names, shares, strict=True):
        threads = options.threads or (len(cpus) if exclusive else 1)
        settings = _node_settings(name, threads, options) | index | by_group["node"] | by_group[role]
        pinned = cpus if exclusive and len(cpus) < len(cores) else ()
        nodes.append(_child(name, role, settings, pinned, environ))
    for number in range(options.num_stores):
        name = f"store-{number}"
        settings = _node_settings(name, 1, options) | index | by_group["node"] | by_group["store"]
        nodes.append(_child(name, "store", settings, (), environ))
    _check_same_layout(nodes)
    router = _child("router", "router", _router_settings(options) | by_group["router"], (), environ)
    return ClusterPlan(router, tuple(nodes))


def wanted_index(options: UpOptions, environ: Mapping[str, str]) -> str:
    """ "embedded", "none" or a URL."""
    if options.redis is not None:
        return options.redis
    return environ.get(INDEX_VARIABLE) or "embedded"


def _index_settings(index_url: str | None, environ: Mapping[str, str]) -> dict[str, object]:
    """Empty text is no URL, and hides one that the environment has."""
    if index_url is not None:
        return {"store.redis": index_url}
    return {"store.redis": ""} if environ.get(INDEX_VARIABLE) else {}


def _check_same_layout(nodes: Sequence[ChildSpec]) -> None:
    """Raise ConfigError where nodes could not read each other's KV. Nodes of a role are told the same."""
    first = {spec.role: load_config(NodeConfig, None, spec.settings, {}) for spec in reversed(nodes)}
    for role in ("prefill", "store"):
        if role not in first:
            continue
        for key in _LAYOUT_SETTINGS:
            of_setting = operator.attrgetter(key)
            ours, decode = of_setting(first[role]), of_setting(first["decode"])
            if ours != decode:
                raise ConfigError(
                    f"{key} is {ours!r} on {role} nodes and {decode!r} on decode nodes, which then cannot read each "
                    f"other's KV; set it for both: --set node.{key}={_as_text(decode)}",
                    param=key,
                )


def _by_group(settings: Mapping[str, object]) -> dict[str, dict[str, object]]:
    groups: dict[str, dict[str, object]] = {group: {} for group in _SETTING_GROUPS}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        if group not in groups or not name:
            raise ConfigError(
                f"--set {key}: begin with whose setting it is, one of {', '.join(_SETTING_GROUPS)}, such as "
                "prefill.scheduler.max_num_batched_tokens or node.cache.memory",
                param=key,
            )
        groups[group][name] = value
    return groups


def _router_settings(options: UpOptions) -> dict[str, object]:
    own = {"host": options.host, "port": options.port, "control_port": options.control_port}
    return own | given({"model": options.model, "served_name": options.served_name})


def _node_settings(name: str, threads: int, options: UpOptions) -> dict[str, object]:
    own: dict[str, object] = {"worker_id": name, "model.threads": threads}
    return own | given(
        {
            "model.model": options.model,
            "model.served_name": options.served_name,
            "model.dtype": options.dtype,
            "model.quantization": options.quantization,
            "model.load_format": options.load_format,
            "model.max_model_len": options.max_model_len,
            "cache.memory": options.kv_memory,
            "cache.gpu_memory_utilization": options.gpu_memory_utilization,
            "transfer.transport": options.transport,
            "store.host_memory": options.host_memory,
            "store.disk_path": None if options.disk is None else str(options.disk / name),
        }
    )


def _child(
    name: str, role: Role, settings: Mapping[str, object], cpus: tuple[int, ...], environ: Mapping[str, str]
) -> ChildSpec:
    config = load_config(CONFIG_TYPES[role], None, settings, environ)
    if isinstance(config, NodeConfig):
        parse_size(config.cache.memory, f"{name}: cache.memory")
    variables = {key: variable for variable, key in ENVIRONMENT_KEYS.items()}
    secrets = {variables[key]: str(value) for key, value in settings.items() if key in variables}
    public = {key: value for key, value in settings.items() if key not in variables}
    return ChildSpec(name, role, public, config.drain_timeout_s, cpus, secrets)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
