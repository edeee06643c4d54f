"""The shape of the paged KV cache, checked and described to the C++ kernels.

The cache is one tensor, block-major: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], keys at index 0
of the third dimension and values at index 1. Only its last dimension must be dense: a view of a larger arena is fine.
"""

import ctypes
import functools

import torch


class CacheView(ctypes.Structure):
    """CacheView of native/api.h; strides in elements."""

    _fields_ = (
        ("num_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
    )


def check_cache(kv_cache: torch.Tensor, layer: int) -> None:
    """Raise ValueError unless kv_cache is a paged cache that has this layer."""
    shape = kv_cache.shape
    if len(shape) != 6 or shape[2] != 2 or kv_cache.stride(5) != 1:
        raise ValueError(
            "kv_cache must be [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], dense in head_dim;"
            f" got {tuple(shape)} with strides {kv_cache.stride()}"
        )
    if not 0 <= layer < shape[1]:
        raise ValueError(f"layer {layer} is not in a cache of {shape[1]} layers")


@functools.lru_cache(maxsize=64)
def _view(shape: torch.Size, strides: tuple[int, ...]) -> CacheView:
    num_blocks, _, _, num_kv_heads, block_size, head_dim = shape
    block_stride, _, value_offset, head_stride, token_stride, _ = strides
    return CacheView(
        num_blocks, block_size, num_kv_heads, head_dim, block_stride, value_offset, head_stride, token_stride
    )


def native_view(kv_cache: torch.Tensor) -> CacheView:
    """The description of a cache that C++ reads."""
    return _view(kv_cache.shape, kv_cache.stride())


def layer_pointer(kv_cache: torch.Tensor, layer: int) -> int:
    """Address of the first element of one layer's part of block 0."""
    return kv_cache.data_ptr() + layer * kv_cache.stride(1) * kv_cache.element_size()
