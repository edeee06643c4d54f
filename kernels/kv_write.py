"""Store this step's keys and values in the paged KV cache (kv_cache.py tells its shape).

A slot names one token's place in the cache: `block * block_size + offset`.
"""

import torch

from kernels import native_library
from kernels.kv_cache import PageFormat, check_cache, layer_pointer, native_view, tile_pages, untile_pages
from kernels.kv_scales import UNSCALED, KVScales


def check_key_value(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    page_format: PageFormat = "plain",
) -> None:
    """Raise ValueError unless key, value ([num_tokens, num_kv_heads, head_dim]) and slots fit a layer of the cache."""
    check_cache(kv_cache, layer, page_format)
    if key.shape != value.shape or key.shape[1:] != kv_cache.shape[3::2]:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit cache {tuple(kv_cache.shape)}"
        )
    if slots.shape != key.shape[:1] or slots.dtype != torch.int64:
        raise ValueError(f"slots must be int64, one for each token; got {slots.dtype} {tuple(slots.shape)}")


def as_cached(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """x / scale in the cache's dtype; what an 8-bit float cannot hold becomes the largest number that it can."""
    if x.dtype == dtype and scale == 1.0:
        return x
    wide = x.float() / scale
    return (wide.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max) if dtype.itemsize == 1 else wide).to(dtype)


def write_kv_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    page_format: PageFormat = "plain",
    scales: KVScales = UNSCALED,
) -> None:
    """Specification of `write_kv`."""
    check_key_value(key, value, kv_cache, layer, slots, page_format)
    block_size = kv_cache.shape[4]
    if slots.is_cpu and bool(((slots < 0) | (slots >= kv_cache.shape[0] * block_size)).any()):
        raise IndexError("a slot lies outside the KV cache")  # on a device, asking would wait for it
    blocks, offsets = slots // block_size, slots % block_size
    plane = kv_cache[:, layer]  # [num_blocks, 2, num_kv_heads, block_size, head_dim]
    if page_format == "bf16-tiled":
        touched, blocks = torch.unique(blocks, return_inverse=True)
        plane, tiled_plane = untile_pages(plane[touched]), plane
    plane[blocks, 0, :, offsets] = as_cached(key, scales.key, kv_cache.dtype)
    plane[blocks, 1, :, offsets] = as_cached(value, scales.value, kv_cache.dtype)
    if page_format == "bf16-tiled":
        tiled_plane[touched] = tile_pages(plane)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    page_format: PageFormat = "plain",
    scales: KVScales = UNSCALED,
) -> None:
    """Write key and value ([num_tokens, num_kv_heads, head_dim]) of one layer into their slots ([num_tokens], int64).

    Slots of one call must differ. Raises ValueError where shapes disagree, IndexError for a slot outside the cache. On a
    GPU, which cannot report it, such a slot is not written: slot -1 is that of a padding token.
    """
    if key.is_cuda:
        from kernels.gpu import rope_kv_write  # needs Triton, which a machine without a GPU need not have

        check_key_value(key, value, kv_cache, layer, slots, page_format)
        rope_kv_write.write_kv(dense_heads(key), dense_heads(value), kv_cache, layer, slots, scales)
        return
    native = native_library.function("rope_and_write_kv", key)
    if native is None or kv_cache.dtype != key.dtype or value.dtype != key.dtype or scales != UNSCALED:
        write_kv_reference(key, value, kv_cache, layer, slots, page_format, scales)
        return
    check_key_value(key, value, kv_cache, layer, slots, page_format)
    key, value, slots = dense_heads(key), dense_heads(value), slots.contiguous()
    status = native(
        *(None, key.data_ptr(), value.data_ptr(), None, None, None),
        *(layer_pointer(kv_cache, layer), slots.data_ptr(), key.shape[0]),
        *(0, 0, key.stride(0), value.stride(0), 0),  # no query heads, no rotation
        *(native_view(kv_cache, page_format), torch.get_num_threads()),
    )
    native_library.raise_for_status(status)


def dense_heads(x: torch.Tensor) -> torch.Tensor:
    """x ([num_tokens, heads, head_dim]) with each token's heads in one piece; tokens may stay apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
