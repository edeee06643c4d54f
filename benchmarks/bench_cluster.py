"""TTFT, ITL, throughput and the exposed hand-off of a 1P1D cluster, beside two peers measured in the same run.

    python benchmarks/bench_cluster.py                    what `make bench` runs; under three minutes
    python benchmarks/bench_cluster.py --output FILE      also writes the report as Markdown

The cluster is started by this script with the command line's own defaults. The peers, on the same cores, one after the
other: the same engine colocated (one decode node that prefills for itself), and the transformers library's `generate`
for one stream. The limit beside the hand-off is the time of a plain memory copy of the same bytes.

TTFT: request sent -> first text. ITL: gaps between later token arrivals, pooled. The exposed hand-off is the nodes' own
figure: end of the last prefill chunk -> start of the step that computes the second token.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from runtime.models.resolve import DEFAULT_MODEL, resolve_model

REPOSITORY = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 120
CONCURRENCY = (1, 8, 32)
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 32
HANDOFF_PROMPT_TOKENS = 2000


@dataclass(frozen=True)
class Sample:
    """One streamed request: seconds from sending to each token's arrival, and the ledger it came back with (ms)."""

    arrivals_s: tuple[float, ...]
    timing_ms: dict[str, float]

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


@dataclass(frozen=True)
class Load:
    """What a number of concurrent requests saw."""

    concurrency: int
    samples: tuple[Sample, ...]
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(len(sample.arrivals_s) for sample in self.samples) / self.elapsed_s

    def row(self) -> str:
        ttft = [sample.ttft_s for sample in self.samples]
        gaps = [gap for sample in self.samples for gap in sample.gaps_s]
        return (
            f"| {self.concurrency} | {milliseconds(ttft, 50)} | {milliseconds(ttft, 99)} | {milliseconds(gaps, 50)} "
            f"| {milliseconds(gaps, 99)} | {self.tokens_per_s:.1f} |"
        )


def milliseconds(values_s: list[float], percent: int) -> str:
    return f"{percentile(values_s, percent) * 1e3:.1f}"


def percentile(values: list[float], percent: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@contextlib.contextmanager
def cluster(prefill: int, decode: int, arguments: list[str]) -> Iterator[str]:
    """`headrace up`; yields the endpoint's URL once it is ready, drains it at the end."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "headrace", "up", "--prefill", str(prefill), "--decode", str(decode)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not answers(f"{url}/ready"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"the cluster did not start:\n{log.read()}")
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # our own server
            return True
    except (urllib.error.URLError, OSError):
        return False


class Client:
    """Streams completions of random prompts, given as token ids so that lengths are exact and no prefix repeats."""

    def __init__(self, url: str, seed: int) -> None:
        self._url = url
        self._random = random.Random(seed)
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
            self._model = str(json.load(response)["data"][0]["id"])

    def prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(100, 40_000) for _ in range(num_tokens)]

    async def stream(self, session: aiohttp.ClientSession, num_prompt_tokens: int, num_output_tokens: int) -> Sample:
        body = {
            "model": self._model,
            "prompt": self.prompt(num_prompt_tokens),
            "max_tokens": num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "include_timing": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        sent = time.perf_counter()
        arrivals: list[float] = []
        timing: dict[str, float] = {}
        async with session.post(f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise SystemExit(f"request failed: {chunk['error']}")
                produced = (chunk.get("usage") or {}).get("completion_tokens", 0)
                arrivals += [time.perf_counter() - sent] * (produced - len(arrivals))
                for choice in chunk["choices"]:
                    timing = choice.get("timing") or timing
                timing = (chunk.get("timing") or [timing])[0]
        return Sample(tuple(arrivals), timing)

    async def load(self, concurrency: int, requests: int, num_prompt_tokens: int, num_output_tokens: int) -> Load:
        """`requests` requests, at most `concurrency` at a time."""
        slots = asyncio.Semaphore(concurrency)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=180)) as session:

            async def one() -> Sample:
                async with slots:
                    return await self.stream(session, num_prompt_tokens, num_output_tokens)

            start = time.perf_counter()
            samples = await asyncio.gather(*(one() for _ in range(requests)))
            return Load(concurrency, tuple(samples), time.perf_counter() - start)


def run_loads(url: str, seed: int) -> list[Load]:
    client = Client(url, seed)
    asyncio.run(client.load(1, 2, PROMPT_TOKENS, 8))
    return [
        asyncio.run(client.load(concurrency, max(3, concurrency), PROMPT_TOKENS, OUTPUT_TOKENS))
        for concurrency in CONCURRENCY
    ]


def measure_handoff(url: str, seed: int) -> list[float]:
    """Exposed hand-off of long prompts, one after the other, in seconds."""
    client = Client(url, seed)
    load = asyncio.run(client.load(1, 5, HANDOFF_PROMPT_TOKENS, 4))
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


def memory_copy_s(num_bytes: int) -> float:
    """Median of five plain copies between two buffers that have been touched before."""
    source, target = bytearray(num_bytes), bytearray(num_bytes)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="nixl", choices=("nixl", "shm", "tcp"))
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    report = build_report(options.transport)
    print(report)
    if options.output:
        options.output.write_text(report + "\n")


def build_report(transport: str) -> str:
    progress("1P1D cluster")
    with cluster(1, 1, ["--transport", transport]) as url:
        loads = run_loads(url, seed=1)
        progress("hand-off of long prompts")
        exposed = measure_handoff(url, seed=2)
    progress("peer: the same engine, colocated")
    with cluster(0, 1, []) as url:
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
            f"`python benchmarks/bench_cluster.py --transport {transport}` on {machine()}; smollm2-135m-instruct, "
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


def machine() -> str:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}, Python {platform.python_version()}"


def progress(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
