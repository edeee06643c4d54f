"""How much memory there is to be had."""

import mmap
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)
"""Of a container, seen from inside: version 2 and version 1."""


def available_memory_bytes() -> int:
    """What this process may still allocate: of the machine, and of its control group where that has a limit."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        available = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    for limit_path, used_path in _CGROUP_FILES:
        if limit_path.exists() and used_path.exists():
            limit = limit_path.read_text().strip()
            if limit.isdigit():
                available = min(available, max(0, int(limit) - int(used_path.read_text())))
    return available
