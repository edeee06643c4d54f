"""What long prompts do to the streams of a colocated engine, for token budgets of a step; recommends the default budget.

    python -m benchmarks.bench_interference               what `make bench-interference` runs: all budgets on all cores, then on one
    python -m benchmarks.bench_interference --quick       three budgets, a few bursts; about a minute
    python -m benchmarks.bench_interference --threads 1 --budgets 128 256 --json FILE

Four streams (128 tokens in, 200 out, one request after another) decode all the time; every 5 s a prompt of 1,800 tokens
arrives. ITL: gaps between a stream's tokens, within a request, pooled. Stalled: the share of a stream's time that lies in
gaps above 3 x its own p50; p99 alone hides stalls that are rare and long. TTFT counts from the instant at which the
prompt was due; prefill is its tokens over the median TTFT.

One core is what a node of a 1P1D pair on two cores has.

The rule for the default: small budgets keep ITL flat and make long prompts wait longer. The smallest budget is
recommended whose median TTFT is at most 15 % above the best of all budgets: flat streams for a price that is bounded.
Over several numbers of threads, the largest of their recommendations, so that the price is bounded everywhere.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.cluster_load import percentile, progress
from benchmarks.engine_bench.burst_load import BurstLoad
from benchmarks.engine_bench.contestant import start_engine
from benchmarks.engine_bench.manifest import Manifest, keep_cores
from benchmarks.engine_bench.processor_watch import ProcessorWatch, disturbance

BUDGETS = (64, 128, 256, 512, 1024, 2048)
QUICK_BUDGETS = (128, 512, 2048)
TTFT_SLACK = 0.15
STALL_FACTOR = 3.0
BUDGET_SETTING = "scheduler.max_num_batched_tokens"


@dataclass(frozen=True, slots=True)
class Trial:
    threads: int
    budget: int
    async_scheduling: str


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """Seconds, as in BurstOutcome, and what other processes took of a core meanwhile."""

    stream_gaps: list[list[float]]
    burst_ttfts: list[float]
    foreign_share: float


@dataclass(frozen=True, slots=True)
class Interference:
    """What a trial showed, over all its rounds. Seconds; `stalled_share` of the streams' time."""

    trial: Trial
    itl_p50: float
    itl_p99: float
    itl_p999: float
    longest_stall: float
    stalled_share: float
    ttft_p50: float
    ttft_max: float
    prefill_tokens_per_s: float
    num_gaps: int
    foreign_share: float

    @classmethod
    def of(cls, trial: Trial, rounds: Sequence[RoundOutcome], burst_tokens: int) -> "Interference":
        streams = [stream for outcome in rounds for stream in outcome.stream_gaps]
        gaps = [gap for stream in streams for gap in stream]
        ttfts = [ttft for outcome in rounds for ttft in outcome.burst_ttfts]
        return cls(
            trial=trial,
            itl_p50=percentile(gaps, 50),
            itl_p99=percentile(gaps, 99),
            itl_p999=percentile(gaps, 99.9),
            longest_stall=max(gaps),
            stalled_share=sum(_stalled_s(stream) for stream in streams) / sum(gaps),
            ttft_p50=percentile(ttfts, 50),
            ttft_max=max(ttfts),
            prefill_tokens_per_s=burst_tokens / percentile(ttfts, 50),
            num_gaps=len(gaps),
            foreign_share=max(outcome.foreign_share for outcome in rounds),
        )

    def row(self) -> str:
        times = (self.itl_p50, self.itl_p99, self.itl_p999, self.longest_stall)
        return (
            f"| {self.trial.budget} | {self.trial.async_scheduling} | {' | '.join(f'{t * 1e3:.1f}' for t in times)} "
            f"| {self.stalled_share:.1%} | {self.ttft_p50 * 1e3:.0f} | {self.ttft_max * 1e3:.0f} "
            f"| {self.prefill_tokens_per_s:.0f} | {self.longest_stall / self.itl_p50:.1f} |"
        )


