"""What long prompts do to running streams: 1 prefill + 1 decode node beside the same engine as ordinary replicas.

    python -m benchmarks.bench_disaggregation               what `make bench-disaggregation` runs; about twelve minutes
    python -m benchmarks.bench_disaggregation --quick       one burst rate, one round; about two minutes
    python -m benchmarks.bench_disaggregation --intervals 6 4 --transport shm --json FILE

All contestants get the same cores: `headrace up` (one prefill and one decode node) and `headrace up --colocated N` for one
replica on all cores and for one a core, each with every token budget of a step in --budgets, so that colocated serving is
compared at its best. They are measured in turn, as often as there are rounds, through the HTTP endpoint.

The load: four streams (128 tokens in, 200 out, one request after another) all the time, and every `interval` seconds a
prompt of 2,000 tokens with 16 to answer, by the clock whatever the cluster does. ITL: gaps between the tokens of a stream,
pooled; a gap never spans two requests. Stalled: the share of a stream's time in gaps above 3 x its own p50. TTFT of long
prompts counts from the instant at which they were due: that is the price of giving prefill half of the cores.

Colocated's best is the contestant with the shortest longest stall among those that keep up with the bursts. Ratios: ITL
p99 / p50 of 1P1D (target: at most 1.5), and its longest stall over that of colocated's best (target: at most 0.2).
"""

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp

from benchmarks.cluster_load import Client, cluster, percentile, progress
from benchmarks.engine_bench.manifest import Manifest, keep_cores

NUM_STREAMS = 4
STREAM_PROMPT_TOKENS = 128
STREAM_OUTPUT_TOKENS = 200
BURST_PROMPT_TOKENS = 2000
BURST_OUTPUT_TOKENS = 16
WARM_UP_S = 3.0
STALL_FACTOR = 3.0
BUDGETS = (64, 128, 256, 512)
INTERVALS_S = (8.0, 5.0)
BUDGET_SETTING = "node.scheduler.max_num_batched_tokens"


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to use the machine. `arguments` are those of `headrace up`."""

    name: str
    arguments: tuple[str, ...]
    disaggregated: bool


@dataclass(frozen=True, slots=True)
class Observed:
    """Of one run, in seconds. `stream_gaps[i]`: between the tokens of stream i, within each of its requests."""

    stream_gaps: list[list[float]]
    burst_ttfts: list[float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a contestant showed at one rate of bursts, over all rounds. Seconds; `stalled_share` of the streams' time."""

    contestant: str
    disaggregated: bool
    interval: float
    itl_p50: float
    itl_p99: float
    itl_p999: float
    longest_stall: float
    stalled_share: float
    ttft_p50: float
    ttft_max: float
    num_gaps: int

    @classmethod
    def of(cls, contestant: Contestant, interval_s: float, rounds: Sequence[Observed]) -> "Outcome":
        streams = [stream for observed in rounds for stream in observed.stream_gaps]
        gaps = [gap for stream in streams for gap in stream]
        ttfts = [ttft for observed in rounds for ttft in observed.burst_ttfts]
        return cls(
            contestant=contestant.name,
            disaggregated=contestant.disaggregated,
            interval=interval_s,
            itl_p50=percentile(gaps, 50),
            itl_p99=percentile(gaps, 99),
            itl_p999=percentile(gaps, 99.9),
            longest_stall=max(gaps),
            stalled_share=sum(map(_stalled_s, streams)) / sum(gaps),
            ttft_p50=percentile(ttfts, 50),
            ttft_max=max(ttfts),
            num_gaps=len(gaps),
        )

    @property
    def keeps_up(self) -> bool:
        """No long prompt waited for the one before it."""
        return self.ttft_max <= self.interval

    def row(self) -> str:
        times = (self.itl_p50, self.itl_p99, self.itl_p999, self.longest_stall)
        return (
            f"| {self.contestant} | {' | '.join(f'{t * 1e3:.1f}' for t in times)} | {self.itl_p99 / self.itl_p50:.2f} "
            f"| {self.stalled_share:.1%} | {self.ttft_p50 * 1e3:.0f} | {self.ttft_max * 1e3:.0f} |"
        )


