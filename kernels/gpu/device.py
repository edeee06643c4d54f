"""What launchers ask of the device and of numbers; nothing here waits for the device."""

import functools

import torch

LOG2_E = 1.4426950408889634
"""exp(x) is exp2(x * LOG2_E); the hardware has only the latter."""


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 1 for the interpreter, which runs one program after another."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below number, which is at least 1."""
    return 1 << (number - 1).bit_length()
