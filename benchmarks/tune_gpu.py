"""Measures launch configurations of the GPU kernels on the device at hand, and keeps the best for this user.

    python -m benchmarks.tune_gpu [--only TEXT] [--table]

Each class of shapes (kernels.gpu.tuning) is measured on the first benchmark case that comes to it: the kernel's default and
what is around it, warps, stages and each size halved and doubled, up to 81 configurations, each compiled first. One that
does not fit the device is passed over, and so is one that is less than 2 % faster than the default. Winners go to the
user's file, where launchers find them from the next process on; `--table` also prints them, as entries of
kernels/gpu/tuning_table.json. Takes minutes. Without a CUDA device: says so and exits 2.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import triton

from benchmarks import bench_gpu_attention, bench_gpu_kernels
from benchmarks.gpu_device import best_time_s, the_gpu
from kernels.gpu.tuning import LaunchConfig, device_name, forced, write_user_file
from kernels.paged_attention import paged_attention

WORTHWHILE = 0.98
ROUNDS = 3


def cases(device: torch.device) -> Iterator[tuple[str, tuple[str, ...], Callable[[], object]]]:
    """(name, the kernels that it launches, what launches them)."""
    for case in bench_gpu_attention.CASES:
        inputs = bench_gpu_attention.make_inputs(case, device)
        kernels = ("paged_decode",) if case.reads else ("paged_prefill",)
        yield case.name, kernels, partial(attend, inputs)
    for make_cases in (bench_gpu_kernels.block_cases, bench_gpu_kernels.sampling_cases):
        for each in make_cases(device):
            yield each.name, each.kernels, each.run


def attend(inputs: bench_gpu_attention.Inputs) -> None:
    """Over all layers of the cache, so that they are read from memory."""
    for layer in range(inputs.num_layers):
        paged_attention(inputs.query, inputs.cache, layer, inputs.batch, inputs.scale, inputs.case.window)


def neighbours(default: LaunchConfig) -> Iterator[LaunchConfig]:
    """The default first, then all that differ from it by a factor of two here and there, and can be launched."""
    yield default
    stages = range(max(1, default.num_stages - 1), default.num_stages + 2) if default.num_stages > 1 else (1,)
    sizes = [[(name, size // 2), (name, size), (name, size * 2)] for name, size in default.sizes.items()]
    warps = (default.num_warps // 2, default.num_warps, default.num_warps * 2)
    for num_warps, num_stages, chosen in product(warps, stages, product(*sizes)):
        config = LaunchConfig(num_warps, num_stages, dict(chosen))
        if config != default and 1 <= num_warps <= 32 and all(size for _, size in chosen):
            yield config


def time_s(kernel: str, config: LaunchConfig, run: Callable[[], object]) -> float:
    """Infinite where the configuration does not fit the device or the kernel."""
    try:
        with forced(kernel, config):
            return best_time_s(run)
    except (triton.TritonError, RuntimeError, ValueError) as error:
        print(f"    {config} does not run: {str(error).splitlines()[0]}")
        return float("inf")


def best_config(kernel: str, default: LaunchConfig, run: Callable[[], object]) -> LaunchConfig:
    """The fastest of all in one round, and then of that and the default in turns."""
    times = {index: time_s(kernel, config, run) for index, config in enumerate(neighbours(default))}
    fastest = list(neighbours(default))[min(times, key=lambda index: times[index])]
    rounds = [(time_s(kernel, default, run), time_s(kernel, fastest, run)) for _ in range(ROUNDS)]
    before, after = (min(each) for each in zip(*rounds, strict=True))
    print(f"    {before * 1e6:.1f} us with {default}, {after * 1e6:.1f} us with {fastest}")
    return fastest if after < before * WORTHWHILE else default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the cases whose name contains this")
    parser.add_argument("--table", action="store_true", help="print what was found as entries of the shipped table")
    options = parser.parse_args()
    device = the_gpu()
    torch.manual_seed(0)
    found: dict[str, LaunchConfig] = {}
    with torch.inference_mode():
        for name, kernels, run in cases(device):
            for kernel in kernels if options.only in name else ():
                with forced(kernel, None) as trial:
                    run()
                for shape_class, default in trial.asked.items():
                    if shape_class not in found:
                        print(f"{shape_class}, by {name}", flush=True)
                        found[shape_class] = best_config(kernel, default, run)
    print(f"written to {write_user_file(device_name(device), found)}")
    if options.table:
        print(json.dumps({device_name(device): {key: found[key].to_json() for key in sorted(found)}}, indent=1))


if __name__ == "__main__":
    main()
