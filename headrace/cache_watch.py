"""`headrace cache watch`: the stats of all nodes, again and again, with what happened in between as rates; or the index's events."""

import argparse
import os
import time
from collections.abc import Callable

import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace import cache_tables, index_watch
from protocol.cache_admin import CacheStats
from protocol.errors import ConfigError
from protocol.store_admin import TierReport

_RATES = ("found", "stored", "evicted", "unused")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="default: 2")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="end after so many; default: 0, never")
    parser.add_argument("--events", action="store_true", help="instead: every change of the index, as it is published")
    parser.add_argument(
        "--redis",
        default=os.environ.get("HEADRACE_REDIS_URL"),
        metavar="URL",
        help="the index, for --events; default: HEADRACE_REDIS_URL",
    )
    parser.add_argument("--namespace", default="headrace", help="as the nodes' store.namespace; default: headrace")


def run(options: argparse.Namespace, ask: Callable[[], CacheStats]) -> int:
    """On a terminal one table that changes, elsewhere one after the other. Until interrupted."""
    if options.interval < 0.1:
        raise ConfigError(f"--interval {options.interval:g}: at least 0.1 s", param="--interval")
    if options.events:
        if not options.redis:
            raise ConfigError("--events needs the index's URL: --redis URL, or HEADRACE_REDIS_URL", param="--redis")
        return index_watch.run(options, lambda line: print(line, flush=True))
    out = cache_tables.console()
    shown, before, before_at = 0, None, 0.0
    with Live(console=out, auto_refresh=False) as live:
        while True:
            stats, at = ask(), time.monotonic()
            view = render(stats, before, at - before_at)
            if options.json:
                print(msgspec.json.encode(stats).decode(), flush=True)
            elif out.is_terminal:
                live.update(view, refresh=True)
            else:
                out.print(view)
            shown += 1
            if shown == options.count:
                return 1 if stats.silent else 0
            before, before_at = stats, at
            time.sleep(options.interval)


def render(stats: CacheStats, before: CacheStats | None, elapsed_s: float) -> RenderableType:
    """`before`: what was told `elapsed_s` seconds earlier, if anything was. Rates are blocks a second."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = ("node", "tier", "used", "full", "found/s", "stored/s", "evicted/s", "unused/s", "damaged")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < 2 else "right")
    before_of = {} if before is None else {(n.worker, t.tier): t for n in before.nodes for t in n.tiers}
    for node in stats.nodes:
        for tier in node.tiers:
            full = f"{tier.used / tier.capacity:.0%}" if tier.capacity else "-"
            rates = _rates(tier, before_of.get((node.worker, tier.tier)), elapsed_s)
            table.add_row(node.worker, tier.tier, str(tier.used), full, *rates, str(tier.damaged))
    lines = [*cache_tables.index_lines(stats), *(f"{node.worker}: {node.error.message}" for node in stats.silent)]
    return Group(table, *(Text(line) for line in lines))


def _rates(now: TierReport, before: TierReport | None, elapsed_s: float) -> list[str]:
    """Of a node that has restarted in between, none."""
    counts = [0] if before is None else [getattr(now, name) - getattr(before, name) for name in _RATES]
    if before is None or elapsed_s <= 0 or min(counts) < 0:
        return ["-"] * len(_RATES)
    return [f"{count / elapsed_s:.1f}" for count in counts]
