"""Manifest: what made a figure. Command, machine, commit, versions, date; every report begins with it."""

import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.cluster_load import machine

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Manifest:
    """`load` is the machine's load average of the last minute: figures of a busy machine say little."""

    command: str
    machine: str
    date: str
    commit: str
    load: float

    @classmethod
    def take(cls, module: str) -> Self:
        return cls(
            command=shlex.join(["python", "-m", module, *sys.argv[1:]]),
            machine=f"{machine()}, {platform.system()} {platform.release()}",
            date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            commit=_commit(),
            load=round(os.getloadavg()[0], 2),
        )

    def lines(self) -> list[str]:
        return [
            f"`{self.command}`",
            f"{self.machine}; {self.date}; commit {self.commit}; load average {self.load} at the start",
        ]


def keep_cores(threads: int) -> int:
    """Pin this process, and so whatever it starts, to its first `threads` cores (0: to all that it has). Returns how many."""
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise SystemExit(f"--threads {threads}: this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[: threads or len(cores)])
    return threads or len(cores)


def _commit() -> str:
    """Of the checkout; "-dirty" where files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],  # noqa: S607  # whichever git the user has
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"
