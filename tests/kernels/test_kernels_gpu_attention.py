"""Paged attention in Triton: against the oracle of test_kernels_attention, and compiled for a GPU that is not there.

In the interpreter bf16 is left out: it multiplies matrices of it wrongly.
"""

from dataclasses import replace

import pytest
import torch
from ahead_of_time import CompileForSm90
from hypothesis import given
from hypothesis import strategies as st
from test_kernels_attention import LAYER, TOLERANCE, make_case, oracle

from kernels.attention_batch import AttentionBatch
from kernels.gpu import paged_decode as decode
from kernels.gpu import paged_prefill as prefill
from kernels.gpu.paged_attention import paged_attention
from kernels.gpu.tuning import LaunchConfig, forced
from kernels.kv_scales import UNSCALED, KVScales
from kernels.kv_write import as_cached
from kernels.paged_attention import paged_attention_reference

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
# (query_len, context_len): decode rows, prefill from nothing, chunks after a cached prefix, an idle sequence
MIXED = [(1, 1), (17, 17), (1, 70), (3, 34), (25, 73), (0, 5), (1, 33), (18, 19)]
SHARED_BYTES = 228 * 1024  # of an sm_90 multiprocessor


def run(
    query: torch.Tensor,
    cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int = 0,
    *,
    device: torch.device,
    scales: KVScales = UNSCALED,
) -> torch.Tensor:
    return paged_attention(query.to(device), cache.to(device), LAYER, on(batch, device), scale, window, scales).cpu()


def on(batch: AttentionBatch, device: torch.device) -> AttentionBatch:
    tensors = (batch.query_starts, batch.context_lens, batch.block_tables)
    return AttentionBatch(*(tensor.to(device) for tensor in tensors), batch.max_query_len, batch.max_context_len)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 5])
def test_mixed_batch(kernel_device: torch.device, dtype: torch.dtype, window: int) -> None:
    query, cache, batch = make_case(MIXED, dtype=dtype)
    assert_close(
        run(query, cache, batch, 0.125, window, device=kernel_device), oracle(query, cache, batch, 0.125, window), dtype
    )


@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(16, 24), (40, 8), (64, 128), (80, 16), (96, 32), (128, 64), (256, 16)]
)
def test_head_and_block_sizes(kernel_device: torch.device, head_dim: int, block_size: int) -> None:
    query, cache, batch = make_case([(1, 33), (19, 140)], num_kv_heads=1, head_dim=head_dim, block_size=block_size)
    scale = head_dim**-0.5
    actual = run(query, cache, batch, scale, device=kernel_device)
    assert_close(actual, oracle(query, cache, batch, scale), torch.float32)


@pytest.mark.parametrize("group", [1, 13, 100])
def test_query_heads_per_kv_head(kernel_device: torch.device, group: int) -> None:
    query, cache, batch = make_case([(1, 50), (9, 20)], num_kv_heads=1, group=group)
    actual = run(query, cache, batch, 0.125, device=kernel_device)
    assert_close(actual, oracle(query, cache, batch, 0.125), torch.float32)


@pytest.mark.parametrize("group", [1, 3, 13])
def test_drafts_beside_single_tokens(kernel_device: torch.device, group: int) -> None:
    query, cache, batch = make_case([(5, 40), (1, 3), (3, 33), (0, 7), (2, 2)], num_kv_heads=1, group=group)
    actual = run(query, cache, batch, 0.125, device=kernel_device)
    assert_close(actual, oracle(query, cache, batch, 0.125), torch.float32)


@pytest.mark.parametrize(("splits", "window"), [(1, 0), (3, 0), (40, 0), (1, 300), (3, 300)])
def test_context_cut_into_splits(kernel_device: torch.device, splits: int, window: int) -> None:
    """Drafts beside single tokens; some sequences are too short for all the splits, or for any."""
    query, cache, batch = make_case([(1, 800), (3, 531), (1, 1), (2, 257), (0, 9)], num_kv_heads=1)
    output = torch.full_like(query, float("nan")).to(kernel_device)
    decode.paged_decode(
        *(query.to(kernel_device), cache.to(kernel_device), LAYER, on(batch, kernel_device), 0.125, window),
        *(UNSCALED, output, 3, splits),
    )
    assert_close(output.cpu(), oracle(query, cache, batch, 0.125, window), torch.float32)


