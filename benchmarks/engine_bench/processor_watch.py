"""ProcessorWatch: who used the processor during a measurement, so that a disturbed one can be told from a slow one."""

import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # of /proc/stat: user, nice, system, irq, softirq, steal

QUIET_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class TakenShare:
    """Shares of one core, more than 1 where it was several: of contestants that wait, and of processes not of this run."""

    waiting: float
    foreign: float


class ProcessorWatch:
    """A `with` around one measurement. `measured_s` and `waiting_s` tell processor time used so far by the one that is
    measured and by those that wait; children of this process that ended meanwhile count as measured."""

    def __init__(self, measured_s: Callable[[], float], waiting_s: Sequence[Callable[[], float]]) -> None:
        self._measured_s = measured_s
        self._waiting_s = waiting_s
        self.taken = TakenShare(0.0, 0.0)

    def __enter__(self) -> Self:
        self._before = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        elapsed, waiting, own, busy = (after - before for after, before in zip(self._now(), self._before, strict=True))
        self.taken = TakenShare(waiting / elapsed, max(0.0, busy - own - waiting) / elapsed)

    def _now(self) -> tuple[float, float, float, float]:
        """Seconds: of the clock, of those that wait, of this run but for them, of the whole machine."""
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(each.ru_utime + each.ru_stime for each in usage) + self._measured_s()
        return time.perf_counter(), sum(read() for read in self._waiting_s), own, _busy_s()


def disturbance(foreign_share: float) -> str:
    """What a report says of it."""
    verdict = "" if foreign_share < QUIET_SHARE else ": the machine was busy, and these figures say little"
    return f"other processes took at most {foreign_share:.1%} of a core during a measurement{verdict}"


def _busy_s() -> float:
    ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(ticks[index]) for index in _BUSY_FIELDS) / _TICKS_PER_S
