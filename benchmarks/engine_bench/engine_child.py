"""Our engine as a contestant: `python -m benchmarks.engine_bench.engine_child '{"settings": {...}, "tokens_held": N}'`."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.bench_kernels import measure_limits
from benchmarks.engine_bench.burst_load import run_burst_load
from benchmarks.engine_bench.child_loop import Operation, serve
from benchmarks.engine_bench.measured_engine import MeasuredEngine
from kernels import native_library


def build() -> Mapping[str, Operation]:
    given = json.loads(sys.argv[1])
    engine = MeasuredEngine(given["settings"], given["tokens_held"])
    return {
        "prefill": engine.prefill,
        "decode": engine.decode,
        "generate": engine.generate,
        "step_phases": engine.step_phases,
        "burst_load": partial(run_burst_load, engine),
        "load": lambda: asdict(engine.load()),
        "limits": lambda dtype: measure_limits(getattr(torch, dtype)),
        "versions": versions,
    }


def versions() -> dict[str, str]:
    kernels = native_library.status()
    return {"torch": torch.__version__, "our kernels": kernels.instruction_set or kernels.reason}


if __name__ == "__main__":
    serve(build)
