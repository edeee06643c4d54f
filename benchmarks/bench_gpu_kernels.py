"""Block copies, checksums and sampling on a GPU beside the bandwidth of a copy and beside torch, all measured in this run.

    python -m benchmarks.bench_gpu_kernels [--only TEXT]

Bandwidth counts the bytes that a case must move at the least: read and written for copies, read for checksums and for sampling
(each row's logits, once). A copy of 1 GiB, read and written, is the limit. Each case runs as a CUDA graph;
prints the best of several replays. Beside it stands what torch takes for the same: index_select and index_copy_, and for
sampling the torch reference, which sorts every row. Without a CUDA device: says so and exits 2.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_device import best_time_s, measure_copy, the_gpu
from kernels.block_checksum import block_checksums
from kernels.block_copy import gather_blocks, gather_blocks_reference, scatter_blocks, scatter_blocks_reference
from kernels.sampling import sample_rows, sample_rows_reference
from kernels.sampling_tensors import SamplingTensors
from protocol.sampling import SamplingParams

CACHE_BYTES = 4 << 30
STAGED_BYTES = 512 << 20
BLOCK_BYTES = (64 << 10, 512 << 10, 2 << 20)
"""One layer of 16 tokens of an 8B Llama, a whole block of a small model, and one of that Llama."""

VOCAB_SIZES = (49_152, 128_256)
MAX_TOP = 20
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-p": {"top_p": 0.95, "temperature": 0.7},
    "top-k, top-p": {"top_k": 50, "top_p": 0.95, "temperature": 0.7},
    "flat top-p": {"top_p": 0.99, "temperature": 2.0},
    "penalties": {"temperature": 0.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    "20 logprobs": {"temperature": 0.0, "logprobs": 20},
}


@dataclass(frozen=True)
class Case:
    name: str
    num_bytes: int
    kernels: tuple[str, ...]  # by the names that they ask kernels.gpu.tuning with
    run: Callable[[], object]
    peer: Callable[[], object] | None = None


def block_cases(device: torch.device) -> Iterator[Case]:
    """Random bytes that lie in no order."""
    memory = torch.randint(0, 256, (CACHE_BYTES,), dtype=torch.uint8, device=device)
    for block_bytes in BLOCK_BYTES:
        cache, count = memory.view(-1, block_bytes), STAGED_BYTES // block_bytes
        ids = torch.randperm(len(cache), device=device)[:count].to(torch.int32)
        staging, moved = torch.empty(count, block_bytes, dtype=torch.uint8, device=device), 2 * count * block_bytes
        size, copies = f"{count} blocks of {block_bytes >> 10} KiB", ("block_copy",)

        def gather(cache: torch.Tensor = cache, ids: torch.Tensor = ids, staging: torch.Tensor = staging) -> None:
            gather_blocks(cache, ids, staging)

        def torch_gather(cache: torch.Tensor = cache, ids: torch.Tensor = ids, staging: torch.Tensor = staging) -> None:
            gather_blocks_reference(cache, ids, staging)

        def scatter(cache: torch.Tensor = cache, ids: torch.Tensor = ids, staging: torch.Tensor = staging) -> None:
            scatter_blocks(staging, cache, ids)

        def torch_scatter(
            cache: torch.Tensor = cache, ids: torch.Tensor = ids, staging: torch.Tensor = staging
        ) -> None:
            scatter_blocks_reference(staging, cache, ids)

        def checksum(cache: torch.Tensor = cache, ids: torch.Tensor = ids) -> None:
            block_checksums(cache, ids)

        yield Case(f"gather {size}", moved, copies, gather, torch_gather)
        yield Case(f"scatter {size}", moved, copies, scatter, torch_scatter)
        yield Case(f"checksum {size}", moved // 2, ("xxh3_sums", "xxh3_fold"), checksum)


def sampling_cases(device: torch.device) -> Iterator[Case]:
    """Logits spread as a model's are: most far below the best few."""
    for vocab_size in VOCAB_SIZES:
        for num_rows in (1, 64, 256):
            logits = torch.randn(num_rows, vocab_size, device=device) * 3
            rows, positions = torch.arange(num_rows, device=device), torch.full((num_rows,), 100, device=device)
            for name, settings in SAMPLINGS.items():
                samplings = [SamplingParams(max_tokens=1, seed=row, **settings) for row in range(num_rows)]
                params = SamplingTensors.allocate(num_rows, vocab_size, device)
                params.assign(rows, SamplingTensors.of(samplings).map(lambda tensor: tensor.to(device)))
                arguments = (logits, params, rows, positions, MAX_TOP)

                def run(
                    arguments: tuple[torch.Tensor, SamplingTensors, torch.Tensor, torch.Tensor, int] = arguments,
                ) -> None:
                    sample_rows(*arguments)

                def peer(
                    arguments: tuple[torch.Tensor, SamplingTensors, torch.Tensor, torch.Tensor, int] = arguments,
                ) -> None:
                    sample_rows_reference(*arguments)

                tuned = ("sampling_draw", *(("sampling_logprobs",) if "logprobs" in settings else ()))
                yield Case(f"sample {num_rows} x {vocab_size}, {name}", logits.nbytes, tuned, run, peer)


def report(case: Case, copy_limit: float) -> None:
    seconds = best_time_s(case.run)
    beside = f"; {best_time_s(case.peer) / seconds:5.1f} times as fast as torch" if case.peer is not None else ""
    rate = case.num_bytes / seconds
    print(
        f"{case.name:<40} {seconds * 1e6:9.1f} us  {rate / 1e9:7.0f} GB/s, {rate / copy_limit:4.0%} of a copy{beside}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args()
    device = the_gpu()
    torch.manual_seed(0)
    with torch.inference_mode():
        copy_limit = measure_copy(device)
        print(f"{torch.cuda.get_device_name(device)}; a copy moves {copy_limit / 1e9:.0f} GB/s.")
        for make_cases in (block_cases, sampling_cases):
            for case in make_cases(device):
                if options.only in case.name:
                    report(case, copy_limit)


if __name__ == "__main__":
    main()
