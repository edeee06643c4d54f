"""A cluster of our own under an HTTP load: started with the command line, asked as clients ask, ended by a drain.

What the benchmarks of whole clusters share. Prompts are random token ids, so that lengths are exact and no prefix repeats.
"""

import contextlib
import json
import math
import os
import platform
import random
import signal
import socket
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
    its hand-off in parts beside it."""

    arrivals_s: tuple[float, ...]
    timing_ms: dict[str, float]
    handoff_ms: dict[str, float] = field(default_factory=dict)

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
        timing: dict[str, Any] = {}
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
        handoff = timing.pop("handoff", {})
        return Sample(tuple(arrivals), timing, handoff)


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
