"""TTFT, ITL, throughput and the exposed hand-off of a 1P1D cluster, beside two peers measured in the same run.

    python -m benchmarks.bench_cluster                    what `make bench` runs; under three minutes
    python -m benchmarks.bench_cluster --output FILE      also writes the report as Markdown

The cluster is started by this script with the command line's own defaults. The peers, on the same cores, one after the
other: the same engine colocated (one decode node that prefills for itself), and the transformers library's `generate`
for one stream. The limit beside the hand-off is the time of a plain memory copy of the same bytes.

TTFT: request sent -> first text. ITL: gaps between later token arrivals, pooled. The exposed hand-off is the nodes' own
figure: end of the last prefill chunk -> start of the step that computes the second token.
"""

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.cluster_load import (
    Client,
    Load,
    cluster,
    machine,
    memory_copy_s,
    milliseconds,
    percentile,
    progress,
    run_load,
)
from runtime.models.resolve import DEFAULT_MODEL, resolve_model

CONCURRENCY = (1, 8, 32)
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 32
HANDOFF_PROMPT_TOKENS = 2000


def run_loads(url: str, seed: int) -> list[Load]:
    client = Client(url, seed)
    asyncio.run(run_load(client, 1, 2, PROMPT_TOKENS, 8))
    return [
        asyncio.run(run_load(client, concurrency, max(3, concurrency), PROMPT_TOKENS, OUTPUT_TOKENS))
        for concurrency in CONCURRENCY
    ]


def measure_handoff(url: str, seed: int) -> list[float]:
    """Exposed hand-off of long prompts, one after the other, in seconds."""
    client = Client(url, seed)
    load = asyncio.run(run_load(client, 1, 5, HANDOFF_PROMPT_TOKENS, 4))
    return [sample.timing_ms["handoff_ms"] / 1e3 for sample in load.samples]


def transformers_tokens_per_s(folder: Path) -> float:
    """Decode rate of the transformers library, one stream, all cores, bf16, after the same prompt length."""
    import torch  # only this peer needs it
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16
    )  # its `generate` accepts no model by its types
    prompt = torch.randint(100, 40_000, (1, PROMPT_TOKENS))
    model.generate(prompt, max_new_tokens=4, do_sample=False)
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=1, do_sample=False)
    first = time.perf_counter() - start
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=OUTPUT_TOKENS, min_new_tokens=OUTPUT_TOKENS, do_sample=False)
    return (OUTPUT_TOKENS - 1) / (time.perf_counter() - start - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="nixl", choices=("auto", "nixl", "ucx", "shm", "tcp"))
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    report = build_report(options.transport)
    print(report)
    if options.output:
        options.output.write_text(report + "\n")


def build_report(transport: str) -> str:
    progress("1P1D cluster")
    with cluster(["--transport", transport]) as url:
        loads = run_loads(url, seed=1)
        progress("hand-off of long prompts")
        exposed = measure_handoff(url, seed=2)
    progress("peer: the same engine, colocated")
    with cluster(["--colocated", "1"]) as url:
        colocated = run_loads(url, seed=3)
    progress("peer: transformers")
    files = resolve_model(DEFAULT_MODEL)
    peer = transformers_tokens_per_s(files.folder)
    layout_bytes = HANDOFF_PROMPT_TOKENS * 23_040
    copy_s = memory_copy_s(layout_bytes)
    single = colocated[0]
    decode_rate = 1 / percentile([gap for sample in single.samples for gap in sample.gaps_s], 50)
    header = (
        "| concurrent | TTFT p50 ms | TTFT p99 ms | ITL p50 ms | ITL p99 ms | tokens/s |\n|---|---|---|---|---|---|"
    )
    return "\n".join(
        [
            f"# Cluster benchmark, {time.strftime('%Y-%m-%d')}",
            "",
            f"`python -m benchmarks.bench_cluster --transport {transport}` on {machine()}; smollm2-135m-instruct, "
            f"default dtype, prompts of {PROMPT_TOKENS} random tokens, {OUTPUT_TOKENS} output tokens.",
            "",
            f"## 1 prefill node + 1 decode node, {transport}, one core each",
            "",
            header,
            *(load.row() for load in loads),
            "",
            "## Colocated: one node, all cores",
            "",
            header,
            *(load.row() for load in colocated),
            "",
            "## Ratios",
            "",
            *(
                f"- ITL p99 at {split.concurrency} concurrent, disaggregated / colocated: {itl_p99(split) / itl_p99(one):.2f}"
                for split, one in zip(loads, colocated, strict=True)
            ),
            f"- decode rate of one stream, colocated engine / transformers generate (bf16, all cores): "
            f"{decode_rate / peer:.2f} ({decode_rate:.1f} against {peer:.1f} tokens/s)",
            "",
            f"## Exposed hand-off, prompts of {HANDOFF_PROMPT_TOKENS} tokens",
            "",
            f"median {milliseconds(exposed, 50)} ms, worst {milliseconds(exposed, 100)} ms of {len(exposed)}; a plain copy of "
            f"all the prompt's KV ({layout_bytes / 1e6:.1f} MB in bf16) takes {copy_s * 1e3:.1f} ms here: "
            f"exposed / copy = {statistics.median(exposed) / copy_s:.2f}",
        ]
    )


def itl_p99(load: Load) -> float:
    return percentile([gap for sample in load.samples for gap in sample.gaps_s], 99)


if __name__ == "__main__":
    main()
