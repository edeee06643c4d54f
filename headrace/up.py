"""`headrace up`: a whole cluster on this machine, in the foreground, until Ctrl-C."""

import argparse
import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from headrace.cores import available_cores, parse_cpus, stay_on
from headrace.index_server import IndexServer
from headrace.plan import UpOptions, make_plan, wanted_index
from headrace.prepare import PreparedModel, prepare_model, run_probe
from headrace.serve import TRANSPORT_CHOICES
from headrace.settings import add_set_flag, parse_settings
from headrace.status_view import StatusView, make_view
from headrace.supervisor import Supervisor
from protocol.errors import ConfigError
from router.config import RouterConfig
from runtime.life import Phase, ProcessLife, install_signal_handlers
from runtime.models.resolve import DEFAULT_MODEL
from runtime.serving import bind_socket

INTERRUPTED_STATUS = 130
CONTROL_PORT = RouterConfig().control_port

_EPILOG = """\
examples:
  headrace up                                            the built-in model, one prefill and one decode node
  headrace up --model ./my-model --prefill 1 --decode 2  a local Hugging Face folder
  headrace up --model owner/name --dtype bfloat16 --kv-memory 4GiB
  headrace up --cpu-affinity 0-7 --threads 4             on eight cores, four for each of the two nodes
  headrace up --store --disk /var/lib/headrace           with a store node; KV outlives the processes
  headrace up --colocated 2                              no disaggregation: two replicas that do it all
  headrace up --set prefill.scheduler.max_num_batched_tokens=1024 --set router.retries=2

--set names a process (router, prefill, decode, store, or node for all but the router) and one of its settings, as
`headrace serve ROLE --print-config` lists them.
The cores are divided between the nodes, so that no node's threads disturb another's. Ctrl-C finishes
running requests and ends the cluster; a second Ctrl-C ends it at once. HEADRACE_API_KEY, if set, is
what clients must show.
"""

