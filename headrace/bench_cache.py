"""`headrace bench cache`: replay a trace of requests, and see which eviction policy would have kept the right blocks."""

import argparse
import importlib
from pathlib import Path

import msgspec

from protocol.errors import ConfigError

POLICIES = ("lru", "arc", "s3fifo", "density")
BLOCKS = ("1000", "3000", "5000", "10000", "30000", "50000")

_EPILOG = """\
what it does:
  Replays the requests of a trace in the order and at the times of the trace, on a clock that does not wait, against
  the same directory and the same policies that nodes run. No model, no bytes: minutes become seconds.

  A trace is a file of JSON lines, in the format of Mooncake's published traces; one request a line:
    {"timestamp": 27482, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, 3]}
  timestamp in milliseconds; hash_ids one number for each block of the prompt, the same number for the same block
  after the same blocks. What a block is (16 tokens or 512) is up to the trace; sizes below count such blocks.

what it prints:
  hit rate       leading blocks of a prompt that were held, of all blocks wanted
  clairvoyant    the same for a cache that knows the future: no policy can do better
  blocks written of all blocks wanted: what the policy's choice costs in copies
  two tiers      (--two-tiers) a device's LRU cache above a host tier, by how the host tier is written (headrace's
                 settings `write` and `admission`): hits in either, and blocks written to the host tier (w) per block wanted

which to choose:
  Compare `density` with `lru` at the number of blocks that your host tier has: its size over the bytes of a block.
  Little difference: the tier holds all that comes back, or nearly nothing that does; more memory changes more than a policy.

examples:
  headrace bench cache --trace conversation_trace.jsonl
  headrace bench cache --trace mine.jsonl --policy lru,density --blocks 20000
  headrace bench cache --trace mine.jsonl --policy density --blocks 5000 --two-tiers 1000/5000 --json report.json
"""


def add_parser(what: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = what.add_parser(
        "cache",
        help="which eviction policy would have kept the right blocks of a trace",
        description="Replay a trace of requests against the store's eviction policies, at several sizes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="requests, as JSON lines")
    parser.add_argument(
        "--policy", default=",".join(POLICIES), metavar="LIST", help=f"of {','.join(POLICIES)} (default: all)"
    )
    parser.add_argument(
        "--blocks", default=",".join(BLOCKS), metavar="LIST", help="sizes of the tier (default: %(default)s)"
    )
    parser.add_argument(
        "--two-tiers", default="", metavar="LIST", help="device/host blocks, as in 1000/4000,5000/20000 (default: none)"
    )
    parser.add_argument("--max-requests", type=int, metavar="N", help="only the first N requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")


def run(options: argparse.Namespace) -> int:
    policies = _items(options.policy)
    for name in policies:
        if name not in POLICIES:
            raise ConfigError(f"--policy: {name!r} is none of {', '.join(POLICIES)}", param="--policy")
    if options.max_requests is not None and options.max_requests < 1:
        raise ConfigError(f"--max-requests: {options.max_requests} is less than 1", param="--max-requests")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ConfigError(f"--json: there is no folder {options.json.resolve().parent}", param="--json")
    blocks = tuple(_count(text, "--blocks") for text in _items(options.blocks))
    pairs = tuple(_pair(text) for text in _items(options.two_tiers))
    if not policies or not blocks:
        raise ConfigError("--policy and --blocks need one entry each", param="--blocks" if policies else "--policy")
    # Late: no other command has a use for them.
    report = importlib.import_module("kv_store.replay.report")
    trace = importlib.import_module("kv_store.replay.trace")
    requests = trace.read_trace(options.trace, options.max_requests)
    settings = report.ReplayOptions(policies=policies, blocks=blocks, two_tiers=pairs)
    result = report.replay(requests, settings, lambda line: print(line, flush=True))
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    return 0


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _count(text: str, option: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 1 << 40:
        raise ConfigError(f"{option}: {text!r} is not a number of blocks", param=option)
    return int(text)


def _pair(text: str) -> tuple[int, int]:
    device, slash, host = text.partition("/")
    if not slash:
        raise ConfigError(f"--two-tiers: {text!r} is not as 1000/4000", param="--two-tiers")
    return _count(device, "--two-tiers"), _count(host, "--two-tiers")
