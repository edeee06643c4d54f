"""Paged attention for sequences with few query tokens: the context is cut into splits, computed side by side.

Why: one query token reads its whole context once and computes next to nothing, so the time is that of reading the cache,
if the device is full of programs. Few sequences have too few heads for that. The splits of a context are therefore
programs of their own, which leave a normalised output and the logarithm of its weight, and a second kernel merges them
(flash-decoding). The query heads that share a KV head are the rows of one matrix product, so that it is read once.

The grid depends on shapes alone; how much of it has work is found on the device from the context lengths, so that a
launch may be captured into a CUDA graph and replayed for other contexts. A sequence of context 0 (the padding of such a
graph) reads nothing and gets zeros. The specification is `kernels.paged_attention.paged_attention_reference`.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels.attention_batch import AttentionBatch
from kernels.gpu.attention_tile import fold_tile, load_queries, store_rows
from kernels.gpu.device import LOG2_E, multiprocessors, next_power_of_two
from kernels.gpu.tuning import LaunchConfig, launch_config
from kernels.kv_scales import KVScales

MIN_SPLIT_TOKENS = 256
"""A split costs a program, and its output a write and a read: shorter ones do not pay."""

MAX_SPLIT_TOKENS = 16384
"""No program reads more than this, so that one long context in a batch of short ones does not run alone at the end."""

MAX_SPLITS = 256

RESIDENT_PROGRAMS = 4
"""Programs that a multiprocessor needs to keep its memory pipes busy, each with a tile or two under way. Registers and
shared memory leave room for three (head_dim 256) to five."""

_MERGED_AT_ONCE = 16  # splits


def default_config(head_dim: int, rows: int) -> LaunchConfig:
    """Tiles of 16 KiB in 16-bit elements, of which each program has one or two under way, in 40 KiB of shared memory."""
    width = next_power_of_two(head_dim)
    tile = min(max(8192 // width, 16), 128)
    num_warps = 4 if rows * max(width, tile) < 128 * 128 else 8  # sums and scores stay in registers
    return LaunchConfig(num_warps, num_stages=3, sizes={"TILE": tile})


@functools.lru_cache(maxsize=256)  # asked once a layer, the same for all layers of a step
def num_splits(num_programs: int, max_context_len: int, num_multiprocessors: int) -> int:
    """How many splits a context may have, for `num_programs` pairs of sequence and KV head: shapes in, a number out.

    The fewest that make the device within a twentieth as full as any number would, and leave no split too long.
    """

    def fullness(splits: int) -> float:
        """Work of the mean multiprocessor over that of the one with the most, which the others wait for."""
        programs = num_programs * splits
        most = max(-(-programs // num_multiprocessors), RESIDENT_PROGRAMS)
        return programs / (most * num_multiprocessors)

    fewest = min(max(1, -(-max_context_len // MAX_SPLIT_TOKENS)), MAX_SPLITS)
    most = max(fewest, min(-(-max_context_len // MIN_SPLIT_TOKENS), MAX_SPLITS))
    candidates = range(fewest, most + 1)
    enough = 0.95 * max(fullness(splits) for splits in candidates)
    return next(splits for splits in candidates if fullness(splits) >= enough)


@triton.jit
def _split_extent(
    query_len: tl.tensor,
    context_len: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SLIDING: tl.constexpr,
) -> tl.tuple:
    """(first token that any query sees, rounded down to a tile, tokens of a split): the same for both kernels."""
    first = 0
    if SLIDING:
        first = tl.maximum(context_len - query_len - window + 1, 0) // TILE * TILE
    tiles = tl.cdiv(context_len - first, TILE)
    return first, tl.maximum(tl.cdiv(tiles, splits), MIN_TILES) * TILE


@triton.jit(do_not_specialize=["window", "table_stride"])
def paged_decode_kernel(
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    output_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    weight_ptr: tl.tensor,
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
    window: tl.tensor,
    score_scale: tl.tensor,
    value_scale: tl.tensor,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SLIDING: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Program (sequence, KV head, split): output rows, or with SPLIT a partial output and its weight, base 2.

    partial is [sequences * QUERIES, heads, splits, HEAD_DIM] and weight the same without its last dimension, float32.
    """
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query_start = tl.load(starts_ptr + sequence)
    query_len = tl.load(starts_ptr + sequence + 1) - query_start
    context_len = tl.load(contexts_ptr + sequence)
    if query_len == 0 or query_len > QUERIES:
        return
    splits = tl.num_programs(2)
    first, extent = _split_extent(query_len, context_len, window, splits, TILE, MIN_TILES, SLIDING)
    begin = first + split * extent
    end = tl.minimum(begin + extent, context_len)
    if SPLIT and begin >= end:
        return

    query, index, head, present = load_queries(
        query_ptr, query_start, query_len, 0, kv_head, query_token_stride, query_head_stride,
        GROUP, ROWS, HEAD_DIM, WIDTH,
    )  # fmt: skip
    positions = context_len - query_len + index
    keys = keys_ptr + kv_head.to(tl.int64) * head_stride
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile_start in tl.range(begin, end, TILE):
        largest, total, weighted = fold_tile(
            query, positions, largest, total, weighted, keys, keys + value_offset, table, tile_start, context_len,
            window, score_scale, block_stride, token_stride, BLOCK_SIZE, HEAD_DIM, WIDTH, TILE, SLIDING, True,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees nothing: its output is 0, its weight too
    attended = weighted / total[:, None] * value_scale
    heads = tl.num_programs(1) * GROUP
    if SPLIT:
        places = ((sequence * QUERIES + index).to(tl.int64) * heads + head) * splits + split
        store_rows(partial_ptr, attended, places, present, HEAD_DIM, WIDTH)
        tl.store(weight_ptr + places, largest + tl.log2(total), mask=present)
    else:
        places = (query_start + index).to(tl.int64) * heads + head
        store_rows(output_ptr, attended, places, present, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=["window", "splits"])
def merge_splits_kernel(
    partial_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    output_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    contexts_ptr: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SLIDING: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Program (sequence * QUERIES + query, head): the mean of the splits' outputs, weighted. MAX_SPLITS >= splits."""
    place, head = tl.program_id(0), tl.program_id(1)
    sequence, index = place // QUERIES, place % QUERIES
    query_start = tl.load(starts_ptr + sequence)
    query_len = tl.load(starts_ptr + sequence + 1) - query_start
    context_len = tl.load(contexts_ptr + sequence)
    if index >= query_len or query_len > QUERIES:
        return
    first, extent = _split_extent(query_len, context_len, window, splits, TILE, MIN_TILES, SLIDING)
    used = tl.cdiv(context_len - first, extent)  # the others have written nothing
    row = (place.to(tl.int64) * tl.num_programs(1) + head) * splits
    every, columns = tl.arange(0, MAX_SPLITS), tl.arange(0, WIDTH)
    largest = tl.max(tl.load(weight_ptr + row + every, mask=every < used, other=float("-inf")), 0)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    merged, total = tl.zeros((WIDTH,), tl.float32), tl.zeros((AT_ONCE,), tl.float32)
    for start in tl.range(0, used, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        weights = tl.exp2(tl.load(weight_ptr + row + some, mask=some < used, other=float("-inf")) - reference)
        read = (some < used)[:, None] & (columns < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + (row + some)[:, None] * HEAD_DIM + columns[None, :], mask=read, other=0.0)
        merged += tl.sum(weights[:, None] * partial, 0)
        total += weights
    weight = tl.sum(total, 0)
    merged = merged / tl.where(weight == 0.0, 1.0, weight)
    outputs = output_ptr + ((query_start + index).to(tl.int64) * tl.num_programs(1) + head) * HEAD_DIM + columns
    tl.store(outputs, merged.to(output_ptr.dtype.element_ty), mask=columns < HEAD_DIM)


def paged_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int,
    scales: KVScales,
    output: torch.Tensor,
    max_queries: int,
    splits: int | None = None,
) -> None:
    """Fill the rows of output (query's shape, contiguous) of the sequences with 1 to max_queries query tokens.

    Shapes are those of `kernels.paged_attention.paged_attention`, checked there. `splits` overrides `num_splits`.
    """
    num_heads, head_dim = query.shape[1:]
    _, _, _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    if splits is None:
        splits = num_splits(batch.num_seqs * num_kv_heads, batch.max_context_len, multiprocessors(query.device))
    keys = kv_cache.select(1, layer)
    rows = max(16, next_power_of_two(max_queries * group))  # the smallest product has 16
    config = launch_config(
        "paged_decode",
        query.device,
        default_config(head_dim, rows),
        rows=rows,
        head_dim=head_dim,
        block_size=block_size,
        element_bytes=kv_cache.element_size(),
    )
    tile = config.sizes["TILE"]
    numbers = {
        "QUERIES": max_queries,
        "HEAD_DIM": head_dim,
        "WIDTH": next_power_of_two(head_dim),
        "TILE": tile,
        "MIN_TILES": max(1, MIN_SPLIT_TOKENS // tile),
        "SLIDING": sliding_window > 0,
    }
    places = batch.num_seqs * max_queries if splits > 1 else 0
    partial = torch.empty((places, num_heads, splits, head_dim), dtype=torch.float32, device=query.device)
    weight = torch.empty((places, num_heads, splits), dtype=torch.float32, device=query.device)
    paged_decode_kernel[(batch.num_seqs, num_kv_heads, splits)](
        *(query, keys, output, partial, weight, batch.query_starts, batch.context_lens, batch.block_tables),
        *(query.stride(0), query.stride(1)),
        *(keys.stride(0), keys.stride(1), keys.stride(2), keys.stride(3), batch.block_tables.stride(0)),
        *(sliding_window, scale * scales.key * LOG2_E, scales.value),
        **numbers,
        GROUP=group,
        ROWS=rows,
        BLOCK_SIZE=block_size,
        SPLIT=splits > 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        merge_splits_kernel[(places, num_heads)](
            *(partial, weight, output, batch.query_starts, batch.context_lens, sliding_window, splits),
            **numbers,
            MAX_SPLITS=MAX_SPLITS,
            AT_ONCE=_MERGED_AT_ONCE,
            num_warps=4,
        )
