"""The shape and the page format of the paged KV cache, checked and described to the C++ kernels.

The cache is one tensor, block-major: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], keys at index 0
of the third dimension and values at index 1. Only its last dimension must be dense: a view of a larger arena is fine.

A page is the [block_size, head_dim] elements of one block, layer, head, and of the keys or the values. Its format says
in which order they lie there:

    plain         [block_size, head_dim], as the shape says
    bf16-tiled    keys [block_size / 16, head_dim / 2, 16 tokens, 2], values [block_size / 2, head_dim, 2]: the order in
                  which the C++ kernels multiply them on a CPU, so that decoding reads them without rearranging. The page is
                  dense, and bfloat16

The tensor of a tiled cache has the same shape, so that blocks are moved and counted alike, but its last two dimensions
are only bytes: `tile_pages` and `untile_pages` are the specification.
"""

import ctypes
import functools
from typing import Literal

import torch

PageFormat = Literal["plain", "bf16-tiled"]

TILE_TOKENS = 16
MAX_TILED_HEAD_DIM = 512  # kMaxTiledHeadDim of native/pages.h


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
        ("tiled", ctypes.c_int64),
    )


def can_be_tiled(dtype: torch.dtype, block_size: int, head_dim: int) -> bool:
    """Whether pages of these elements consist of whole tiles."""
    whole = block_size % TILE_TOKENS == 0 and head_dim % TILE_TOKENS == 0
    return dtype == torch.bfloat16 and whole and head_dim <= MAX_TILED_HEAD_DIM


def tile_pages(pages: torch.Tensor) -> torch.Tensor:
    """Plain pages ([..., 2, num_kv_heads, block_size, head_dim]) as tiled ones: a new tensor of the same shape."""
    keys, values = pages.unbind(-4)
    *outer, block_size, head_dim = keys.shape
    split_keys = keys.reshape(*outer, block_size // TILE_TOKENS, TILE_TOKENS, head_dim // 2, 2)
    tiled_keys = split_keys.transpose(-3, -2).reshape(keys.shape)
    tiled_values = values.reshape(*outer, block_size // 2, 2, head_dim).transpose(-2, -1).reshape(values.shape)
    return torch.stack((tiled_keys, tiled_values), dim=-4)


def untile_pages(pages: torch.Tensor) -> torch.Tensor:
    """Tiled pages ([..., 2, num_kv_heads, block_size, head_dim]) as plain ones: a new tensor of the same shape."""
    keys, values = pages.unbind(-4)
    *outer, block_size, head_dim = keys.shape
    split_keys = keys.reshape(*outer, block_size // TILE_TOKENS, head_dim // 2, TILE_TOKENS, 2)
    plain_keys = split_keys.transpose(-3, -2).reshape(keys.shape)
    plain_values = values.reshape(*outer, block_size // 2, head_dim, 2).transpose(-2, -1).reshape(values.shape)
    return torch.stack((plain_keys, plain_values), dim=-4)


def check_cache(kv_cache: torch.Tensor, layer: int, page_format: PageFormat = "plain") -> None:
    """Raise ValueError unless kv_cache is a paged cache that has this layer and can have this format."""
    shape = kv_cache.shape
    if len(shape) != 6 or shape[2] != 2 or kv_cache.stride(5) != 1:
        raise ValueError(
            "kv_cache must be [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], dense in head_dim;"
            f" got {tuple(shape)} with strides {kv_cache.stride()}"
        )
    if not 0 <= layer < shape[1]:
        raise ValueError(f"layer {layer} is not in a cache of {shape[1]} layers")
    if page_format == "plain":
        return
    tileable = can_be_tiled(kv_cache.dtype, shape[4], shape[5])
    if not tileable or kv_cache.stride(4) != shape[5] or kv_cache.is_cuda:
        raise ValueError(
            f"{kv_cache.device} pages of {kv_cache.dtype} {tuple(shape[4:])} with strides {kv_cache.stride()[4:]}"
            f" cannot be {page_format}"
        )


@functools.lru_cache(maxsize=64)
def _view(shape: torch.Size, strides: tuple[int, ...], page_format: PageFormat) -> CacheView:
    num_blocks, _, _, num_kv_heads, block_size, head_dim = shape
    block_stride, _, value_offset, head_stride, token_stride, _ = strides
    return CacheView(
        *(num_blocks, block_size, num_kv_heads, head_dim),
        *(block_stride, value_offset, head_stride, token_stride),
        page_format != "plain",
    )


def native_view(kv_cache: torch.Tensor, page_format: PageFormat = "plain") -> CacheView:
    """The description of a cache that C++ reads."""
    return _view(kv_cache.shape, kv_cache.stride(), page_format)


def layer_pointer(kv_cache: torch.Tensor, layer: int) -> int:
    """Address of the first element of one layer's part of block 0."""
    return kv_cache.data_ptr() + layer * kv_cache.stride(1) * kv_cache.element_size()
