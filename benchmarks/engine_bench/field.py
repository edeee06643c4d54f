"""Field: who takes part in a run, started and waiting, and who does not for which reason."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.cluster_load import progress
from benchmarks.engine_bench import llama_cpp
from benchmarks.engine_bench.case import Precision
from benchmarks.engine_bench.child import Child, ChildFailed
from benchmarks.engine_bench.contestant import (
    LLAMA,
    OURS,
    VLLM,
    ChildContestant,
    Contestant,
    start_ours,
    start_vllm,
)
from runtime.models.resolve import DEFAULT_MODEL, default_gguf_path, resolve_model


@dataclass(slots=True)
class Field:
    """`join` whoever is wanted; all of them end with the `with`. One that cannot start is among `skipped`, with the reason."""

    threads: int
    tokens_held: int
    contestants: list[Contestant] = field(default_factory=list)
    ours: dict[Precision, Child] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    _life: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._life.close()

    def join_ours(self, precision: Precision) -> None:
        child = self._join(OURS, precision, lambda: start_ours(precision, self.threads, self.tokens_held))
        if child is not None:
            self.ours[precision] = child

    def join_vllm(self, precision: Precision, python: Path | None) -> None:
        if python is None:
            self.skipped.append(
                f"{VLLM} {precision}: name its interpreter with --vllm-python or $VLLM_PYTHON (see --help)"
            )
        elif precision == "int8":
            self.skipped.append(f"{VLLM} {precision}: it does not quantise these weights so at load")
        else:
            folder = resolve_model(DEFAULT_MODEL).folder
            self._join(VLLM, precision, lambda: start_vllm(python, folder, precision, self.tokens_held))

    def join_llama(self, precision: Precision, bench: Path | None) -> None:
        if bench is None:
            self.skipped.append(
                f"{LLAMA} {precision}: name llama-bench with --llama-bench or $LLAMA_BENCH (see --help)"
            )
            return
        progress(f"converting weights for {LLAMA} {precision}")
        folder = Path(self._life.enter_context(tempfile.TemporaryDirectory(prefix="headrace-bench-")))
        try:
            model = llama_cpp.convert(bench, default_gguf_path(), precision, folder)
        except ChildFailed as failure:
            self.skipped.append(f"{LLAMA} {precision}: {failure}")
        else:
            self.contestants.append(llama_cpp.LlamaCpp(LLAMA, precision, bench, model, self.threads))

    def drop(self, contestant: Contestant, reason: str) -> None:
        """It has failed; the others go on without it."""
        progress(f"{contestant.name} {contestant.precision} failed")
        self.contestants.remove(contestant)
        self.skipped.append(f"{contestant.name} {contestant.precision}: {reason}")

    def _join(self, name: str, precision: Precision, start: Callable[[], Child]) -> Child | None:
        progress(f"starting {name} {precision}")
        try:
            child = self._life.enter_context(start())
            child.wait_ready()
        except ChildFailed as failure:
            self.skipped.append(f"{name} {precision}: {failure}")
            return None
        self.contestants.append(ChildContestant(name, precision, child))
        return child