_HINT = """
The cluster is up after {seconds:.1f} s: {url}/v1, model {model}. Try:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{curl_key} \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}], "temperature": 0}}'

or in Python:

  {python_import}from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key={python_key})
  messages = [{{"role": "user", "content": "What is the capital of France?"}}]
  for chunk in client.chat.completions.create(model="{model}", messages=messages, temperature=0, stream=True):
      print(chunk.choices[0].delta.content or "", end="", flush=True)

What is kept where: headrace cache stats --cluster {control_url}

Ctrl-C finishes running requests and ends the cluster.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "up",
        help="run a whole cluster on this machine",
        description="Start a router, prefill nodes and decode nodes on this machine, and watch over them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    what = parser.add_argument_group("what is served")
    what.add_argument("--model", default=DEFAULT_MODEL, help="built-in name, Hugging Face folder, .gguf file or hub id")
    what.add_argument("--served-name", help="what clients call the model")
    what.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    what.add_argument("--quantization", help="none, or int8 for weights of a byte each (CPU)")
    what.add_argument("--load-format", help="auto, or dummy for random weights")
    what.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest prompt plus output")
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address of the public API (default: 127.0.0.1)")
    where.add_argument(
        "--port", type=int, default=8000, help="port of the public API; 0 takes a free one (default: 8000)"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--prefill", type=int, metavar="N", help="prefill nodes (default: 1)")
    how.add_argument("--decode", type=int, metavar="N", help="decode nodes (default: 1)")
    how.add_argument(
        "--colocated",
        type=int,
        metavar="N",
        help="instead: N ordinary replicas, each of which computes the prompts of what it decodes",
    )
    how.add_argument(
        "--transport",
        choices=TRANSPORT_CHOICES,
        default="nixl",
        help="how KV blocks move; auto measures and takes the fastest (default: nixl)",
    )
    how.add_argument(
        "--threads", type=int, default=0, metavar="N", help="compute threads of each node (default: its cores)"
    )
    how.add_argument(
        "--cpu-affinity",
        type=parse_cpus,
        metavar="LIST",
        help='cores for the whole cluster, such as "0-3,8" (default: all that this process may use)',
    )
    how.add_argument("--kv-memory", metavar="SIZE", help='KV cache of each node, such as "2GiB"')
    how.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="SHARE",
        help="of a GPU's memory, for everything of a node on it (default: 0.9)",
    )
    keep = parser.add_argument_group("what is kept beside the devices")
    keep.add_argument(
        "--host-memory",
        metavar="SIZE",
        help='host memory of each node for KV blocks, such as "8GiB" or "25%%"; 0: none',
    )
    keep.add_argument(
        "--disk", type=Path, metavar="DIR", help="keep KV blocks on disk as well, in a folder there a node"
    )
    keep.add_argument("--store", action="store_true", help="add a store node, whose blocks outlive the other nodes")
    keep.add_argument("--stores", type=int, metavar="N", help="the same, N of them")
    keep.add_argument(
        "--redis",
        metavar="URL",
        help="where nodes find each other's blocks: unix://, redis:// or rediss://; embedded: a server of the cluster's"
        " own; none (default: HEADRACE_REDIS_URL, or embedded)",
    )
    how.add_argument("--log-dir", type=Path, metavar="DIR", help="write each process's log to a file there")
    how.add_argument("--no-restart", action="store_true", help="do not start again what dies")
    add_set_flag(parser, "node.cache.block_size=32")


def run(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    if arguments.cpu_affinity:
        stay_on(arguments.cpu_affinity)
    make_plan(options, available_cores(), os.environ)
    _check_port(options)
    if options.log_dir is not None:
        options.log_dir.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_up(options))


async def _up(options: UpOptions) -> int:
    started = time.monotonic()
    life = ProcessLife()
    install_signal_handlers(life)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, life.drain, "the terminal was closed")
    async with AsyncExitStack() as stack:
        view = stack.enter_context(make_view([]))
        model = await _prepare(options, life, view)
        if model is None:
            return INTERRUPTED_STATUS
        name = options.served_name or model.name
        ready_options = dataclasses.replace(
            options, model=str(model.folder), served_name=name, control_port=_control_port()
        )
        index_url = await _start_index(options, view, stack)
        plan = make_plan(ready_options, available_cores(), os.environ, index_url)

        def on_ready(url: str, control_url: str) -> None:
            view.settle()
            view.say(_hint(url, control_url, name, time.monotonic() - started, os.environ))

        supervisor = Supervisor(plan, life, view, restart=options.restart, log_dir=options.log_dir, on_ready=on_ready)
        await supervisor.run()
    return INTERRUPTED_STATUS if life.phase is Phase.STOPPED else 0


async def _start_index(options: UpOptions, view: StatusView, stack: AsyncExitStack) -> str | None:
    """Its URL; None where there is none. Raises ConfigError for one that is wanted and cannot be had."""
    wanted = wanted_index(options, os.environ)
    if wanted == "none":
        return None
    if wanted != "embedded":
        return wanted
    try:
        return (await stack.enter_async_context(IndexServer(view))).url
    except ConfigError as error:
        if options.redis is not None or options.num_stores:
            raise
        view.say(f"index | {error.message}; going on without an index")
        return None


async def _prepare(options: UpOptions, life: ProcessLife, view: StatusView) -> PreparedModel | None:
    """Model and kernels, side by side; None if the user does not want to wait for them."""
    assert options.model is not None
    view.update("model", "looking", options.model)

    async def kernels() -> None:
        view.update("kernels", "looking")
        report = await run_probe("kernels")
        view.update("kernels", "ready" if report.ok else "slow", report.detail)

    async def model(name: str) -> PreparedModel:
        weights = options.load_format != "dummy"
        prepared = await prepare_model(name, weights, lambda line: view.update("model", "preparing", line))
        view.update("model", "ready", str(prepared.folder))
        return prepared

    preparing = asyncio.gather(model(options.model), kernels())
    interrupted = asyncio.ensure_future(life.wait(Phase.DRAINING))
    either: set[asyncio.Future[Any]] = {preparing, interrupted}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not preparing.done():
            return None
        prepared, _ = preparing.result()
        return prepared
    finally:
        interrupted.cancel()
        preparing.cancel()
        await asyncio.gather(preparing, interrupted, return_exceptions=True)


def _options(arguments: argparse.Namespace) -> UpOptions:
    num_prefill, num_decode = _pools(arguments)
    return UpOptions(
        model=arguments.model,
        served_name=arguments.served_name,
        num_prefill=num_prefill,
        num_decode=num_decode,
        num_stores=arguments.stores if arguments.stores is not None else int(arguments.store),
        redis=arguments.redis,
        host_memory=arguments.host_memory,
        disk=None if arguments.disk is None else arguments.disk.expanduser().absolute(),
        host=arguments.host,
        port=arguments.port,
        transport=arguments.transport,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        load_format=arguments.load_format,
        threads=arguments.threads,
        max_model_len=arguments.max_model_len,
        kv_memory=arguments.kv_memory,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        log_dir=arguments.log_dir,
        restart=not arguments.no_restart,
        settings=parse_settings(arguments.settings),
    )


def _pools(arguments: argparse.Namespace) -> tuple[int, int]:
    """Prefill and decode nodes. A replica is a decode node without prefill nodes beside it."""
    if arguments.colocated is None:
        return (
            1 if arguments.prefill is None else arguments.prefill,
            1 if arguments.decode is None else arguments.decode,
        )
    if arguments.prefill is not None or arguments.decode is not None:
        raise ConfigError(
            "--colocated replicas are instead of prefill and decode nodes: give either it, or --prefill and --decode",
            param="--colocated",
        )
    if arguments.colocated < 1:
        raise ConfigError(f"--colocated {arguments.colocated}: at least one replica", param="--colocated")
    return 0, arguments.colocated


def _check_port(options: UpOptions) -> None:
    """Fail before anything is prepared. The router takes the port a moment later, so this is only a courtesy."""
    try:
        bind_socket(options.host, options.port).close()
    except ConfigError as error:
        raise ConfigError(
            f"{error.message}; choose another with --port (0 takes a free one)", param="--port"
        ) from error


def _control_port() -> int:
    """The one that `headrace cache` and `headrace doctor` look at by themselves, if it is free; else any."""
    try:
        bind_socket("127.0.0.1", CONTROL_PORT).close()
    except ConfigError:
        return 0
    return CONTROL_PORT


def _hint(url: str, control_url: str, model: str, seconds: float, environ: Mapping[str, str]) -> str:
    guarded = bool(environ.get("HEADRACE_API_KEY"))
    text = _HINT.format(
        url=url,
        control_url=control_url,
        model=model,
        seconds=seconds,
        curl_key=' -H "Authorization: Bearer $HEADRACE_API_KEY"' if guarded else "",
        python_import="import os\n  " if guarded else "",
        python_key='os.environ["HEADRACE_API_KEY"]' if guarded else '"none"',
    )
    return text.rstrip()
