"""What int8 weights and bf16 cost in quality, against fp32, on a text of our own.

    python -m benchmarks.bench_quantization               what `make bench-quantization` runs; a few minutes
    python -m benchmarks.bench_quantization --quick       the first quarter of the text

Teacher-forced, window by window of the text (benchmarks/data/rivers_and_mills.txt): perplexity; agreement, the share of positions
at which the most likely next token is fp32's; KL, the mean of KL(fp32 || this) in nats. Free-running: greedy continuations
of the beginning of each paragraph, and how many of their tokens are fp32's before the first that is not.
"""

import argparse
import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from tokenizers import Tokenizer

from benchmarks.cluster_load import progress
from benchmarks.engine_bench.case import PRECISIONS, Precision
from benchmarks.engine_bench.contestant import precision_settings
from benchmarks.engine_bench.manifest import Manifest, keep_cores
from benchmarks.engine_bench.measured_engine import MeasuredEngine
from engine.build import plan_engine
from engine.torch_runner import TorchRunner, build_torch_runner
from protocol.errors import ConfigError
from runtime.config import load_config
from runtime.models.resolve import DEFAULT_MODEL, resolve_model
from runtime.node_config import NodeConfig

TEXT = Path(__file__).parent / "data" / "rivers_and_mills.txt"
REFERENCE: Precision = "fp32"
WINDOW_TOKENS = 512
OPENING_TOKENS, CONTINUATION_TOKENS = 24, 64


@dataclass(frozen=True, slots=True)
class Quality:
    """`mean_identical_prefix` of CONTINUATION_TOKENS tokens. `agreement` and `mean_kl` are against REFERENCE."""

    precision: Precision
    perplexity: float
    agreement: float
    mean_kl: float
    mean_identical_prefix: float

    def row(self) -> str:
        return (
            f"| {self.precision} | {self.perplexity:.3f} | {self.agreement:.2%} | {self.mean_kl:.5f} "
            f"| {self.mean_identical_prefix:.1f} of {CONTINUATION_TOKENS} |"
        )


@dataclass(frozen=True, slots=True)
class Answers:
    """What one precision makes of the text: `logprobs[i]` [window tokens - 1, vocab_size] predict `windows[i][1:]`."""

    logprobs: tuple[torch.Tensor, ...]
    continuations: tuple[tuple[int, ...], ...]


def windows_of(token_ids: Sequence[int]) -> list[Sequence[int]]:
    """Whole windows, each computed alone; what is left over is dropped, unless it is all there is."""
    starts = range(0, max(1, len(token_ids) - WINDOW_TOKENS + 1), WINDOW_TOKENS)
    return [token_ids[start : start + WINDOW_TOKENS] for start in starts]


def answer(settings: Mapping[str, object], windows: Sequence[Sequence[int]], openings: Sequence[list[int]]) -> Answers:
    """Raises ConfigError where the engine does not have this precision."""
    runner = _runner(settings)
    logprobs = tuple(runner.logits(window)[:-1].log_softmax(dim=-1) for window in windows)
    del runner
    gc.collect()
    engine = MeasuredEngine(settings, OPENING_TOKENS + CONTINUATION_TOKENS)
    try:
        continuations = tuple(tuple(engine.generate(opening, CONTINUATION_TOKENS)[0]) for opening in openings)
    finally:
        engine.close()
    return Answers(logprobs, continuations)


def compare(precision: Precision, windows: Sequence[Sequence[int]], found: Answers, reference: Answers) -> Quality:
    losses, agreements, divergences = [], [], []
    for window, mine, theirs in zip(windows, found.logprobs, reference.logprobs, strict=True):
        following = torch.tensor(window[1:])[:, None]
        losses += (-mine.gather(1, following)).squeeze(1).tolist()
        agreements += (mine.argmax(dim=-1) == theirs.argmax(dim=-1)).tolist()
        divergences += (theirs.exp() * (theirs - mine)).sum(dim=-1).tolist()
    prefixes = [
        identical_prefix(mine, theirs)
        for mine, theirs in zip(found.continuations, reference.continuations, strict=True)
    ]
    return Quality(precision, math.exp(fmean(losses)), fmean(agreements), fmean(divergences), fmean(prefixes))


def identical_prefix(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """How many tokens are the same before the first difference."""
    pairs = enumerate(zip(tokens, reference, strict=True))
    return next((index for index, (mine, theirs) in pairs if mine != theirs), len(tokens))


def _runner(settings: Mapping[str, object]) -> TorchRunner:
    block_size = load_config(NodeConfig, None, settings, {}).cache.block_size
    num_blocks = -(-WINDOW_TOKENS // block_size)
    plan = plan_engine(load_config(NodeConfig, None, {**settings, "cache.num_blocks": num_blocks}, {}))
    return build_torch_runner(plan.files, plan.options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=0, help="cores; 0: all that are there")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    manifest = Manifest.take("benchmarks.bench_quantization")
    threads = keep_cores(options.threads)
    files = resolve_model(DEFAULT_MODEL, progress=progress)
    tokenizer = Tokenizer.from_file(str(files.tokenizer_path))
    text = TEXT.read_text("utf-8")
    windows = windows_of(tokenizer.encode(text).ids)
    openings = [tokenizer.encode(paragraph).ids[:OPENING_TOKENS] for paragraph in text.split("\n\n")]
    if options.quick:
        windows, openings = windows[: max(1, len(windows) // 4)], openings[: max(1, len(openings) // 4)]
    print("\n".join(["# Quality of precisions", "", *manifest.lines(), ""]))
    print(
        f"{sum(len(window) - 1 for window in windows)} positions, {len(openings)} greedy continuations, {files.name}\n"
    )
    print("| precision | perplexity | agreement | KL | identical prefix |\n| --- | --- | --- | --- | --- |", flush=True)
    reference: Answers | None = None
    results: list[Quality] = []
    for precision in (REFERENCE, *(each for each in PRECISIONS if each != REFERENCE)):
        progress(f"{precision}")
        try:
            found = answer(precision_settings(precision, threads), windows, openings)
        except ConfigError as error:
            print(f"{precision} not measured: {error}")
            continue
        reference = reference or found
        results.append(compare(precision, windows, found, reference))
        print(results[-1].row(), flush=True)
    if options.json:
        report = {"manifest": asdict(manifest), "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
