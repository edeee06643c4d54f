"""`headrace`: parses, dispatches to one command, and turns what went wrong into one line and an exit code.

Exit codes: 0 it worked, 1 it did not, 2 the command line or a setting is at fault, 130 interrupted twice.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from headrace import bench, cache, doctor, model, serve, up
from protocol.errors import ConfigError, HeadraceError

_EPILOG = """\
examples:
  headrace up                              a cluster on this machine: router, one prefill node, one decode node
  headrace up --model owner/name --decode 2
  headrace serve decode --config node.toml one role of a cluster across machines
  headrace model owner/name                download a model before it is needed
  headrace cache stats                     what the caches of a running cluster hold
  headrace doctor                          is this machine fit to run it?
  headrace bench transfer --quick          how fast do KV blocks move here?
  headrace bench cache --trace FILE        which blocks of my requests would a store keep?
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace",
        description="A disaggregated prefill/decode serving cluster for large language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"headrace {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (up, serve, model, cache, doctor, bench):
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ConfigError as error:
        print(f"headrace: {error.message}", file=sys.stderr)
        return 2
    except HeadraceError as error:
        print(f"headrace: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _version() -> str:
    try:
        return importlib.metadata.version("headrace")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"
