"""Paged attention on a GPU: sends the sequences of a batch to the kernel that is made for them."""

import torch

from kernels.attention_batch import AttentionBatch
from kernels.gpu.device import next_power_of_two
from kernels.gpu.paged_decode import paged_decode
from kernels.gpu.paged_prefill import paged_prefill
from kernels.kv_scales import UNSCALED, KVScales

_FEW_QUERIES = 8
_FEW_ROWS = 64
"""With no more query tokens for any sequence (decode, drafts of speculation), and no more rows when they are multiplied with
the heads of a group, the whole batch goes to the split kernel."""

_SHARED_ROWS = 16
"""Rows that the smallest matrix product has room for: in a larger batch, the split kernel takes the sequences with no more,
since rows beyond would slow down those with one token."""


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int = 0,
    scales: KVScales = UNSCALED,
) -> torch.Tensor:
    """`kernels.paged_attention.paged_attention`, checked there. Reads no tensor on the host and waits for nothing.

    A sequence of context 0 gets zeros. A block id outside the cache is not noticed. Query must be dense in head_dim.
    """
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not query.numel():
        return output
    few = _few_queries(batch, query.shape[1] // kv_cache.shape[3])
    if few:
        paged_decode(query, kv_cache, layer, batch, scale, sliding_window, scales, output, few)
    if batch.max_query_len > few:
        paged_prefill(query, kv_cache, layer, batch, scale, sliding_window, scales, output, few + 1)
    return output


def _few_queries(batch: AttentionBatch, group: int) -> int:
    """Sequences with 1 to this many query tokens go to the split kernel; 0 where the batch cannot have one.

    A kernel is compiled for each answer: they are few.
    """
    rounded = next_power_of_two(max(batch.max_query_len, 1))
    if rounded == 1 or (rounded <= _FEW_QUERIES and rounded * group <= _FEW_ROWS):
        return rounded
    return max(1, _SHARED_ROWS // group) if batch.num_seqs > 1 else 0
