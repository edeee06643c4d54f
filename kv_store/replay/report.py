"""CacheReport: one trace, every policy and size that was asked for, beside the clairvoyant bound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from kv_store.admission import AdmissionMode
from kv_store.policy.factory import POLICY_NAMES, PolicyName
from kv_store.replay.clairvoyant import clairvoyant_hit_rate
from kv_store.replay.one_tier import OneTierResult, replay_one_tier
from kv_store.replay.reuse import QUANTILES, ReuseSummary, summarize_reuse
from kv_store.replay.trace import TraceRequest
from kv_store.replay.two_tiers import TwoTiers, TwoTiersResult, WriteMode, replay_two_tiers

WAYS_TO_WRITE: tuple[tuple[WriteMode, AdmissionMode], ...] = (
    ("through", "all"),
    ("through", "second-touch"),
    ("back", "all"),
    ("back", "second-touch"),
    ("back", "auto"),
)


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """`two_tiers`: pairs of a device's and a host tier's number of blocks."""

    policies: tuple[PolicyName, ...] = POLICY_NAMES
    blocks: tuple[int, ...] = (1_000, 3_000, 5_000, 10_000, 30_000, 50_000)
    two_tiers: tuple[tuple[int, int], ...] = ()


class CacheReport(msgspec.Struct, frozen=True):
    """`clairvoyant`: the bound for each of `blocks`, in their order."""

    reuse: ReuseSummary
    blocks: tuple[int, ...]
    clairvoyant: tuple[float, ...]
    one_tier: tuple[OneTierResult, ...]
    two_tiers: tuple[TwoTiersResult, ...]

    def hit_rate(self, policy: PolicyName, capacity_blocks: int) -> float:
        """Raises KeyError for what was not asked for."""
        for result in self.one_tier:
            if (result.policy, result.capacity_blocks) == (policy, capacity_blocks):
                return result.hit_rate
        raise KeyError((policy, capacity_blocks))


def replay(requests: Sequence[TraceRequest], options: ReplayOptions, say: Callable[[str], None]) -> CacheReport:
    """Says each line of its tables (Markdown) as soon as it is known."""
    reuse = summarize_reuse(requests)
    for line in _describe(reuse):
        say(line)
    say("")
    say(_row("hit rate, %", [f"{count:,}" for count in options.blocks]))
    say(_row("---", ["---:"] * len(options.blocks)))
    one_tier: list[OneTierResult] = []
    for policy in options.policies:
        results = [replay_one_tier(requests, policy, count) for count in options.blocks]
        say(_row(policy, [_percent(result.hit_rate) for result in results]))
        one_tier += results
    clairvoyant = [clairvoyant_hit_rate(requests, count) for count in options.blocks]
    say(_row("clairvoyant", [_percent(rate) for rate in clairvoyant]))
    say("")
    say(_row("blocks written, % of wanted", [f"{count:,}" for count in options.blocks]))
    say(_row("---", ["---:"] * len(options.blocks)))
    for policy in options.policies:
        say(_row(policy, [_percent(result.write_rate) for result in one_tier if result.policy == policy]))
    two_tiers = _replay_two_tiers(requests, options, say) if options.two_tiers else []
    return CacheReport(reuse, options.blocks, tuple(clairvoyant), tuple(one_tier), tuple(two_tiers))


def _replay_two_tiers(
    requests: Sequence[TraceRequest], options: ReplayOptions, say: Callable[[str], None]
) -> list[TwoTiersResult]:
    say("")
    say(_row("device / host blocks", ["policy", *(f"{write}, {admission}" for write, admission in WAYS_TO_WRITE)]))
    say(_row("---", ["---", *["---:"] * len(WAYS_TO_WRITE)]))
    two_tiers: list[TwoTiersResult] = []
    for device_blocks, host_blocks in options.two_tiers:
        for policy in options.policies:
            results = [
                replay_two_tiers(requests, TwoTiers(device_blocks, host_blocks, policy, write, admission))
                for write, admission in WAYS_TO_WRITE
            ]
            cells = [f"{_percent(result.hit_rate)} w {result.host_write_rate:.2f}" for result in results]
            say(_row(f"{device_blocks:,} / {host_blocks:,}", [policy, *cells]))
            two_tiers += results
    return two_tiers


def _describe(reuse: ReuseSummary) -> list[str]:
    lines = [
        f"{reuse.num_requests:,} requests in {reuse.duration_s:,.0f} s want {reuse.num_wanted_blocks:,} blocks, "
        f"{reuse.num_distinct_blocks:,} different ones.",
        f"A cache without limit hits {_percent(reuse.unlimited_hit_rate)} %; "
        f"{_percent(reuse.never_again_share)} % of the blocks are never wanted again.",
    ]
    if reuse.gap_s is not None:
        gaps = ", ".join(
            f"p{quantile * 100:g} {gap:,.0f} s" for quantile, gap in zip(QUANTILES, reuse.gap_s, strict=True)
        )
        lines.append(f"From one want of a block to its next: {gaps}.")
    return lines


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
