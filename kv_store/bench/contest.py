"""Contest: several ways of moving the same bytes, each once a round, so that what else the machine does hits all alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MEMCPY = "memcpy"


@dataclass(frozen=True, slots=True)
class Move:
    """One way. `run` is timed and told the round, counted from 0; `prepare`, before it, is not timed. `reference`: the name of
    what it would be at best, beside memcpy."""

    name: str
    run: Callable[[int], None]
    prepare: Callable[[int], None] = lambda _round: None
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class MoveResult:
    """Bytes a second, of the fastest round and of the median one. Ratios are those of the fastest rounds."""

    name: str
    best_rate: float
    median_rate: float
    memcpy_ratio: float
    reference: str | None
    reference_ratio: float | None


def contest(moves: Sequence[Move], num_bytes: int, num_rounds: int) -> tuple[MoveResult, ...]:
    """Each of the moves, one of which is MEMCPY, moves `num_bytes` in each of `num_rounds` rounds."""
    seconds: dict[str, list[float]] = {move.name: [] for move in moves}
    for round_number in range(num_rounds):
        for move in moves:
            move.prepare(round_number)
            begin = time.perf_counter()
            move.run(round_number)
            seconds[move.name].append(time.perf_counter() - begin)
    best = {name: min(durations) for name, durations in seconds.items()}
    return tuple(
        MoveResult(
            name=move.name,
            best_rate=num_bytes / best[move.name],
            median_rate=num_bytes / sorted(seconds[move.name])[num_rounds // 2],
            memcpy_ratio=best[MEMCPY] / best[move.name],
            reference=move.reference,
            reference_ratio=best[move.reference] / best[move.name] if move.reference is not None else None,
        )
        for move in moves
    )


def table(results: Sequence[MoveResult]) -> str:
    """In Markdown, for people."""
    lines = [
        "| move | best GB/s | median GB/s | of memcpy | of what the machine does without us |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        beside = f"{result.reference_ratio:.2f} of {result.reference}" if result.reference_ratio is not None else ""
        lines.append(
            f"| {result.name} | {result.best_rate / 1e9:.2f} | {result.median_rate / 1e9:.2f} "
            f"| {result.memcpy_ratio:.2f} | {beside} |"
        )
    return "\n".join(lines)
