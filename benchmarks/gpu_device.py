"""The GPU that the benchmarks of this folder measure: whether there is one, its clock, and what a copy on it moves."""

import sys
from collections.abc import Callable

import torch

REPEATS = 10
COPY_BYTES = 1 << 30


def the_gpu() -> torch.device:
    """The current CUDA device. Without one: says so and exits 2."""
    if not torch.cuda.is_available():
        print("This program needs a CUDA device, and torch finds none.", file=sys.stderr)
        sys.exit(2)
    return torch.device("cuda", torch.cuda.current_device())


def best_time_s(run: Callable[[], object]) -> float:
    """Seconds of the fastest replay of what `run` launches, by the device's own clock."""
    run()  # compiles, and sets up what a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    best = float("inf")
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch types its events in part
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def measure_copy(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_time_s(lambda: target.copy_(source))
