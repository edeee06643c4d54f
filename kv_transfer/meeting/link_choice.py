"""Which of the ways between two nodes to take, from what was measured. Pure.

Trial: one way that was tried. Obstacle: a transport that both nodes were told to run and that does not join them.

The way with the smallest estimated time for a reference transfer wins, with three exceptions. Pull is kept unless push on
the same transport is PUSH_GAIN times as fast: a reader that pulls is alone responsible for its memory. Of two that are
within TIE of one another the preferred one wins. Where the KV is in the memory of a GPU, transports that reach it there
come first. What could be connected but not measured comes after everything that was measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from protocol.transfer import Direction, ProbeResult, TransportKind

PUSH_GAIN = 1.5
TIE = 1.1
WARN_RATIO = 3.0
_GIGABYTE = 1e9


@dataclass(frozen=True, slots=True)
class Trial:
    """`measured` None: it is connected, but could not be measured, and `problem` says why."""

    kind: TransportKind
    direction: Direction
    measured: ProbeResult | None
    problem: str = ""
    device_memory: bool = False

    def seconds(self, num_bytes: int) -> float:
        return self.measured.seconds(num_bytes) if self.measured is not None else float("inf")


@dataclass(frozen=True, slots=True)
class Obstacle:
    """`problem` says what is in the way and how to mend it."""

    kind: TransportKind
    problem: str


@dataclass(frozen=True, slots=True)
class Choice:
    """`why` is one sentence with the numbers; `warning` is set where something much faster is within reach."""

    taken: Trial
    why: str
    warning: str | None


def choose(
    trials: Sequence[Trial],
    obstacles: Sequence[Obstacle],
    *,
    order: Sequence[TransportKind],
    reference_bytes: int,
    limits: Mapping[TransportKind, float],
    on_device: bool = False,
    given: str = "",
) -> Choice:
    """`trials` is not empty, `order` has all their kinds, the preferred first. `limits`: bytes per second that a kind would
    reach between the two, where that is known. `given` names the setting that left no choice.

    A transport that cannot be used has no measured speed to warn with. So it is compared with what limits it: one memory
    copy for shm, the network adapter's rate for NIXL over RDMA. The caller leaves out kinds for which nothing is
    known, or which nothing could make work (shm between two hosts): a warning without a cure would only be noise.
    """
    rivals = _one_per_kind(trials, reference_bytes)
    if on_device and any(trial.device_memory for trial in rivals):
        rivals = [trial for trial in rivals if trial.device_memory]
    best = min(trial.seconds(reference_bytes) for trial in rivals)
    close = [trial for trial in rivals if trial.seconds(reference_bytes) <= TIE * best]
    taken = min(close, key=lambda trial: order.index(trial.kind))
    why = f"{taken.kind}, {taken.direction}: {_speed(taken)}{f' ({given})' if given else ''}"
    others = _others(trials, taken)
    return Choice(
        taken, f"{why}; {others}" if others else why, _warning(taken, trials, obstacles, limits, reference_bytes)
    )


def _one_per_kind(trials: Sequence[Trial], reference_bytes: int) -> list[Trial]:
    """Of pull and push of one kind, the one to take."""
    kept: dict[TransportKind, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.direction):  # pull before push
        before = kept.get(trial.kind)
        gains = before is not None and PUSH_GAIN * trial.seconds(reference_bytes) <= before.seconds(reference_bytes)
        if before is None or (gains and trial.measured is not None):
            kept[trial.kind] = trial
    return list(kept.values())


def _others(trials: Sequence[Trial], taken: Trial) -> str:
    """What was tried besides: "nixl pull 5.9 GB/s, push 6.4 GB/s; tcp pull 3.1 GB/s"."""
    by_kind: dict[TransportKind, list[str]] = {}
    for trial in trials:
        if trial is not taken:
            by_kind.setdefault(trial.kind, []).append(f"{trial.direction} {_speed(trial)}")
    return "; ".join(f"{kind} {', '.join(speeds)}" for kind, speeds in by_kind.items())


def _speed(trial: Trial) -> str:
    if trial.measured is None:
        return f"not measured ({trial.problem})"
    return f"{trial.measured.bytes_per_s / _GIGABYTE:.2g} GB/s"


def _warning(
    taken: Trial,
    trials: Sequence[Trial],
    obstacles: Sequence[Obstacle],
    limits: Mapping[TransportKind, float],
    reference_bytes: int,
) -> str | None:
    if taken.measured is None:
        return None
    unused = [*obstacles, *_unmeasured(trials)]
    slower_by = {
        obstacle: taken.seconds(reference_bytes) * limits[obstacle.kind] / reference_bytes
        for obstacle in unused
        if obstacle.kind in limits
    }
    worth_saying = [obstacle for obstacle, ratio in slower_by.items() if ratio >= WARN_RATIO]
    if not worth_saying:
        return None
    worst = max(worth_saying, key=slower_by.__getitem__)
    return (
        f"{taken.kind} moves KV {slower_by[worst]:.0f} times slower than {worst.kind} could "
        f"({limits[worst.kind] / _GIGABYTE:.2g} GB/s): {worst.problem}"
    )


def _unmeasured(trials: Sequence[Trial]) -> Iterable[Obstacle]:
    """Kinds of which nothing could be measured."""
    measured = {trial.kind for trial in trials if trial.measured is not None}
    return (Obstacle(trial.kind, trial.problem) for trial in trials if trial.kind not in measured)
