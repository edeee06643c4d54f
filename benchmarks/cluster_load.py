"""A cluster of our own under an HTTP load: started with the command line, asked as clients ask, ended by a drain.

What the benchmarks of whole clusters share. Prompts are random token ids, so that lengths are exact and no prefix repeats.
"""

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

REPOSITORY = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Sample:
    """One streamed request: seconds from sending to each token's arrival, and the ledger it came back with (ms), that of
    its hand-off in parts beside it. `cached_tokens` of the prompt were not computed."""

    arrivals_s: tuple[float, ...]
    timing_ms: dict[str, float]
    handoff_ms: dict[str, float] = field(default_factory=dict)
    cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


def milliseconds(values_s: list[float], percent: float) -> str:
    return f"{percentile(values_s, percent) * 1e3:.1f}"


def percentile(values: list[float], percent: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


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


@contextlib.contextmanager
def cluster(arguments: Sequence[str]) -> Iterator[str]:
    """`headrace up` with these arguments; yields the endpoint's URL once it is ready, drains it at the end."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "headrace", "up"]
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
        """Of a new prompt."""
        return await self.ask(session, self.prompt(num_prompt_tokens), num_output_tokens)

    async def ask(self, session: aiohttp.ClientSession, prompt: list[int], num_output_tokens: int) -> Sample:
        body = {
            "model": self._model,
            "prompt": prompt,
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
        timing: dict[str, Any] = {}
        usage: dict[str, Any] = {}
        async with session.post(f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise SystemExit(f"request failed: {chunk['error']}")
                usage = chunk.get("usage") or usage
                produced = (chunk.get("usage") or {}).get("completion_tokens", 0)
                arrivals += [time.perf_counter() - sent] * (produced - len(arrivals))
                for choice in chunk["choices"]:
                    timing = choice.get("timing") or timing
                timing = (chunk.get("timing") or [timing])[0]
        handoff = timing.pop("handoff", {})
        cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Sample(tuple(arrivals), timing, handoff, cached_tokens)


async def run_load(
    client: Client, concurrency: int, requests: int, num_prompt_tokens: int, num_output_tokens: int
) -> Load:
    """`requests` requests, at most `concurrency` at a time."""
    slots = asyncio.Semaphore(concurrency)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=180)) as session:

        async def one() -> Sample:
            async with slots:
                return await client.stream(session, num_prompt_tokens, num_output_tokens)

        start = time.perf_counter()
        samples = await asyncio.gather(*(one() for _ in range(requests)))
        return Load(concurrency, tuple(samples), time.perf_counter() - start)


def memory_copy_s(num_bytes: int) -> float:
    """Median of five plain copies between two buffers that have been touched before."""
    source, target = bytearray(num_bytes), bytearray(num_bytes)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - start)
    return statistics.median(times)


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
