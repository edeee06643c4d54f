"""`headrace bench WHAT`: `transfer` measures how fast KV blocks move between processes; `cache`, what a store would keep."""

import argparse
import importlib
from pathlib import Path
from typing import get_args

import msgspec

from headrace import bench_cache
from protocol.errors import ConfigError
from protocol.transfer import TransportKind
from runtime.config import parse_size

BLOCK_BYTES = ("64KiB", "360KiB", "2MiB")
"""A layer's share of a block, a block of SmolLM2-135M, a block of an 8B model (16 tokens, bfloat16)."""

NUM_BLOCKS = ("1", "16", "128")
QUICK_BLOCK_BYTES = ("1MiB",)
QUICK_NUM_BLOCKS = ("1", "64")

_MEASURED: tuple[TransportKind, ...] = tuple(kind for kind in get_args(TransportKind) if kind != "inproc")

_EPILOG = """\
what it does:
  Two processes on loopback hold an arena of KV blocks each. Every transport that works here moves blocks
  from one to the other, through the same code that nodes run, and so do three baselines:
    memcpy      one thread, inside one process: what no transport can beat
    raw socket  one TCP connection, sendall and recv_into, always contiguous
    raw nixl    NIXL called directly with the same descriptors
  All take turns, round after round, so that noise hits all alike. What is carried by UCX is measured once
  more with UCX_TLS=tcp, which is what two hosts without RDMA get. Bytes are verified before they count.

what the columns say:
  GB/s, best   rate of the median and of the fastest transfer (10^9 bytes a second)
  +sums        the same with the checksums that a reader computes over every block
  median, p99  latency of one transfer of that many blocks
  CPU s/GB     CPU seconds of both processes, and of their helpers, for 10^9 bytes
  memcpy       share of the memcpy baseline
  reference    share of what the same means give without Headrace

examples:
  headrace bench transfer --quick                           under a minute
  headrace bench transfer --transports nixl,tcp --json results.json
  headrace bench transfer --block-bytes 2MiB --num-blocks 64,256 --rounds 20
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "bench",
        help="measure this machine, or replay a trace",
        description="Measure this machine, or replay a trace of requests.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    bench_cache.add_parser(what)
    transfer = what.add_parser(
        "transfer",
        help="how fast KV blocks move between two processes",
        description="Measure every transport of KV blocks on this machine, beside memcpy, raw sockets and raw NIXL.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    transfer.set_defaults(run=run_transfer)
    transfer.add_argument("--quick", action="store_true", help="one block size, few blocks, short rounds")
    transfer.add_argument(
        "--transports", type=_list, default=_MEASURED, metavar="LIST", help=f"of {','.join(_MEASURED)} (default: all)"
    )
    transfer.add_argument(
        "--block-bytes", type=_list, metavar="LIST", help=f"sizes of a block (default: {','.join(BLOCK_BYTES)})"
    )
    transfer.add_argument(
        "--num-blocks", type=_list, metavar="LIST", help=f"blocks in a transfer (default: {','.join(NUM_BLOCKS)})"
    )
    transfer.add_argument("--rounds", type=int, metavar="N", help="turns of each contestant (default: 12, quick 5)")
    transfer.add_argument("--no-ucx-tcp", action="store_true", help="do not measure again with UCX_TLS=tcp")
    transfer.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")


def run_transfer(options: argparse.Namespace) -> int:
    """0, or 1 if bytes arrived that were not the sender's."""
    for kind in options.transports:
        if kind not in _MEASURED:
            raise ConfigError(f"--transports: {kind!r} is none of {', '.join(_MEASURED)}", param="--transports")
    if options.rounds is not None and options.rounds < 1:
        raise ConfigError(f"--rounds: {options.rounds} is less than 1", param="--rounds")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ConfigError(f"--json: there is no folder {options.json.resolve().parent}", param="--json")
    block_bytes = options.block_bytes or (QUICK_BLOCK_BYTES if options.quick else BLOCK_BYTES)
    num_blocks = options.num_blocks or (QUICK_NUM_BLOCKS if options.quick else NUM_BLOCKS)
    # Late: no other command has a use for it.
    bench = importlib.import_module("kv_transfer.bench.run")
    settings = bench.BenchOptions(
        transports=tuple(options.transports),
        block_bytes=tuple(parse_size(size, "--block-bytes") for size in block_bytes),
        num_blocks=tuple(_count(count) for count in num_blocks),
        rounds=options.rounds or (5 if options.quick else 12),
        slice_s=0.04 if options.quick else 0.1,
        idle_s=1.0 if options.quick else 5.0,
        ucx_tcp=not options.no_ucx_tcp,
    )
    report = bench.run(settings, lambda line: print(line, flush=True))
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return 0 if all(result.verified for result in report.results) else 1


def _list(text: str) -> tuple[str, ...]:
    items = tuple(item.strip() for item in text.split(",") if item.strip())
    if not items:
        raise argparse.ArgumentTypeError("an empty list")
    return items


def _count(text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"--num-blocks: {text!r} is not a number of blocks", param="--num-blocks")
    return int(text)
