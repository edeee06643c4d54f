"""Which cores each process gets. Nodes that share cores rob each other, so each gets its own where there are enough."""

import argparse
import os
from collections.abc import Collection, Sequence

from protocol.errors import ConfigError

MAX_CPUS = 4096
"""Cores have numbers below this; so a list that is mistyped does not become a set of billions."""


def divide_cores(cores: Sequence[int], num_nodes: int, threads: int = 0) -> list[tuple[int, ...]]:
    """Cut `cores` into one run for each node, the first ones longer by one where it does not come out even.

    `threads` bounds a run's length. With fewer cores than nodes, or than nodes times `threads`, nodes share: each gets
    all of them, which means no pinning.
    """
    if num_nodes == 0:
        return []
    if len(cores) < num_nodes * max(1, threads):
        return [tuple(cores)] * num_nodes
    share, longer = divmod(len(cores), num_nodes)
    runs, start = [], 0
    for node in range(num_nodes):
        length = share + (1 if node < longer else 0)
        runs.append(tuple(cores[start : start + (min(length, threads) if threads else length)]))
        start += length
    return runs


def available_cores() -> list[int]:
    """Those that this process may use, as a container or a service manager has left them."""
    return sorted(os.sched_getaffinity(0))


def stay_on(cpus: Collection[int]) -> None:
    """Confine this process, and what it starts from now on, to these cores. Raises ConfigError for one that it may not
    use."""
    available = available_cores()
    if missing := sorted(set(cpus) - set(available)):
        raise ConfigError(
            f"--cpu-affinity asks for cores {format_cpus(missing)}; this process may use {format_cpus(available)}",
            param="--cpu-affinity",
        )
    os.sched_setaffinity(0, cpus)


def parse_cpus(text: str) -> tuple[int, ...]:
    """ "0-3,8" as (0, 1, 2, 3, 8), for argparse."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            run = range(int(first), int(last if dash else first) + 1)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f'{text!r} is not a list of cores such as "0-3,8"') from error
        if run.start >= run.stop:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} ends before it begins")
        if run.stop > MAX_CPUS:
            raise argparse.ArgumentTypeError(f"{part.strip()!r}: cores have numbers below {MAX_CPUS}")
        cpus.update(run)
    return tuple(sorted(cpus))


def format_cpus(cpus: Sequence[int]) -> str:
    """The inverse of parse_cpus, runs joined."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][-1] + 1 == cpu:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