@pytest.mark.parametrize(("rows", "tile", "window"), [(16, 16, 0), (16, 32, 20), (32, 64, 33), (128, 16, 20)])
def test_prefill_takes_any_batch_in_any_tiles(kernel_device: torch.device, rows: int, tile: int, window: int) -> None:
    query, cache, batch = make_case(MIXED, num_kv_heads=1)
    output = torch.full_like(query, float("nan")).to(kernel_device)
    with forced("paged_prefill", LaunchConfig(4, 2, {"ROWS": rows, "TILE": tile})):
        prefill.paged_prefill(
            *(query.to(kernel_device), cache.to(kernel_device), LAYER, on(batch, kernel_device), 0.125, window),
            *(UNSCALED, output),
        )
    assert_close(output.cpu(), oracle(query, cache, batch, 0.125, window), torch.float32)


@pytest.mark.parametrize("splits", [1, 4])
def test_padding_of_a_captured_graph_reads_nothing_and_gets_zeros(kernel_device: torch.device, splits: int) -> None:
    query, cache, batch = make_case([(1, 20), (1, 600), (1, 0), (1, 0)], num_kv_heads=1)
    padded = replace(batch, block_tables=batch.block_tables.masked_fill(batch.context_lens[:, None] == 0, 1 << 30))
    expected = torch.cat(
        [oracle(query[:2], cache, make_case([(1, 20), (1, 600)], num_kv_heads=1)[2], 0.125), torch.zeros(2, 3, 64)]
    )
    output = torch.full_like(query, float("nan")).to(kernel_device)
    decode.paged_decode(
        *(query.to(kernel_device), cache.to(kernel_device), LAYER, on(padded, kernel_device), 0.125, 0),
        *(UNSCALED, output, 1, splits),
    )
    assert_close(output.cpu(), expected, torch.float32)
    output.fill_(float("nan"))
    prefill.paged_prefill(
        *(query.to(kernel_device), cache.to(kernel_device), LAYER, on(padded, kernel_device), 0.125, 0),
        *(UNSCALED, output),
    )
    assert_close(output.cpu(), expected, torch.float32)


def test_quantised_cache(kernel_device: torch.device) -> None:
    query, cache, batch = make_case(MIXED[1:5], dtype=torch.float16)
    scales = KVScales(key=0.02, value=0.5)
    small = torch.empty(cache.shape, dtype=torch.float8_e4m3fn)
    small[:, :, 0] = as_cached(cache[:, :, 0], scales.key, small.dtype)
    small[:, :, 1] = as_cached(cache[:, :, 1], scales.value, small.dtype)
    cached = torch.stack((small[:, :, 0].double() * scales.key, small[:, :, 1].double() * scales.value), dim=2)
    expected = oracle(query, cached, batch, 0.125)
    assert_close(run(query, small, batch, 0.125, device=kernel_device, scales=scales), expected, torch.float16)
    reference = paged_attention_reference(query, small, LAYER, batch, 0.125, scales=scales)
    assert_close(reference, expected, torch.float16)


def test_query_may_be_a_slice_and_cache_a_view(kernel_device: torch.device) -> None:
    query, cache, batch = make_case([(1, 20), (11, 40)])
    fused = torch.cat((query.flatten(1), torch.randn(query.shape[0], 10)), dim=1).to(kernel_device)
    sliced = fused[:, : query[0].numel()].view(query.shape)
    arena = torch.full((*cache.shape[:4], cache.shape[4] * 2, cache.shape[5]), float("nan"), device=kernel_device)
    arena[:, :, :, :, ::2] = cache.to(kernel_device)
    actual = paged_attention(sliced, arena[:, :, :, :, ::2], LAYER, on(batch, kernel_device), 0.125)
    assert_close(actual.cpu(), oracle(query, cache, batch, 0.125), torch.float32)


def test_a_key_that_is_not_a_number_is_not_hidden(kernel_device: torch.device) -> None:
    query, cache, batch = make_case([(1, 600), (40, 40)], num_kv_heads=1)
    cache[batch.block_tables[:, 0].long(), LAYER, 0, :, 0] = float("nan")
    assert run(query, cache, batch, 0.125, device=kernel_device).isnan().all()


def test_no_tokens(kernel_device: torch.device) -> None:
    query, cache, batch = make_case([(0, 3)])
    assert run(query, cache, batch, 0.125, device=kernel_device).shape == query.shape


