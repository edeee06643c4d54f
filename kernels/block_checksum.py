"""XXH3-64 of KV blocks: what a hand-off's reader compares with the sender's words."""

import torch
import xxhash

MIN_BLOCK_BYTES = 241
"""XXH3 hashes shorter inputs in other ways, which no KV block has any use for."""


def block_checksums_reference(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Specification of `block_checksums`."""
    _check(cache, block_ids)
    blocks = cache.view(len(cache), -1).view(torch.uint8)
    digests = [xxhash.xxh3_64_intdigest(blocks[block_id].cpu().numpy().data) for block_id in block_ids.tolist()]
    signed = [digest - (1 << 64) if digest >> 63 else digest for digest in digests]
    return torch.tensor(signed, dtype=torch.int64, device=cache.device)


def block_checksums(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """The XXH3-64 (seed 0) of each block's bytes, [len(block_ids)] int64: the unsigned number's 64 bits.

    cache is [num_blocks, ...] and contiguous; a block is what one index of its first dimension holds. `checksum & (1 << 63) - 1`
    of an element, as a Python int, is the number that hand-offs carry. On a GPU nothing is waited for. Raises
    ValueError where shapes do not fit, or a block has fewer than 241 bytes or, on a GPU, no multiple of 16.
    """
    if not cache.is_cuda:
        return block_checksums_reference(cache, block_ids)
    _check(cache, block_ids)
    from kernels.gpu import xxh3  # triton is there only where a GPU is

    return xxh3.block_checksums(cache, block_ids)


def _check(cache: torch.Tensor, block_ids: torch.Tensor) -> None:
    if not cache.is_contiguous():
        raise ValueError("the KV cache must be contiguous")
    if block_ids.dim() != 1 or block_ids.dtype not in (torch.int32, torch.int64) or block_ids.device != cache.device:
        raise ValueError(
            f"block ids must be a vector of int32 or int64 on {cache.device};"
            f" got {block_ids.dtype} {tuple(block_ids.shape)} on {block_ids.device}"
        )
    block_bytes = cache[0].numel() * cache.element_size()
    if block_bytes < MIN_BLOCK_BYTES:
        raise ValueError(f"a block must have at least {MIN_BLOCK_BYTES} bytes, not {block_bytes}")
