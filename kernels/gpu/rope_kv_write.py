"""Rotary embedding and the write of keys and values into the block-major cache, in one pass over a step's tokens.

Why: queries, keys and values lie side by side in one projection and are each read and written once; apart, the rotated
keys would go to memory and come back. A program takes one token's KV head with the query heads that share it, so that
the angles are read once for all of them and a decode step of few tokens still makes many programs.

A slot below 0 is a padding token's: its query is rotated, and nothing is written. The same goes for a slot past the end
of the cache, which a device cannot report. An 8-bit cache gets key / scale, cut to the largest number it can hold. The
specifications are `kernels.rotary.rope_and_write_kv_reference` and `kernels.kv_write.write_kv_reference`.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.device import next_power_of_two
from kernels.kv_scales import UNSCALED, KVScales


def num_warps(group: int, head_dim: int) -> int:
    """Of a program: 16 bytes of queries a thread."""
    return min(max(next_power_of_two(max(group, 1) * head_dim) // 512, 1), 4)


@triton.jit
def _rotated(
    source: tl.tensor,
    first: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    mask: tl.tensor,
    HALF: tl.constexpr,
) -> tl.tuple:
    """Both rotated halves, float32, rounded once to the source's dtype. `first` are the offsets of the first half."""
    dtype: tl.constexpr = source.dtype.element_ty
    a = tl.load(source + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + first + HALF, mask=mask, other=0.0).to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def _as_cached(x: tl.tensor, scale: tl.tensor, dtype: tl.constexpr, LIMIT: tl.constexpr) -> tl.tensor:
    """x / scale in the cache's dtype, of which LIMIT is the largest number (0: of no concern). NaN stays NaN."""
    wide = x.to(tl.float32) / scale
    if LIMIT > 0:
        wide = tl.clamp(wide, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return wide.to(dtype)


@triton.jit(do_not_specialize=["num_slots"])
def rope_and_write_kv_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    rotated_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    block_stride: tl.tensor,
    value_offset: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    num_slots: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
) -> None:
    """Program (token, KV head). GROUP 0: there are no queries; HALF 0: nothing is rotated."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    half, columns = tl.arange(0, HALF_WIDTH), tl.arange(0, WIDTH)
    in_half, beyond = half < HALF, (columns >= 2 * HALF) & (columns < HEAD_DIM)
    cos, sin = tl.zeros((HALF_WIDTH,), tl.float32), tl.zeros((HALF_WIDTH,), tl.float32)
    if HALF > 0:
        cos = tl.load(cos_ptr + token * HALF + half, mask=in_half, other=0.0)
        sin = tl.load(sin_ptr + token * HALF + half, mask=in_half, other=0.0)
    if GROUP > 0:
        group = tl.arange(0, GROUP_WIDTH)
        present, heads = (group < GROUP)[:, None], (kv_head * GROUP + group)[:, None]
        source = query_ptr + token * query_token_stride
        target = rotated_ptr + (token * (tl.num_programs(1) * GROUP) + heads) * HEAD_DIM
        first = heads * query_head_stride + half[None, :]
        mask = present & in_half[None, :]
        a, b = _rotated(source, first, cos[None, :], sin[None, :], mask, HALF)
        tl.store(target + half[None, :], a, mask=mask)
        tl.store(target + half[None, :] + HALF, b, mask=mask)
        if 2 * HALF < HEAD_DIM:
            mask = present & beyond[None, :]
            rest = tl.load(source + heads * query_head_stride + columns[None, :], mask=mask, other=0.0)
            tl.store(target + columns[None, :], rest, mask=mask)

    slot = tl.load(slots_ptr + token)
    if slot < 0 or slot >= num_slots:
        return
    cached: tl.constexpr = cache_ptr.dtype.element_ty
    keys = cache_ptr + slot // BLOCK_SIZE * block_stride + kv_head * head_stride + slot % BLOCK_SIZE * token_stride
    key_source = key_ptr + token * key_token_stride + kv_head * key_head_stride
    if HALF > 0:
        a, b = _rotated(key_source, half, cos, sin, in_half, HALF)
        tl.store(keys + half, _as_cached(a, key_scale, cached, LIMIT), mask=in_half)
        tl.store(keys + half + HALF, _as_cached(b, key_scale, cached, LIMIT), mask=in_half)
    if 2 * HALF < HEAD_DIM:
        rest = tl.load(key_source + columns, mask=beyond, other=0.0)
        tl.store(keys + columns, _as_cached(rest, key_scale, cached, LIMIT), mask=beyond)
    in_head = columns < HEAD_DIM
    value_source = value_ptr + token * value_token_stride + kv_head * value_head_stride
    value = tl.load(value_source + columns, mask=in_head, other=0.0)
    tl.store(keys + value_offset + columns, _as_cached(value, value_scale, cached, LIMIT), mask=in_head)


def rope_and_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    scales: KVScales = UNSCALED,
) -> torch.Tensor:
    """`kernels.rotary.rope_and_write_kv`, checked there; returns the rotated query, contiguous."""
    rotated = torch.empty_like(query, memory_format=torch.contiguous_format)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    _launch(query, key, value, cos, sin, rotated, kv_cache, layer, slots, scales)
    return rotated


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    scales: KVScales = UNSCALED,
) -> None:
    """`kernels.kv_write.write_kv`, checked there."""
    _launch(None, key, value, None, None, None, kv_cache, layer, slots, scales)


def _launch(
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotated: torch.Tensor | None,
    kv_cache: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    scales: KVScales,
) -> None:
    """With query go cos, sin and rotated; without it nothing is rotated."""
    num_tokens, num_kv_heads, head_dim = key.shape
    if not num_tokens:
        return
    cache = kv_cache.select(1, layer)
    block_size = kv_cache.shape[4]
    half = 0 if cos is None else cos.shape[1]
    group = 0 if query is None else query.shape[1] // num_kv_heads
    query_strides = (0, 0) if query is None else (query.stride(0), query.stride(1))
    rope_and_write_kv_kernel[(num_tokens, num_kv_heads)](
        *(query, key, value, cos, sin, rotated, cache, slots.contiguous()),
        *query_strides,
        *(key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        *(cache.stride(0), cache.stride(1), cache.stride(2), cache.stride(3)),
        *(kv_cache.shape[0] * block_size, scales.key, scales.value),
        GROUP=group,
        GROUP_WIDTH=next_power_of_two(max(group, 1)),
        HEAD_DIM=head_dim,
        WIDTH=next_power_of_two(head_dim),
        HALF=half,
        HALF_WIDTH=next_power_of_two(max(half, 1)),
        BLOCK_SIZE=block_size,
        LIMIT=int(torch.finfo(kv_cache.dtype).max) if kv_cache.dtype.itemsize == 1 else 0,
        num_warps=num_warps(group, head_dim),
    )
