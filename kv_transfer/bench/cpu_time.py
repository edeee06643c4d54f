"""CPU time of other processes."""

import time


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process of this user, to the nanosecond: its CPU clock, named as by clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)
