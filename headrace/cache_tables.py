"""What `headrace cache` prints: replies of the router as tables for people."""

from collections import defaultdict
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from protocol.cache_admin import CacheChanged, CacheStats, PromptFound, PromptsFound
from protocol.store_admin import IndexReport, TierReport

_TIER_ORDER = {"device": 0, "host": 1, "disk": 2}
WIDTH = 140
"""Of what is not a terminal."""


def console() -> Console:
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=WIDTH)


def show(table: Table, *lines: str) -> None:
    out = console()
    out.print(table)
    for line in lines:
        out.print(line, markup=False)


def by_node(stats: CacheStats) -> Table:
    """In blocks, but for the sizes."""
    table = _table("node", "tier", "used", "of", "size", "pinned", "found", "stored", "evicted", "unused", "damaged")
    for node in stats.nodes:
        if all(tier.tier == "device" for tier in node.tiers):
            table.add_row(node.worker, "no store" if not node.tiers else "device only")
        for tier in sorted(node.tiers, key=lambda one: _TIER_ORDER[one.tier]):
            table.add_row(node.worker, *_tier_cells(tier, node.block_bytes))
    return table


def by_tenant(stats: CacheStats) -> Table:
    """Summed over nodes, the largest first."""
    used: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for node in stats.nodes:
        for tenant in node.tenants:
            sums = used[tenant.tenant, tenant.tier]
            for place, value in enumerate(
                (tenant.used, tenant.used * node.block_bytes, tenant.quota * node.block_bytes, tenant.refused)
            ):
                sums[place] += value
    table = _table("tenant", "tier", "blocks", "size", "quota", "refused")
    for (name, tier), (blocks, size, quota, refused) in sorted(used.items(), key=lambda item: -item[1][1]):
        table.add_row(name, tier, str(blocks), format_bytes(size), format_bytes(quota), str(refused))
    return table


def request_lines(stats: CacheStats) -> list[str]:
    """How often each node's store was asked, and what it did not take in."""
    lines = []
    for node in stats.nodes:
        refused = ", ".join(f"{count} for {reason}" for reason, count in node.refused.items() if count)
        if node.lookups or refused:
            share = node.hits / node.lookups if node.lookups else 0.0
            lines.append(
                f"{node.worker}: {node.hits} of {node.lookups} requests found something ({share:.0%}), {node.missed} blocks "
                f"were missed; refused: {refused or 'nothing'}"
            )
    return lines


def index_lines(stats: CacheStats) -> list[str]:
    """One for each node whose index is not well, and one if all are."""
    told = [(node.worker, node.index) for node in stats.nodes if node.index is not None]
    if not told:
        return ["index: none (--redis)"]
    ill = [(worker, index) for worker, index in told if index.breaker != "closed" or not index.registered]
    if ill:
        return [f"index of {worker}: {_ailment(index)}" for worker, index in ill]
    entries, lag_s = sum(index.entries for _, index in told), max(index.lag_s for _, index in told)
    return [f"index: {entries} entries of {len(told)} nodes, at most {lag_s:.1f} s behind"]


def show_found(found: PromptsFound) -> None:
    for prompt in found.prompts:
        table = _table("node", "role", "leading blocks", "device", "host", "disk", "pinned", "")
        for node in prompt.nodes:
            remark = "" if node.known else "by its events only"
            counts = (node.leading, node.device, node.host, node.disk, node.pinned)
            table.add_row(node.worker, node.role, *map(str, counts), remark)
        show(table, _expectation(prompt))


def show_pinned(changed: CacheChanged, ttl: str) -> None:
    if not any(node.num_blocks for node in changed.nodes):
        show(_changed_table(changed, "pinned"), _UNPINNED)
    else:
        show(_changed_table(changed, "pinned"), f"of {changed.num_blocks} blocks, for {ttl}")


def show_changed(changed: CacheChanged, what: str) -> None:
    show(_changed_table(changed, what))


def format_bytes(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


_UNPINNED = (
    "Nothing is pinned: no host or disk tier has any of it, and what only a device has cannot be pinned. "
    "Nodes with store.write=through save blocks as soon as they are computed."
)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < 2 else "right", no_wrap=place < 2)
    return table


def _tier_cells(tier: TierReport, block_bytes: int) -> Iterable[str]:
    counts = (tier.pinned, tier.found, tier.stored, tier.evicted, tier.unused, tier.damaged)
    used = str(tier.used), str(tier.capacity), format_bytes(tier.capacity * block_bytes)
    if tier.tier == "device":
        return tier.tier, *used
    return tier.tier, *used, *map(str, counts)


def _changed_table(changed: CacheChanged, what: str) -> Table:
    table = _table("node", f"{what} blocks")
    for node in changed.nodes:
        table.add_row(node.worker, str(node.num_blocks))
    return table


def _expectation(prompt: PromptFound) -> str:
    share = prompt.expected_tokens / prompt.num_tokens if prompt.num_tokens else 0.0
    return (
        f"{prompt.num_tokens} tokens, {prompt.num_blocks} full blocks of {prompt.block_size}, tenant {prompt.tenant}: "
        f"a request now would reuse {prompt.expected_tokens} tokens ({share:.0%})"
    )


def _ailment(index: IndexReport) -> str:
    if index.breaker == "closed":
        return f"nothing can be published; {index.queued} changes wait, for {index.lag_s:.0f} s"
    return f"given up, tried again in {index.retry_in_s:.0f} s; every node goes on with what is near"
