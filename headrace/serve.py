"""`headrace serve ROLE`: one role in this process, in the foreground, until SIGTERM.

What must be settled before a role is imported is settled here: its settings, whose child it is, its cores, its logs.
"""

import argparse
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from headrace.cores import available_cores, parse_cpus, stay_on
from headrace.settings import add_set_flag, given, parse_settings
from protocol.errors import ConfigError
from protocol.transfer import TransportKind
from router.config import RouterConfig
from runtime.config import format_config, load_config
from runtime.life import watch_parent
from runtime.logs import configure_logging
from runtime.node_config import NodeConfig

NodeRole = Literal["prefill", "decode", "store"]
Role = Literal["router", NodeRole]
RoleConfig = RouterConfig | NodeConfig

CONFIG_TYPES: Mapping[Role, type[RoleConfig]] = {
    "router": RouterConfig,
    "prefill": NodeConfig,
    "decode": NodeConfig,
    "store": NodeConfig,
}
_MODULES: Mapping[Role, str] = {
    "router": "router.main",
    "prefill": "prefill_node.main",
    "decode": "decode_node.main",
    "store": "store_node.main",
}

TRANSPORT_CHOICES = ("auto", *(kind for kind in get_args(TransportKind) if kind != "inproc"))

_NODE_FLAGS: Mapping[str, str] = {
    "--router": "routers",
    "--transport": "transfer.transport",
    "--dtype": "model.dtype",
    "--quantization": "model.quantization",
    "--threads": "model.threads",
    "--kv-memory": "cache.memory",
    "--gpu-memory-utilization": "cache.gpu_memory_utilization",
    "--host-memory": "store.host_memory",
    "--disk": "store.disk_path",
    "--redis": "store.redis",
}
"""Flags that are settings of nodes only."""

_EPILOG = """\
examples:
  headrace serve router --host 0.0.0.0 --set control_host=10.0.0.1
  headrace serve prefill --router http://10.0.0.1:8001 --host 10.0.0.2 --port 9000
  headrace serve decode --config node.toml --set cache.memory=8GiB
  headrace serve store --router http://10.0.0.1:8001 --host 10.0.0.4 --host-memory 25% --disk /var/lib/headrace
  headrace serve decode --print-config

Secrets come from the environment: HEADRACE_CLUSTER_KEY (between routers and nodes; needed as soon as one of
them is reachable from the network), HEADRACE_API_KEY (what clients of the router show) and
HEADRACE_REDIS_URL (the index, where its URL has a password).
Flags win over the environment, the environment over the file, the file over the defaults.
The first SIGTERM or Ctrl-C finishes what runs, the second stops at once.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "serve",
        help="run one role of a cluster in this process",
        description="Run a router, a prefill node, a decode node or a store node in this process.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("role", choices=get_args(Role))
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on; 0 takes a free one")
    parser.add_argument("--model", help="built-in name, Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--served-name", help="what clients call the model")
    parser.add_argument("--log-level", help="debug, info, warning or error")
    parser.add_argument(
        "--cpu-affinity", type=parse_cpus, metavar="LIST", help='run on these cores only, such as "0-3,8"'
    )
    nodes = parser.add_argument_group("nodes")
    nodes.add_argument("--router", action="append", metavar="URL", help="a router's control URL; may be repeated")
    nodes.add_argument(
        "--transport",
        choices=TRANSPORT_CHOICES,
        help="how KV blocks move; auto measures, with each peer, and takes the fastest (default: auto)",
    )
    nodes.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    nodes.add_argument("--quantization", help="none, or int8 for weights of a byte each (CPU)")
    nodes.add_argument("--threads", help="compute threads; 0: one for each core the process may use")
    nodes.add_argument("--kv-memory", metavar="SIZE", help='memory for the KV cache, such as "8GiB"')
    nodes.add_argument(
        "--gpu-memory-utilization", metavar="SHARE", help="of a GPU's memory, for everything together (default: 0.9)"
    )
    nodes.add_argument(
        "--host-memory",
        metavar="SIZE",
        help='host memory for KV blocks beside the device, such as "8GiB" or "25%%"; 0: none',
    )
    nodes.add_argument("--disk", metavar="DIR", help="keep KV blocks on disk as well, in this folder of the node's own")
    nodes.add_argument(
        "--redis",
        metavar="URL",
        help="the index of the cluster's blocks: unix://, redis:// or rediss:// (default: none)",
    )
    add_set_flag(parser, "cache.block_size=32")
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings in force, secrets masked, and end"
    )


def run(options: argparse.Namespace) -> int:
    role: Role = options.role
    config = load_config(CONFIG_TYPES[role], options.config, _overrides(options), os.environ)
    if options.print_config:
        print(format_config(config))
        return 0
    watch_parent()
    if options.cpu_affinity:
        stay_on(options.cpu_affinity)
    if isinstance(config, RouterConfig):
        configure_logging(role, config.log_level, (config.cluster_key, config.api_key))
    else:
        configure_logging(config.worker_id or role, config.log_level, (config.cluster_key,))
        threads = config.model.threads or len(available_cores())
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read once, when torch is imported
    # Late, because a role's imports are its own: the router must not load torch, nor a node the router's tokenizers.
    return int(importlib.import_module(_MODULES[role]).run(config))


def _overrides(options: argparse.Namespace) -> dict[str, object]:
    node = options.role != "router"
    prefix = "model." if node else ""
    flags = {
        "host": options.host,
        "port": options.port,
        f"{prefix}model": options.model,
        f"{prefix}served_name": options.served_name,
        "log_level": options.log_level,
    }
    node_flags = {flag: getattr(options, flag.removeprefix("--").replace("-", "_")) for flag in _NODE_FLAGS}
    for flag, value in given(node_flags).items():
        if not node:
            raise ConfigError(f"{flag}: {_NODE_FLAGS[flag]} is a setting of nodes, not of a router", param=flag)
        flags[_NODE_FLAGS[flag]] = value
    return given(flags) | parse_settings(options.settings)
