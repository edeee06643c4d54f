"""What this machine could do at best, for telling whether a transport that is not used would have been worth it."""

import functools
import time
from pathlib import Path

import numpy as np

from kv_transfer.memory.device_arena import Arena
from protocol.transfer import TransportKind

COPY_BYTES = 4 << 20
_COPIES = 3
_RDMA_DEVICES = Path("/sys/class/infiniband")
_BITS = 8


def transport_limits(arena: Arena) -> dict[TransportKind, float]:
    """Bytes per second by kind, where there is a limit to name: one memory copy for shm, and the fastest RDMA port for
    NIXL. What UCX does over an ordinary network is not known before it is measured."""
    limits: dict[TransportKind, float] = {}
    if arena.memory_kind == "host":
        limits["shm"] = memory_copy_rate()
    port = rdma_rate()
    if port > 0:
        limits["nixl"] = port
    return limits


@functools.cache
def memory_copy_rate() -> float:
    """Bytes per second of one copy by one core, through memory that both ends have touched. Takes some milliseconds."""
    source = np.ones(COPY_BYTES, dtype=np.uint8)
    target = np.ones(COPY_BYTES, dtype=np.uint8)
    best = float("inf")
    for _ in range(_COPIES):
        started = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - started)
    return COPY_BYTES / best


def rdma_rate(devices: Path = _RDMA_DEVICES) -> float:
    """Bytes per second of this machine's fastest RDMA port as its driver states it ("100 Gb/sec (4X EDR)"); 0 without."""
    best = 0.0
    for path in sorted(devices.glob("*/ports/*/rate")):
        try:
            number, unit = path.read_text(encoding="utf-8").split()[:2]
            gigabits = float(number)
        except (OSError, ValueError):
            continue
        if unit == "Gb/sec":
            best = max(best, gigabits * 1e9 / _BITS)
    return best
