"""Paged attention on a GPU beside the limits of the device and beside other kernels, all measured in this run.

    python -m benchmarks.bench_gpu_attention [--only TEXT]

Decode is held against the bandwidth of a copy, prefill against torch's own attention (the faster of cuDNN and flash, on
keys and values that lie in one piece, their heads repeated beforehand), both against FlashInfer on the same pages where it
is installed. Each case runs as a CUDA graph over enough layers that no cache of the device holds them. Prints the best of
several repeats, and the largest difference from the plain torch reference. Without a CUDA device: says so and exits 2.
"""

import argparse
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu_device import best_time_s, measure_copy, the_gpu
from kernels.attention_batch import AttentionBatch
from kernels.paged_attention import paged_attention, paged_attention_reference

CACHE_BYTES = 1 << 29
"""What a case reads at the least, over its layers: ten times what the level 2 cache of an H100 holds."""

WORKSPACE_BYTES = 256 << 20  # FlashInfer's


@dataclass(frozen=True)
class Case:
    """Sequences of (query_len, context_len), and the model that they are of: by default an 8B Llama's layer."""

    name: str
    lengths: list[tuple[int, int]]
    num_kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    block_size: int = 16
    window: int = 0
    cache_dtype: torch.dtype = torch.bfloat16

    @property
    def reads(self) -> bool:
        """Whether the time is that of reading the cache: few queries for each sequence."""
        return max(query for query, _ in self.lengths) <= 8

    @property
    def layer_bytes(self) -> int:
        """Of keys and values that the queries see."""
        tokens = sum(
            min(context, query + self.window - 1) if self.window else context for query, context in self.lengths
        )
        return tokens * 2 * self.num_kv_heads * self.head_dim * self.cache_dtype.itemsize

    @property
    def flops(self) -> int:
        """Of one layer: two products of 2 operations for each visible pair of query head and key."""
        pairs = 0
        for query, context in self.lengths:
            seen = range(context - query + 1, context + 1)
            pairs += sum(min(tokens, self.window) for tokens in seen) if self.window else sum(seen)
        return 4 * pairs * self.num_kv_heads * self.group * self.head_dim


def ragged(num_seqs: int) -> list[tuple[int, int]]:
    """Decode rows with contexts from 128 to 8192 tokens, the same in each run."""
    contexts = torch.randint(128, 8192, (num_seqs,), generator=torch.Generator().manual_seed(0))
    return [(1, int(context)) for context in contexts]