@given(programs=st.integers(1, 5000), context=st.integers(0, 1 << 20), multiprocessors=st.integers(1, 200))
def test_number_of_splits(programs: int, context: int, multiprocessors: int) -> None:
    splits = decode.num_splits(programs, context, multiprocessors)
    assert 1 <= splits <= decode.MAX_SPLITS
    assert splits == 1 or splits <= -(-context // decode.MIN_SPLIT_TOKENS)
    assert context <= splits * decode.MAX_SPLIT_TOKENS or splits == decode.MAX_SPLITS
    if programs >= 40 * multiprocessors and context <= decode.MAX_SPLIT_TOKENS:
        assert splits == 1


ATTENTION_SIGNATURE = {
    **dict.fromkeys(("query_ptr", "keys_ptr", "output_ptr"), "*bf16"),
    **dict.fromkeys(("starts_ptr", "contexts_ptr", "tables_ptr"), "*i32"),
    **dict.fromkeys(("query_token_stride", "query_head_stride", "value_offset", "head_stride", "token_stride"), "i32"),
    **dict.fromkeys(("block_stride",), "i64"),
    **dict.fromkeys(("table_stride", "window"), "i32"),
    **dict.fromkeys(("score_scale", "value_scale"), "fp32"),
}
DIVISIBLE = [name for name, kind in ATTENTION_SIGNATURE.items() if kind in ("i32", "i64")][:-2]


@pytest.mark.parametrize(("head_dim", "cached"), [(64, "*bf16"), (128, "*bf16"), (256, "*bf16"), (128, "*fp8e4nv")])
def test_decode_compiles(compile_for_sm90: CompileForSm90, head_dim: int, cached: str) -> None:
    config = decode.default_config(head_dim, 16)
    constants = {"QUERIES": 1, "GROUP": 4, "ROWS": 16, "BLOCK_SIZE": 16, "HEAD_DIM": head_dim, "WIDTH": head_dim}
    resources = compile_for_sm90(
        decode.paged_decode_kernel,
        {**ATTENTION_SIGNATURE, "keys_ptr": cached, "partial_ptr": "*fp32", "weight_ptr": "*fp32"},
        {**constants, **config.sizes, "MIN_TILES": 2, "SLIDING": True, "SPLIT": True},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=DIVISIBLE,
    )
    assert resources.spill_bytes == 0
    assert resources.shared_bytes * decode.RESIDENT_PROGRAMS <= SHARED_BYTES
    assert resources.registers * config.num_warps * 32 * 3 <= 65536
    assert "mma.sync" in resources.ptx
    assert "cp.async.cg.shared.global" in resources.ptx  # 16 bytes at a time, while the tile before is multiplied


def test_merge_compiles(compile_for_sm90: CompileForSm90) -> None:
    resources = compile_for_sm90(
        decode.merge_splits_kernel,
        {
            **dict.fromkeys(("partial_ptr", "weight_ptr"), "*fp32"),
            **{name: ATTENTION_SIGNATURE[name] for name in ("output_ptr", "starts_ptr", "contexts_ptr", "window")},
            "splits": "i32",
        },
        {"QUERIES": 1, "HEAD_DIM": 256, "WIDTH": 256, "TILE": 32, "MIN_TILES": 8, "SLIDING": False}
        | {"MAX_SPLITS": 256, "AT_ONCE": 16},
    )
    assert resources.spill_bytes == 0


@pytest.mark.parametrize(("head_dim", "rows"), [(64, 128), (256, 64)])
def test_decode_of_many_rows_does_not_spill(compile_for_sm90: CompileForSm90, head_dim: int, rows: int) -> None:
    config = decode.default_config(head_dim, rows)
    resources = compile_for_sm90(
        decode.paged_decode_kernel,
        {**ATTENTION_SIGNATURE, "partial_ptr": "*fp32", "weight_ptr": "*fp32"},
        {"QUERIES": 1, "GROUP": rows - 1, "ROWS": rows, "BLOCK_SIZE": 16, "HEAD_DIM": head_dim, "WIDTH": head_dim}
        | {**config.sizes, "MIN_TILES": 2, "SLIDING": False, "SPLIT": False},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=DIVISIBLE,
    )
    assert resources.spill_bytes == 0
    assert resources.shared_bytes <= SHARED_BYTES


@pytest.mark.parametrize(("head_dim", "cached"), [(64, "*bf16"), (128, "*bf16"), (256, "*bf16"), (128, "*fp8e4nv")])
def test_prefill_compiles(compile_for_sm90: CompileForSm90, head_dim: int, cached: str) -> None:
    config = prefill.default_config(head_dim)
    resources = compile_for_sm90(
        prefill.paged_prefill_kernel,
        {**ATTENTION_SIGNATURE, "keys_ptr": cached, "num_seqs": "i32", "min_queries": "i32"},
        {"GROUP": 4, "BLOCK_SIZE": 16, "HEAD_DIM": head_dim, "WIDTH": head_dim, "SLIDING": False, **config.sizes},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=DIVISIBLE,
    )
    assert resources.spill_bytes == 0
    assert resources.shared_bytes <= SHARED_BYTES
    assert "wgmma" in resources.ptx
    assert "mma.sync" not in resources.ptx
    assert "cp.async.cg.shared.global" in resources.ptx
