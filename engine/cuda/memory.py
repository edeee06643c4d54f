"""How many KV blocks fit on a device: what a step needs is measured, the rest is arithmetic.

utilization x total          what this process, and whoever else is there, may use of the device
- other processes, driver    what was in use that torch did not allocate
- peak                       weights, and what the largest step had allocated on top of them
- graphs                     what captured steps keep
= KV blocks
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from protocol.errors import ConfigError

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one device, taken at the peak of the largest step. `foreign`: in use, but not by torch in this process."""

    total: int
    foreign: int
    weights: int
    step: int
    graphs: int


def num_blocks_that_fit(memory: DeviceMemory, utilization: float, block_bytes: int) -> int:
    """Raises ConfigError, with all the numbers, where not one does."""
    budget = int(memory.total * utilization)
    room = budget - memory.foreign - memory.weights - memory.step - memory.graphs
    if room < block_bytes:
        parts = {
            "weights": memory.weights,
            "the largest step": memory.step,
            "captured steps": memory.graphs,
            "other uses of the device": memory.foreign,
        }
        needs = ", ".join(f"{name} {size // _MIB} MiB" for name, size in parts.items())
        raise ConfigError(
            f"no KV block of {block_bytes} bytes fits: {utilization:g} of {memory.total // _MIB} MiB is"
            f" {budget // _MIB} MiB, and {needs} leave {room // _MIB} MiB; raise cache.gpu_memory_utilization,"
            " or lower scheduler.max_num_batched_tokens or scheduler.max_num_seqs",
            param="cache.gpu_memory_utilization",
        )
    return room // block_bytes


def measure(device: torch.device, largest_step: Callable[[], int], capture_step: Callable[[], None]) -> DeviceMemory:
    """Of a CUDA device on which nothing but the weights has been allocated.

    `largest_step` runs what needs most, and returns the bytes it held that will not be there when serving (a small KV cache
    of its own). `capture_step` captures the largest decode step; the others share its memory. Both leave nothing running.
    """
    torch.cuda.synchronize(device)
    weights = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    borrowed = largest_step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()  # as a capture does first; what it then takes is seen
    free_before, total = torch.cuda.mem_get_info(device)
    foreign = total - free_before - torch.cuda.memory_reserved(device)
    capture_step()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free_after, _ = torch.cuda.mem_get_info(device)
    return DeviceMemory(
        total=total,
        foreign=foreign,
        weights=weights,
        step=max(0, peak - weights - borrowed),
        graphs=max(0, free_before - free_after),
    )
