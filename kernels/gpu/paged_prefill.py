"""Paged attention for sequences with many query tokens: whole prompts, and chunks of them after a cached prefix.

Why: many queries of a sequence read the same keys, so the time is that of the matrix products. A program takes a tile of
queries, and all the query heads that share a KV head with them, as the rows of one product, and walks over the context:
first the tiles at the edge of the sliding window, then those that every row sees whole and that need no mask, then those
on the diagonal.

The batch is ragged: `query_starts` on the device says which tokens are whose. The grid is an upper bound of the tiles that
any raggedness makes of as many tokens and sequences, and each program finds its sequence by bisection, so nothing waits
for the device. The specification is `kernels.paged_attention.paged_attention_reference`.
"""

import torch
import triton
import triton.language as tl

from kernels.attention_batch import AttentionBatch
from kernels.gpu.attention_tile import fold_tile, load_queries, store_rows
from kernels.gpu.device import LOG2_E, next_power_of_two
from kernels.gpu.tuning import LaunchConfig, launch_config
from kernels.kv_scales import KVScales


def default_config(head_dim: int) -> LaunchConfig:
    """The largest tiles of keys that leave the sums in registers: 128 rows of them are 64 to 128 registers of a thread."""
    tile = min(max(8192 // next_power_of_two(head_dim), 16), 128)
    return LaunchConfig(num_warps=8, num_stages=3, sizes={"ROWS": 128, "TILE": tile})


@triton.jit
def find_sequence(starts_ptr: tl.tensor, num_seqs: tl.tensor, tile: tl.tensor, QUERIES: tl.constexpr) -> tl.tuple:
    """(sequence, index of its first query in the tile) of one of num_tokens // QUERIES + num_seqs tiles.

    Sequence s has the tiles from starts[s] // QUERIES + s on, up to those of s + 1: never fewer than its queries need,
    because rounding down its end and its start loses less than the one tile added. An index may be past the last query.
    """
    low, high = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low, (tile - tl.load(starts_ptr + low) // QUERIES - low) * QUERIES


@triton.jit(do_not_specialize=["num_seqs", "window", "table_stride", "min_queries"])
def paged_prefill_kernel(
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    output_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    contexts_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    block_stride: tl.tensor,
    value_offset: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    table_stride: tl.tensor,
    num_seqs: tl.tensor,
    min_queries: tl.tensor,
    window: tl.tensor,
    score_scale: tl.tensor,
    value_scale: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SLIDING: tl.constexpr,
) -> None:
    """Program (tile of ROWS // GROUP queries, KV head); sequences of fewer than min_queries query tokens are left out."""
    QUERIES: tl.constexpr = ROWS // GROUP
    # The last tiles of a long prompt see the most: they start first, so that they do not run alone at the end.
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    sequence, first_query = find_sequence(starts_ptr, num_seqs, tile, QUERIES)
    query_start = tl.load(starts_ptr + sequence)
    query_len = tl.load(starts_ptr + sequence + 1) - query_start
    context_len = tl.load(contexts_ptr + sequence)
    if first_query >= query_len or query_len < min_queries:
        return

    query, index, head, present = load_queries(
        query_ptr, query_start, query_len, first_query, kv_head, query_token_stride, query_head_stride,
        GROUP, ROWS, HEAD_DIM, WIDTH,
    )  # fmt: skip
    positions = context_len - query_len + index
    first_position = context_len - query_len + first_query
    last_position = context_len - query_len + tl.minimum(first_query + QUERIES, query_len) - 1
    keys = keys_ptr + kv_head.to(tl.int64) * head_stride
    values = keys + value_offset
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, WIDTH), tl.float32)
    whole_from = 0
    if SLIDING:
        begin = tl.maximum(first_position - window + 1, 0) // TILE * TILE
        inside = tl.cdiv(tl.maximum(last_position - window + 1, 0), TILE) * TILE
        whole_from = tl.minimum(inside, tl.cdiv(last_position + 1, TILE) * TILE)
        for tile_start in tl.range(begin, whole_from, TILE):
            largest, total, weighted = fold_tile(
                query, positions, largest, total, weighted, keys, values, table, tile_start, context_len,
                window, score_scale, block_stride, token_stride, BLOCK_SIZE, HEAD_DIM, WIDTH, TILE, True, True,
            )  # fmt: skip
    whole_to = tl.maximum((first_position + 1) // TILE * TILE, whole_from)
    for tile_start in tl.range(whole_from, whole_to, TILE):
        largest, total, weighted = fold_tile(
            query, positions, largest, total, weighted, keys, values, table, tile_start, context_len,
            window, score_scale, block_stride, token_stride, BLOCK_SIZE, HEAD_DIM, WIDTH, TILE, SLIDING, False,
        )  # fmt: skip
    for tile_start in tl.range(whole_to, last_position + 1, TILE):
        largest, total, weighted = fold_tile(
            query, positions, largest, total, weighted, keys, values, table, tile_start, context_len,
            window, score_scale, block_stride, token_stride, BLOCK_SIZE, HEAD_DIM, WIDTH, TILE, SLIDING, True,
        )  # fmt: skip
    attended = weighted / tl.where(total == 0.0, 1.0, total)[:, None] * value_scale
    places = (query_start + index).to(tl.int64) * (tl.num_programs(1) * GROUP) + head
    store_rows(output_ptr, attended, places, present, HEAD_DIM, WIDTH)


def paged_prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int,
    scales: KVScales,
    output: torch.Tensor,
    min_queries: int = 1,
) -> None:
    """Fill the rows of output (query's shape, contiguous) of the sequences with at least min_queries query tokens.

    Shapes are those of `kernels.paged_attention.paged_attention`, checked there.
    """
    num_tokens, num_heads, head_dim = query.shape
    _, _, _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    keys = kv_cache.select(1, layer)
    config = launch_config(
        "paged_prefill",
        query.device,
        default_config(head_dim),
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        element_bytes=kv_cache.element_size(),
    )
    rows = max(config.sizes["ROWS"], next_power_of_two(group))
    paged_prefill_kernel[(num_tokens // (rows // group) + batch.num_seqs, num_kv_heads)](
        *(query, keys, output, batch.query_starts, batch.context_lens, batch.block_tables),
        *(query.stride(0), query.stride(1)),
        *(keys.stride(0), keys.stride(1), keys.stride(2), keys.stride(3), batch.block_tables.stride(0)),
        *(batch.num_seqs, min_queries, sliding_window, scale * scales.key * LOG2_E, scales.value),
        GROUP=group,
        ROWS=rows,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        WIDTH=next_power_of_two(head_dim),
        TILE=config.sizes["TILE"],
        SLIDING=sliding_window > 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