CASES = (
    *(Case(f"decode {n} x {c}", [(1, c)] * n) for n, c in ((1, 512), (8, 512), (8, 4096), (64, 512), (64, 4096))),
    *(Case(f"decode {n} x {c}", [(1, c)] * n) for n, c in ((1, 32768), (1, 131072), (256, 2048))),
    Case("decode 64 ragged, 128 to 8192", ragged(64)),
    Case("decode 63 x 512 and 1 x 131072", [(1, 512)] * 63 + [(1, 131072)]),
    *(Case(f"decode 64 x 4096, block {size}", [(1, 4096)] * 64, block_size=size) for size in (8, 32, 64, 128)),
    *(Case(f"decode 64 x 4096, group {g}", [(1, 4096)] * 64, num_kv_heads=8, group=g) for g in (1, 8)),
    *(Case(f"decode 64 x 4096, head_dim {d}", [(1, 4096)] * 64, head_dim=d) for d in (64, 96, 256)),
    Case("decode 64 x 8192, window 1024", [(1, 8192)] * 64, window=1024),
    Case("decode 64 x 4096, fp8 cache", [(1, 4096)] * 64, cache_dtype=torch.float8_e4m3fn),
    Case("drafts 16 x 5 of 4096", [(5, 4096)] * 16),
    Case("prefill 512", [(512, 512)]),
    Case("prefill 2048", [(2048, 2048)]),
    Case("prefill 4 x 2048", [(2048, 2048)] * 4),
    Case("prefill 16384", [(16384, 16384)]),
    Case("prefill 2048 after 30720", [(2048, 32768)]),
    *(Case(f"prefill 8192, head_dim {d}", [(8192, 8192)], head_dim=d) for d in (64, 128, 256)),
    *(Case(f"prefill 8192, group {g}", [(8192, 8192)], num_kv_heads=32 // g, group=g) for g in (1, 8)),
    Case("prefill 8192, block 128", [(8192, 8192)], block_size=128),
    Case("prefill 8192, window 1024", [(8192, 8192)], window=1024),
    Case("prefill 8192, fp8 cache", [(8192, 8192)], cache_dtype=torch.float8_e4m3fn),
    Case("mixed 32 x 1 of 4096, 2048", [(1, 4096)] * 32 + [(2048, 2048)]),
)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case on the device; the blocks of the sequences lie in no order."""

    case: Case
    query: torch.Tensor  # [num_tokens, num_heads, head_dim], bfloat16
    cache: torch.Tensor  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
    batch: AttentionBatch

    @property
    def scale(self) -> float:
        return float(self.case.head_dim**-0.5)

    @property
    def num_layers(self) -> int:
        return self.cache.shape[1]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    blocks = [-(-context // case.block_size) for _, context in case.lengths]
    num_layers = max(1, min(256, -(-CACHE_BYTES // case.layer_bytes)))
    if not case.reads:
        num_layers = 1  # bound by arithmetic: where it reads from matters little
    shape = (sum(blocks), num_layers, 2, case.num_kv_heads, case.block_size, case.head_dim)
    cache = torch.empty(shape, dtype=case.cache_dtype, device=device)
    for layer in range(num_layers):  # by layer: normal numbers are made in 16 bits, then made 8
        cache[:, layer] = torch.randn(cache[:, layer].shape, dtype=torch.bfloat16, device=device).to(case.cache_dtype)
    ids = torch.randperm(sum(blocks), dtype=torch.int32).split(blocks)  # type: ignore[no-untyped-call]  # torch types it in part
    tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    for row, sequence in zip(tables, ids, strict=True):
        row[: len(sequence)] = sequence
    queries = torch.tensor([0, *(query for query, _ in case.lengths)])
    batch = AttentionBatch(
        query_starts=queries.cumsum(0).to(torch.int32).to(device),
        context_lens=torch.tensor([context for _, context in case.lengths], dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        max_query_len=int(queries.max()),
        max_context_len=max(context for _, context in case.lengths),
    )
    heads = case.num_kv_heads * case.group
    query = torch.randn(int(queries.sum()), heads, case.head_dim, dtype=torch.bfloat16, device=device)
    return Inputs(case, query, cache, batch)


def over_layers(inputs: Inputs) -> float:
    """Seconds a layer of our kernels."""

    def run() -> None:
        for layer in range(inputs.num_layers):
            paged_attention(inputs.query, inputs.cache, layer, inputs.batch, inputs.scale, inputs.case.window)

    return best_time_s(run) / inputs.num_layers


def torch_time_s(inputs: Inputs) -> float | None:
    """The same sequences by torch's attention; None where they differ in shape, have a window, or no backend takes them."""
    case = inputs.case
    if len(set(case.lengths)) > 1 or case.window or case.reads:
        return None
    query_len, context_len = case.lengths[0]
    shape = (len(case.lengths), case.num_kv_heads * case.group)
    query = inputs.query.new_empty(*shape, query_len, case.head_dim).normal_()
    key, value = (inputs.query.new_empty(*shape, context_len, case.head_dim).normal_() for _ in range(2))
    best = None
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def run() -> None:
            if query_len == context_len:
                F.scaled_dot_product_attention(query, key, value, is_causal=True)
            else:
                F.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(query_len, context_len))

        try:
            with sdpa_kernel(backend):
                seconds = best_time_s(run)
        except RuntimeError as error:
            print(f"    {backend.name} does not take it: {str(error).splitlines()[0]}")
            continue
        best = seconds if best is None else min(best, seconds)
    return best


def flashinfer_time_s(inputs: Inputs) -> float | None:
    """Seconds a layer of FlashInfer on the same pages; None where it is not installed or does not take them."""
    case = inputs.case
    if importlib.util.find_spec("flashinfer") is None or case.cache_dtype != torch.bfloat16:
        return None
    import flashinfer  # optional: not a dependency

    device, sizes = inputs.query.device, [-(-context // case.block_size) for _, context in case.lengths]
    starts = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32).to(device)
    rows = zip(inputs.batch.block_tables, sizes, strict=True)
    pages = torch.cat([row[:size] for row, size in rows])
    last = torch.tensor([(context - 1) % case.block_size + 1 for _, context in case.lengths], dtype=torch.int32).to(
        device
    )
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    heads = (case.num_kv_heads * case.group, case.num_kv_heads, case.head_dim, case.block_size)
    layers = [inputs.cache[:, layer].contiguous() for layer in range(inputs.num_layers)]  # pages as it wants them
    options = {"window_left": case.window - 1 if case.window else -1, "q_data_type": torch.bfloat16}
    try:
        if inputs.batch.max_query_len == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=case.group > 1)
            wrapper.plan(starts, pages, last, *heads, **options)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            wrapper.plan(inputs.batch.query_starts, starts, pages, last, *heads, causal=True, **options)
        return best_time_s(lambda: [wrapper.run(inputs.query, layer) for layer in layers]) / len(layers)
    except (RuntimeError, ValueError) as error:
        print(f"    FlashInfer does not take it: {str(error).splitlines()[0]}")
        return None


def report(case: Case, device: torch.device, copy_limit: float) -> None:
    inputs = make_inputs(case, device)
    arguments = (inputs.query, inputs.cache, 0, inputs.batch, inputs.scale, case.window)
    error = (paged_attention(*arguments).float() - paged_attention_reference(*arguments).float()).abs().max().item()
    seconds = over_layers(inputs)
    if case.reads:
        achieved = (
            f"{case.layer_bytes / seconds / 1e9:7.0f} GB/s, {case.layer_bytes / seconds / copy_limit:4.0%} of a copy"
        )
    else:
        achieved = f"{case.flops / seconds / 1e12:7.1f} TFLOP/s"
    peers = {"torch": torch_time_s(inputs), "FlashInfer": flashinfer_time_s(inputs)}
    beside = "".join(f"; {peer / seconds:4.0%} of {name}" for name, peer in peers.items() if peer is not None)
    print(f"{case.name:<32} {seconds * 1e6:9.1f} us  {achieved}{beside}  (error {error:.1e})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args()
    device = the_gpu()
    torch.manual_seed(0)
    with torch.inference_mode():
        copy_limit = measure_copy(device)
        print(
            f"{torch.cuda.get_device_name(device)}; a copy moves {copy_limit / 1e9:.0f} GB/s. Times are of one layer."
        )
        for case in CASES:
            if options.only in case.name:
                report(case, device, copy_limit)


if __name__ == "__main__":
    main()
