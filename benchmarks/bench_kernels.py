"""Speed of the CPU kernels beside the limits of the machine, both measured in this run.

    python -m benchmarks.bench_kernels [--threads N] [--dtype bfloat16|float32]

Sizes are those of a 135 M parameter Llama (hidden 576, 9 heads, 3 KV heads of 64), 30 layers of weights and cache, so
that decode reads from memory and not from a cache. The small operations run on what the caches
hold, and may exceed the limit of memory. Prints the best of several runs; takes about ten seconds.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from kernels import native_library
from kernels.attention_batch import AttentionBatch
from kernels.kv_cache import PageFormat
from kernels.linear import PackedLinear
from kernels.paged_attention import paged_attention
from kernels.rms_norm import fused_add_rms_norm
from kernels.rotary import rope_and_write_kv
from kernels.silu_mul import silu_and_mul

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 30, 576, 1536, 9, 3, 64, 64
QKV_SIZE = (HEADS + 2 * KV_HEADS) * HEAD_DIM
SHAPES = (
    (QKV_SIZE, HIDDEN),
    (HIDDEN, HIDDEN),
    (2 * INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
)  # one layer's [out, in]
REPEATS, MIN_TIME_S = 4, 0.05


def best_time_s(run: Callable[[], object]) -> float:
    """Seconds of the fastest of several repeats, each long enough to be read from a clock."""
    run()
    best = float("inf")
    for _ in range(REPEATS):
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < MIN_TIME_S:
            run()
            calls += 1
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def measure_limits(dtype: torch.dtype) -> tuple[float, float]:
    """(GB/s of reading memory, GFLOP/s of torch's matrix product)."""
    large, square = torch.ones(64 << 20), torch.randn(1024, 1024).to(dtype)
    read = large.numel() * large.element_size() / best_time_s(large.sum) / 1e9
    return read, 2 * 1024**3 / best_time_s(lambda: square @ square) / 1e9


def report(name: str, seconds: float, achieved: float, limit: float, unit: str) -> None:
    print(f"{name:<42} {seconds * 1e3:9.3f} ms  {achieved:7.1f} of {limit:6.1f} {unit}  ({achieved / limit:4.0%})")


def bench_linear(dtype: torch.dtype, read_limit: float, product_limit: float) -> None:
    layers = [PackedLinear((torch.randn(shape) / 24).to(dtype)) for _ in range(LAYERS) for shape in SHAPES]
    weights = LAYERS * sum(rows * columns for rows, columns in SHAPES)
    for num_tokens in (1, 8, 32, 512):
        inputs = {size: torch.randn(num_tokens, size).to(dtype) for size in (HIDDEN, INTERMEDIATE)}

        def run(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for layer in layers:
                layer(inputs[layer.in_features])

        seconds = best_time_s(run)
        name = f"linear, {LAYERS} layers, {num_tokens} tokens"
        if num_tokens <= 8:
            report(name, seconds, weights * dtype.itemsize / seconds / 1e9, read_limit, "GB/s")
        else:
            report(name, seconds, 2 * num_tokens * weights / seconds / 1e9, product_limit, "GFLOP/s")


def make_batch(num_seqs: int, query_len: int, context_len: int) -> AttentionBatch:
    blocks = -(-context_len // BLOCK_SIZE)
    return AttentionBatch(
        query_starts=torch.arange(num_seqs + 1, dtype=torch.int32) * query_len,
        context_lens=torch.full((num_seqs,), context_len, dtype=torch.int32),
        block_tables=torch.randperm(num_seqs * blocks).to(torch.int32).view(num_seqs, blocks),
        max_query_len=query_len,
        max_context_len=context_len,
    )


def bench_attention(dtype: torch.dtype, read_limit: float, product_limit: float) -> None:
    page_formats: tuple[PageFormat, ...] = ("plain", "bf16-tiled") if dtype == torch.bfloat16 else ("plain",)
    for page_format in page_formats:
        bench_attention_over(page_format, dtype, read_limit, product_limit)


def bench_attention_over(page_format: PageFormat, dtype: torch.dtype, read_limit: float, product_limit: float) -> None:
    """Random elements are as good in any order, so the cache is not rearranged."""
    cache = torch.randn(32 * 512 // BLOCK_SIZE, LAYERS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM).to(dtype)
    for num_seqs, context_len in ((1, 512), (1, 2048), (8, 512), (32, 512)):
        batch, query = make_batch(num_seqs, 1, context_len), torch.randn(num_seqs, HEADS, HEAD_DIM).to(dtype)

        def decode(batch: AttentionBatch = batch, query: torch.Tensor = query) -> None:
            for layer in range(LAYERS):
                paged_attention(query, cache, layer, batch, 0.125, page_format=page_format)

        seconds = best_time_s(decode)
        num_bytes = num_seqs * context_len * 2 * KV_HEADS * HEAD_DIM * LAYERS * dtype.itemsize
        name = f"decode, {LAYERS} layers, {num_seqs} x {context_len}, {page_format}"
        report(name, seconds, num_bytes / seconds / 1e9, read_limit, "GB/s")
    for query_len, context_len in ((512, 512), (2048, 2048), (512, 2048)):
        batch, query = make_batch(1, query_len, context_len), torch.randn(query_len, HEADS, HEAD_DIM).to(dtype)
        seconds = best_time_s(partial(paged_attention, query, cache, 0, batch, 0.125, page_format=page_format))
        scores = query_len * (context_len - query_len) + query_len * (query_len + 1) // 2
        flops = 4 * scores * HEADS * HEAD_DIM
        name = f"prefill, 1 layer, {query_len} of {context_len}, {page_format}"
        report(name, seconds, flops / seconds / 1e9, product_limit, "GFLOP/s")


def bench_small_operations(dtype: torch.dtype, read_limit: float) -> None:
    tokens = 2048
    x, residual = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(tokens, HIDDEN).to(dtype)
    weight, gate_up = torch.randn(HIDDEN).to(dtype), torch.randn(tokens, 2 * INTERMEDIATE).to(dtype)
    seconds = best_time_s(lambda: fused_add_rms_norm(x, residual, weight, 1e-5))
    report(f"add and RMSNorm, {tokens} tokens", seconds, 4 * x.nbytes / seconds / 1e9, read_limit, "GB/s")
    seconds = best_time_s(lambda: silu_and_mul(gate_up))
    report(f"silu and mul, {tokens} tokens", seconds, 1.5 * gate_up.nbytes / seconds / 1e9, read_limit, "GB/s")
    qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)
    query, key, value = torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    cache = torch.zeros(tokens // BLOCK_SIZE, 1, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=dtype)
    cos, slots = torch.rand(tokens, HEAD_DIM // 2), torch.arange(tokens)
    seconds = best_time_s(lambda: rope_and_write_kv(query, key, value, cos, cos, cache, 0, slots))
    report(f"RoPE and cache write, {tokens} tokens", seconds, 2 * qkv.nbytes / seconds / 1e9, read_limit, "GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    print(f"{native_library.status()}\n{options.threads} threads, {options.dtype}; limits measured in this run")
    with torch.inference_mode():
        read_limit, product_limit = measure_limits(dtype)
        bench_linear(dtype, read_limit, product_limit)
        bench_attention(dtype, read_limit, product_limit)
        bench_small_operations(dtype, read_limit)


if __name__ == "__main__":
    main()
