"""Copies whole KV blocks that lie anywhere; kernels/block_copy.py has the references and the public operations.

One program copies one tile of one block, 16 bytes a thread and access. Which words make a block does not matter, so blocks
are looked at as pairs of 8-byte words: a block's size in pairs times two is what tells the compiler that every
block starts at a multiple of 16 bytes. Block numbers are multiplied in 64 bits: caches are larger than 2**31 words.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.tuning import LaunchConfig, launch_config

DEFAULT = LaunchConfig(num_warps=4, sizes={"TILE_WORDS": 1024})
"""Four accesses of 16 bytes in flight for each of 128 threads."""

_VECTOR_BYTES = 16


@triton.jit
def copy_blocks_kernel(
    source_ptr: tl.tensor,  # int64 words, [num_source_blocks, block_pairs * 2]
    destination_ptr: tl.tensor,  # int64 words, [num_destination_blocks, block_pairs * 2]
    source_ids_ptr: tl.tensor,  # [num_copies], or null: the i-th copy reads block i
    destination_ids_ptr: tl.tensor,  # [num_copies], or null: the i-th copy writes block i
    block_pairs: tl.tensor,
    tiles_per_block: tl.tensor,
    HAS_SOURCE_IDS: tl.constexpr,
    HAS_DESTINATION_IDS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
) -> None:
    copy = tl.program_id(0) // tiles_per_block
    tile = tl.program_id(0) % tiles_per_block
    source_block = copy.to(tl.int64)
    destination_block = copy.to(tl.int64)
    if HAS_SOURCE_IDS:
        source_block = tl.load(source_ids_ptr + copy).to(tl.int64)
    if HAS_DESTINATION_IDS:
        destination_block = tl.load(destination_ids_ptr + copy).to(tl.int64)
    if (source_block < 0) | (destination_block < 0):
        return
    words = tile * TILE_WORDS + tl.arange(0, TILE_WORDS)
    mask = words < block_pairs * 2
    data = tl.load(source_ptr + source_block * block_pairs * 2 + words, mask=mask)
    tl.store(destination_ptr + destination_block * block_pairs * 2 + words, data, mask=mask)


def copy_blocks(
    source: torch.Tensor,
    destination: torch.Tensor,
    source_ids: torch.Tensor | None,
    destination_ids: torch.Tensor | None,
) -> None:
    """destination[destination_ids[i]] = source[source_ids[i]] over the first dimension; None stands for 0, 1, 2, ...

    Both tensors contiguous. Raises ValueError for a block size or an address that is no multiple of 16 bytes.
    """
    ids = source_ids if source_ids is not None else destination_ids
    assert ids is not None
    if not len(ids):
        return
    block_bytes = source[0].numel() * source.element_size()
    if block_bytes % _VECTOR_BYTES or source.data_ptr() % _VECTOR_BYTES or destination.data_ptr() % _VECTOR_BYTES:
        raise ValueError(f"blocks of {block_bytes} bytes: sizes and addresses must be multiples of {_VECTOR_BYTES}")
    config = launch_config("block_copy", source.device, DEFAULT, block_bytes=block_bytes)
    tile_words = config.sizes["TILE_WORDS"]
    tiles_per_block = triton.cdiv(block_bytes // 8, tile_words)
    copy_blocks_kernel[(len(ids) * tiles_per_block,)](
        source.view(torch.uint8).view(-1).view(torch.int64),
        destination.view(torch.uint8).view(-1).view(torch.int64),
        source_ids,
        destination_ids,
        block_bytes // _VECTOR_BYTES,
        tiles_per_block,
        HAS_SOURCE_IDS=source_ids is not None,
        HAS_DESTINATION_IDS=destination_ids is not None,
        TILE_WORDS=tile_words,
        num_warps=config.num_warps,
    )
