"""Rotary position embedding in the half-split ("rotate half") convention of Hugging Face's Llama.

With the first rotary_dim elements of a head split in two halves (a, b), the rotated halves are
(a * cos - b * sin, b * cos + a * sin); elements beyond rotary_dim pass through. cos and sin are
[num_tokens, rotary_dim / 2] in float32, one row per token, any scaling of the attention already multiplied in (half
the width of Hugging Face's, whose two halves are equal). The arithmetic is float32, rounded once to the input's dtype.
"""

import torch

from kernels import native_library
from kernels.kv_cache import PageFormat, layer_pointer, native_view
from kernels.kv_scales import UNSCALED, KVScales
from kernels.kv_write import check_key_value, dense_heads, write_kv


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x ([num_tokens, num_heads, head_dim]); the specification of what `apply_rotary` does to each tensor."""
    _check(x, cos, sin)
    half = cos.shape[-1]
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)  # [num_tokens, 1, half]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if cos.shape != sin.shape or cos.shape[0] != x.shape[0] or 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit {tuple(x.shape)}")


def _check_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    page_format: PageFormat,
) -> None:
    _check(query, cos, sin)
    check_key_value(key, value, kv_cache, layer, slots, page_format)
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2]:
        raise ValueError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}")


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query ([num_tokens, num_heads, head_dim]) and key ([num_tokens, num_kv_heads, head_dim]); new tensors."""
    return rotate_reference(query, cos, sin), rotate_reference(key, cos, sin)


def rope_and_write_kv_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    page_format: PageFormat = "plain",
    scales: KVScales = UNSCALED,
) -> torch.Tensor:
    """Specification of `rope_and_write_kv`: `apply_rotary`, then `write_kv`."""
    rotated_query, rotated_key = apply_rotary(query, key, cos, sin)
    write_kv(rotated_key, value, kv_cache, layer, slots, page_format, scales)
    return rotated_query


def rope_and_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    page_format: PageFormat = "plain",
    scales: KVScales = UNSCALED,
) -> torch.Tensor:
    """Rotate query and key, store the rotated key and the value in their slots; returns the rotated query, contiguous.

    Query, key and value may be slices of one fused projection. Raises as `write_kv` does.
    """
    if query.is_cuda:
        from kernels.gpu import rope_kv_write  # needs Triton, which a machine without a GPU need not have

        _check_step(query, key, value, cos, sin, kv_cache, layer, slots, page_format)
        query, key, value = dense_heads(query), dense_heads(key), dense_heads(value)
        return rope_kv_write.rope_and_write_kv(query, key, value, cos, sin, kv_cache, layer, slots, scales)
    native = native_library.function("rope_and_write_kv", query)
    if native is None or not kv_cache.dtype == key.dtype == value.dtype == query.dtype or scales != UNSCALED:
        return rope_and_write_kv_reference(query, key, value, cos, sin, kv_cache, layer, slots, page_format, scales)
    _check_step(query, key, value, cos, sin, kv_cache, layer, slots, page_format)
    num_tokens, num_heads, head_dim = query.shape
    query, key, value, slots = dense_heads(query), dense_heads(key), dense_heads(value), slots.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    rotated = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype)
    status = native(
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), cos.data_ptr(), sin.data_ptr(), rotated.data_ptr()),
        *(layer_pointer(kv_cache, layer), slots.data_ptr(), num_tokens, num_heads),
        *(query.stride(0), key.stride(0), value.stride(0), cos.shape[1]),
        *(native_view(kv_cache, page_format), torch.get_num_threads()),
    )
    native_library.raise_for_status(status)
    return rotated