HEADER = (
    "| contestant | ITL p50 ms | p99 | p99.9 | longest | p99 / p50 | stalled | long prompts' TTFT p50 ms | max |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def _stalled_s(gaps: list[float]) -> float:
    return sum(gap for gap in gaps if gap > STALL_FACTOR * percentile(gaps, 50)) if gaps else 0.0


def contestants(budgets: Sequence[int], transport: str, num_cores: int) -> list[Contestant]:
    split = Contestant(f"1 prefill + 1 decode, {transport}", ("--transport", transport), True)
    replicas = [
        Contestant(
            f"{number} colocated, budget {budget}",
            ("--colocated", str(number), "--set", f"{BUDGET_SETTING}={budget}"),
            False,
        )
        for number in sorted({1, num_cores})
        for budget in budgets
    ]
    return [split, *replicas]


class BurstRun:
    """The load on one cluster, from its first request to the last token of the last long prompt."""

    def __init__(self, client: Client, interval_s: float, num_bursts: int) -> None:
        self._client = client
        self._interval_s = interval_s
        self._num_bursts = num_bursts
        self._measuring_from = 0.0
        self._over = False
        self._observed = Observed([[] for _ in range(NUM_STREAMS)], [])

    async def run(self) -> Observed:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
            ) as session,
            asyncio.TaskGroup() as tasks,
        ):
            self._measuring_from = time.perf_counter() + WARM_UP_S
            for stream in range(NUM_STREAMS):
                tasks.create_task(self._stream(session, stream))
            bursts = [
                tasks.create_task(self._burst(session, self._measuring_from + (index + 0.5) * self._interval_s))
                for index in range(self._num_bursts)
            ]
            await asyncio.sleep(WARM_UP_S + self._num_bursts * self._interval_s)
            await asyncio.wait(bursts)
            self._over = True
        return self._observed

    async def _stream(self, session: aiohttp.ClientSession, stream: int) -> None:
        # The first requests end at different times, so that their successors' prompts do not coincide.
        num_tokens = STREAM_OUTPUT_TOKENS * (stream + 1) // NUM_STREAMS
        while not self._over:
            sent_at = time.perf_counter()
            sample = await self._client.stream(session, STREAM_PROMPT_TOKENS, num_tokens)
            arrivals = [sent_at + seconds for seconds in sample.arrivals_s]
            self._observed.stream_gaps[stream].extend(
                later - earlier for earlier, later in itertools.pairwise(arrivals) if earlier >= self._measuring_from
            )
            num_tokens = STREAM_OUTPUT_TOKENS

    async def _burst(self, session: aiohttp.ClientSession, due_at: float) -> None:
        await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
        late_s = time.perf_counter() - due_at
        sample = await self._client.stream(session, BURST_PROMPT_TOKENS, BURST_OUTPUT_TOKENS)
        self._observed.burst_ttfts.append(late_s + sample.ttft_s)


def run_round(contestant: Contestant, intervals: Sequence[float], num_bursts: int, seed: int) -> dict[float, Observed]:
    """A fresh cluster under every rate in turn."""
    with cluster(contestant.arguments) as url:
        client = Client(url, seed)
        return {interval: asyncio.run(BurstRun(client, interval, num_bursts).run()) for interval in intervals}


def verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    split = next(outcome for outcome in outcomes if outcome.disaggregated)
    rivals = [outcome for outcome in outcomes if not outcome.disaggregated and outcome.keeps_up]
    lines = [f"- ITL p99 / p50 of 1P1D: {split.itl_p99 / split.itl_p50:.2f} (target: at most 1.5)"]
    if not split.keeps_up:
        lines.append("- long prompts waited for one another at 1P1D: its prefill node does not sustain this rate")
    if not rivals:
        return [*lines, "- no colocated contestant keeps up with this rate"]
    best = min(rivals, key=lambda outcome: outcome.longest_stall)
    return [
        *lines,
        f"- longest stall, 1P1D / {best.contestant} (colocated's best): {split.longest_stall / best.longest_stall:.2f} "
        "(target: at most 0.2)",
        f"- ITL p99, 1P1D / {best.contestant}: {split.itl_p99 / best.itl_p99:.2f}",
        f"- median TTFT of long prompts, 1P1D / {best.contestant}: {split.ttft_p50 / best.ttft_p50:.2f} (the price)",
    ]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--transport", default="nixl", choices=("auto", "nixl", "ucx", "shm", "tcp"))
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="colocated's tokens per step")
    parser.add_argument("--intervals", type=float, nargs="+", help="seconds between long prompts")
    parser.add_argument("--bursts", type=int, default=5, help="long prompts of a run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    options.intervals = options.intervals or list(INTERVALS_S[:1] if options.quick else INTERVALS_S)
    if options.quick:
        options.budgets, options.bursts, options.rounds = options.budgets[:2], min(options.bursts, 2), 1
    return options


def main() -> None:
    options = parse_options()
    manifest = Manifest.take("benchmarks.bench_disaggregation")
    field = contestants(options.budgets, options.transport, keep_cores(0))
    seen: dict[tuple[str, float], list[Observed]] = {}
    for number in range(1, options.rounds + 1):
        for contestant in field:
            progress(f"round {number} of {options.rounds}: {contestant.name}")
            for interval, observed in run_round(contestant, options.intervals, options.bursts, number).items():
                seen.setdefault((contestant.name, interval), []).append(observed)
    print("\n".join(["# Disaggregated beside colocated", "", *manifest.lines()]))
    results: list[Outcome] = []
    for interval in options.intervals:
        outcomes = [Outcome.of(each, interval, seen[each.name, interval]) for each in field]
        print("\n".join(["", f"## A prompt of {BURST_PROMPT_TOKENS:,} tokens every {interval:g} s", "", *HEADER]))
        print("\n".join([*(outcome.row() for outcome in outcomes), "", *verdicts(outcomes)]))
        results += outcomes
    if options.json:
        report = {"manifest": asdict(manifest), "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
