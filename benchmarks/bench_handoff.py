"""The exposed hand-off of a 1P1D cluster, part by part: end of the last prefill chunk -> start of the second token's step.

    python -m benchmarks.bench_handoff                       8 prompts of 2,000 random tokens at once, three rounds
    python -m benchmarks.bench_handoff --transport shm --rounds 5 --output FILE

Real processes (`headrace up`, the built-in model, its default dtype), random prompts, so that nothing is cached. Of each
request the nodes' own ledger: queue, wire, verify, join (protocol.phases.HandoffPhases). A join cannot be shorter than what is
left of the decode step under way, so that the step's time stands beside it; wire cannot be shorter than a plain copy of
the last chunk's bytes, which stands beside it too.

With 2 output tokens nothing decodes for long, and steps are short; with 32, hand-offs meet a busy decode node.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench_cluster import memory_copy_s, run_load
from benchmarks.cluster_load import Client, cluster, machine, percentile, progress
from engine.build import plan_engine
from runtime.node_config import NodeConfig

OUTPUT_TOKENS = (2, 32)
PARTS = ("queue", "wire", "verify", "join")
CHUNK_TOKENS = 128


@dataclass(frozen=True, slots=True)
class HandoffSample:
    """Of one request, in milliseconds. `step_ms` is the mean decode step that it saw."""

    parts_ms: dict[str, float]
    total_ms: float
    step_ms: float


@dataclass(frozen=True, slots=True)
class HandoffTable:
    output_tokens: int
    samples: tuple[HandoffSample, ...]
    num_local: int

    def lines(self) -> list[str]:
        step_ms = statistics.median(sample.step_ms for sample in self.samples)
        rows = [self._row(part, [sample.parts_ms[part] for sample in self.samples]) for part in PARTS]
        rows.append(self._row("**total**", [sample.total_ms for sample in self.samples]))
        local = f"; {self.num_local} more were computed on the decode node" if self.num_local else ""
        return [
            f"## {self.output_tokens} output tokens",
            "",
            f"{len(self.samples)} hand-offs{local}. Decode step: {step_ms:.1f} ms (median).",
            "",
            "| part | p50 ms | p99 ms | mean ms |",
            "|---|---|---|---|",
            *rows,
            "",
            self._limit(step_ms),
            "",
        ]

    def _row(self, name: str, values_ms: Sequence[float]) -> str:
        values = list(values_ms)
        return (
            f"| {name} | {percentile(values, 50):.1f} | {percentile(values, 99):.1f} | {statistics.mean(values):.1f} |"
        )

    def _limit(self, step_ms: float) -> str:
        means = {part: statistics.mean(sample.parts_ms[part] for sample in self.samples) for part in PARTS}
        largest = max(means, key=means.__getitem__)
        share = means[largest] / max(1e-9, sum(means.values()))
        join = f"; a join waits for half a step on average, {step_ms / 2:.1f} ms" if largest == "join" else ""
        return f"Limits: {largest}, {share:.0%} of the time{join}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="nixl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to headrace up")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    arguments = ["--transport", options.transport]
    for setting in options.set:
        arguments += ["--set", setting]
    with cluster(arguments) as url:
        client = Client(url, seed=1)
        asyncio.run(run_load(client, 1, 2, options.prompt_tokens, 4))
        tables = [measure(client, options, output_tokens) for output_tokens in OUTPUT_TOKENS]
    report = build_report(options, tables)
    print(report)
    if options.output:
        options.output.write_text(report + "\n")


def measure(client: Client, options: argparse.Namespace, output_tokens: int) -> HandoffTable:
    samples: list[HandoffSample] = []
    num_local = 0
    for number in range(options.rounds):
        progress(f"{output_tokens} output tokens, round {number + 1} of {options.rounds}")
        concurrency = options.concurrency
        load = asyncio.run(run_load(client, concurrency, concurrency, options.prompt_tokens, output_tokens))
        for sample in load.samples:
            timing = sample.timing_ms
            if not timing["handoff_ms"]:
                num_local += 1
                continue
            parts = {part: sample.handoff_ms[f"{part}_ms"] for part in PARTS}
            samples.append(HandoffSample(parts, timing["handoff_ms"], timing["decode_ms"] / (output_tokens - 1)))
    if not samples:
        raise SystemExit("no prompt was handed off: the decode node computed all of them itself")
    return HandoffTable(output_tokens, tuple(samples), num_local)


def build_report(options: argparse.Namespace, tables: Sequence[HandoffTable]) -> str:
    layout = plan_engine(NodeConfig()).layout
    last_chunk = options.prompt_tokens % CHUNK_TOKENS or CHUNK_TOKENS
    last_bytes = layout.num_blocks_for(last_chunk) * layout.block_bytes
    settings = "".join(f" --set {setting}" for setting in options.set)
    lines = [
        f"# Exposed hand-off, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python -m benchmarks.bench_handoff --transport {options.transport} --rounds {options.rounds}{settings}` on {machine()}; "
        f"{options.concurrency} prompts of {options.prompt_tokens} random tokens at once.",
        "",
        f"The last chunk of {last_chunk} tokens is {last_bytes / 1e6:.1f} MB; a plain copy of it takes "
        f"{memory_copy_s(last_bytes) * 1e3:.2f} ms here.",
        "",
    ]
    for table in tables:
        lines += table.lines()
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    main()
