"""KV blocks, whole, between a cache and one contiguous staging buffer, and inside a cache.

A block is what one index of the cache's first dimension holds: all layers, keys and values. Hand-off and offload move many
blocks that lie anywhere; gathered into one piece they are one transfer instead of one for each. Block ids are int32 or
int64, on the cache's device; those that are written to must be distinct. On a GPU an id of -1 is skipped, on both sides, so
that a launch of fixed size can be padded.
"""

import torch


def gather_blocks_reference(cache: torch.Tensor, block_ids: torch.Tensor, staging: torch.Tensor) -> None:
    """Specification of `gather_blocks`."""
    _check(cache, block_ids, staging)
    torch.index_select(cache, 0, block_ids, out=staging)


def gather_blocks(cache: torch.Tensor, block_ids: torch.Tensor, staging: torch.Tensor) -> None:
    """staging[i] = cache[block_ids[i]]. cache is [num_blocks, ...], staging [len(block_ids), ...], both contiguous.

    Raises ValueError where shapes, dtypes or devices do not fit. On a GPU nothing is waited for.
    """
    if not cache.is_cuda:
        gather_blocks_reference(cache, block_ids, staging)
        return
    _check(cache, block_ids, staging)
    from kernels.gpu import block_copy  # triton is there only where a GPU is

    block_copy.copy_blocks(cache, staging, block_ids, None)


def scatter_blocks_reference(staging: torch.Tensor, cache: torch.Tensor, block_ids: torch.Tensor) -> None:
    """Specification of `scatter_blocks`."""
    _check(cache, block_ids, staging)
    cache.index_copy_(0, block_ids.long(), staging)


def scatter_blocks(staging: torch.Tensor, cache: torch.Tensor, block_ids: torch.Tensor) -> None:
    """cache[block_ids[i]] = staging[i]: undoes `gather_blocks`."""
    if not cache.is_cuda:
        scatter_blocks_reference(staging, cache, block_ids)
        return
    _check(cache, block_ids, staging)
    from kernels.gpu import block_copy  # triton is there only where a GPU is

    block_copy.copy_blocks(staging, cache, None, block_ids)


def copy_blocks_reference(cache: torch.Tensor, source_ids: torch.Tensor, destination_ids: torch.Tensor) -> None:
    """Specification of `copy_blocks`."""
    _check(cache, source_ids, None)
    _check(cache, destination_ids, None)
    cache.index_copy_(0, destination_ids.long(), cache.index_select(0, source_ids))


def copy_blocks(cache: torch.Tensor, source_ids: torch.Tensor, destination_ids: torch.Tensor) -> None:
    """cache[destination_ids[i]] = cache[source_ids[i]]. No block may be both read and written."""
    if source_ids.shape != destination_ids.shape:
        raise ValueError(f"{len(source_ids)} source blocks for {len(destination_ids)} destinations")
    if not cache.is_cuda:
        copy_blocks_reference(cache, source_ids, destination_ids)
        return
    _check(cache, source_ids, None)
    _check(cache, destination_ids, None)
    from kernels.gpu import block_copy  # triton is there only where a GPU is

    block_copy.copy_blocks(cache, cache, source_ids, destination_ids)


def _check(cache: torch.Tensor, block_ids: torch.Tensor, staging: torch.Tensor | None) -> None:
    if block_ids.dim() != 1 or block_ids.dtype not in (torch.int32, torch.int64) or block_ids.device != cache.device:
        raise ValueError(
            f"block ids must be a vector of int32 or int64 on {cache.device};"
            f" got {block_ids.dtype} {tuple(block_ids.shape)} on {block_ids.device}"
        )
    if not cache.is_contiguous():
        raise ValueError("the KV cache must be contiguous")
    if staging is None:
        return
    if staging.shape != (len(block_ids), *cache.shape[1:]) or staging.dtype != cache.dtype:
        raise ValueError(
            f"staging {staging.dtype} {tuple(staging.shape)} does not fit {len(block_ids)} blocks of"
            f" {cache.dtype} {tuple(cache.shape)}"
        )
    if staging.device != cache.device or not staging.is_contiguous():
        raise ValueError("staging must be contiguous and on the cache's device")
