"""llama.cpp as a contestant: its own tools, llama-bench for prefill and llama-batched-bench for decode.

They take no commands, so each measurement is a run of its own; loading and warming up are outside the times that they
report. All streams of a decode begin with one prompt, copied into each stream's own cache, not shared. The cache is
float16, llama.cpp's own choice, except with float32 weights.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine_bench.case import Case, Precision
from benchmarks.engine_bench.child import ChildFailed

BENCH, BATCHED_BENCH, QUANTIZE = "llama-bench", "llama-batched-bench", "llama-quantize"
FILE_TYPES: dict[Precision, str] = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}
CACHE_TYPES: dict[Precision, str] = {"fp32": "f32", "bf16": "f16", "int8": "f16"}
TIMEOUT_S = 900.0


def convert(bench: Path, source: Path, precision: Precision, folder: Path) -> Path:
    """The model's weights in this precision, in `folder`. What `source` was quantised to before does not matter here.

    Raises ChildFailed."""
    target = folder / f"{precision}.gguf"
    _run([str(bench.with_name(QUANTIZE)), "--allow-requantize", str(source), str(target), FILE_TYPES[precision]])
    return target


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """`bench` is the path of llama-bench; the other tools lie beside it."""

    name: str
    precision: Precision
    bench: Path
    model: Path
    threads: int

    def measure(self, case: Case) -> float:
        return self._prefill(case) if case.kind == "prefill" else self._decode(case)

    def cpu_s(self) -> float:
        """Nothing of it runs between two measurements."""
        return 0.0

    def versions(self) -> dict[str, str]:
        rows = json.loads(self._run(self.bench, "-p", "1", "-n", "0", "-r", "1", "-o", "json"))
        return {"llama.cpp": f"build {rows[0]['build_number']} ({rows[0]['build_commit']})"}

    def _prefill(self, case: Case) -> float:
        rows = json.loads(
            self._run(self.bench, "-p", str(case.context), "-n", "0", "-r", "2", "-o", "json", *self._cache_types())
        )
        return float(max(rows[0]["samples_ts"]))

    def _decode(self, case: Case) -> float:
        arguments = ["-npp", str(case.context), "-ntg", str(case.steps), "-npl", str(case.streams), "-pps"]
        room = ["-c", str(case.tokens_held + case.streams * 64)]
        output = self._run(
            self.bench.with_name(BATCHED_BENCH), *arguments, *room, "--output-format", "jsonl", *self._cache_types()
        )
        row = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        return float(row["speed_tg"])

    def _cache_types(self) -> list[str]:
        return ["-ctk", CACHE_TYPES[self.precision], "-ctv", CACHE_TYPES[self.precision], "-fa", "1"]

    def _run(self, tool: Path, *arguments: str) -> str:
        command = [str(tool), "-m", str(self.model), "-t", str(self.threads), *arguments]
        return _run(command)


def _run(command: list[str]) -> str:
    """What it printed."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    except subprocess.CalledProcessError as error:
        raise ChildFailed(f"{command[0]} ended with status {error.returncode}:\n{error.stderr[-1000:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ChildFailed(f"{command[0]}: {error}") from error