HEADER = (
    "| budget | async | ITL p50 ms | p99 | p99.9 | longest | stalled | TTFT p50 ms | max | prefill tok/s | longest / p50 |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def _stalled_s(gaps: list[float]) -> float:
    return sum(gap for gap in gaps if gap > STALL_FACTOR * percentile(gaps, 50)) if gaps else 0.0


def recommend(results: Sequence[Interference]) -> int:
    """The budget that the rule picks from the trials of one number of threads."""
    best_ttft = min(result.ttft_p50 for result in results)
    return min(result.trial.budget for result in results if result.ttft_p50 <= best_ttft * (1 + TTFT_SLACK))


def run_trial(trial: Trial, load: BurstLoad, dtype: str) -> RoundOutcome:
    """A fresh engine under the load."""
    settings: dict[str, object] = {
        "model.dtype": dtype,
        "model.threads": trial.threads,
        BUDGET_SETTING: trial.budget,
        "scheduler.async_scheduling": trial.async_scheduling,
    }
    streams = load.num_streams * (load.prompt_tokens + load.output_tokens)
    tokens_held = 2 * (streams + load.burst_tokens)
    with start_engine(f"budget {trial.budget}", settings, tokens_held) as child:
        child.wait_ready()
        child.ask("prefill", tokens=load.burst_tokens, repeats=1)
        with ProcessorWatch(child.cpu_s, ()) as watch:
            outcome = child.ask("burst_load", **asdict(load))
    return RoundOutcome(outcome["stream_gaps"], outcome["burst_ttfts"], watch.taken.foreign)


def measure(trials: Sequence[Trial], load: BurstLoad, dtype: str, rounds: int) -> list[Interference]:
    """All trials in turn, as many times as there are rounds; the rounds of a trial are pooled. The trials are of one number
    of threads."""
    outcomes: dict[Trial, list[RoundOutcome]] = {trial: [] for trial in trials}
    for number in range(1, rounds + 1):
        for trial in trials:
            progress(
                f"round {number} of {rounds}, {trial.threads} threads, budget {trial.budget}, "
                f"async scheduling {trial.async_scheduling}: {load.duration_s:.0f} s"
            )
            outcomes[trial].append(run_trial(trial, load, dtype))
    return [Interference.of(trial, outcomes[trial], load.burst_tokens) for trial in trials]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budgets", type=int, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of cores; all, then one, by default")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--async-scheduling", nargs="+", default=["auto"], choices=("auto", "on", "off"))
    parser.add_argument("--bursts", type=int, default=12, help="long prompts of a trial")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two of them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    options.budgets = options.budgets or list(QUICK_BUDGETS if options.quick else BUDGETS)
    if options.quick:
        options.bursts, options.rounds = min(options.bursts, 2), 1
    return options


def main() -> None:
    options = parse_options()
    manifest = Manifest.take("benchmarks.bench_interference")
    load = BurstLoad(4, 128, 200, 1800, options.interval, options.bursts)
    all_cores = keep_cores(0)
    numbers = options.threads or ([all_cores] if options.quick else [all_cores, 1])
    print("\n".join(["# Interference", "", *manifest.lines()]))
    results: list[Interference] = []
    recommendations: dict[int, int] = {}
    for threads in sorted(set(numbers), reverse=True):
        keep_cores(threads)
        trials = [Trial(threads, budget, mode) for mode in options.async_scheduling for budget in options.budgets]
        found = measure(trials, load, options.dtype, options.rounds)
        recommendations[threads] = recommend(
            [each for each in found if each.trial.async_scheduling == options.async_scheduling[0]]
        )
        results += found
        print("\n".join(["", f"## {threads} threads", "", *HEADER, *(result.row() for result in found)]), flush=True)
        print(f"\nwithin {TTFT_SLACK:.0%} of the best TTFT from a budget of {recommendations[threads]} on")
    print(f"\n{disturbance(max(result.foreign_share for result in results))}")
    if any(result.ttft_max > load.interval_s for result in results):
        print(
            "long prompts waited for one another: more of them than this machine can sustain; try a longer --interval"
        )
    print(f"\nrecommended default of {BUDGET_SETTING}: {max(recommendations.values())}")
    if options.json:
        figures = [asdict(result) for result in results]
        report = {
            "manifest": asdict(manifest),
            "load": asdict(load),
            "results": figures,
            "recommended": recommendations,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
