"""Causal attention over the paged KV cache: decode rows and prefill chunks with cached prefixes, in one call.

The keys and values of this step must have been written (`write_kv`, `rope_and_write_kv`) before attention reads them.
Memory is linear in the context: scores exist for one block of queries at a time.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from kernels import native_library
from kernels.attention_batch import AttentionBatch
from kernels.kv_cache import PageFormat, check_cache, layer_pointer, native_view, untile_pages
from kernels.kv_scales import UNSCALED, KVScales
from kernels.kv_write import dense_heads

_REFERENCE_QUERY_BLOCK = 256  # queries scored at once; bounds the mask to this many rows


def _check(
    query: torch.Tensor, kv_cache: torch.Tensor, layer: int, sliding_window: int, page_format: PageFormat
) -> None:
    check_cache(kv_cache, layer, page_format)
    if query.dim() != 3 or query.shape[2] != kv_cache.shape[5] or query.shape[1] % kv_cache.shape[3]:
        raise ValueError(f"query {tuple(query.shape)} does not fit cache {tuple(kv_cache.shape)}")
    if sliding_window < 0:
        raise ValueError(f"sliding_window is {sliding_window}; 0 means none")


def _sequence_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sliding_window: int
) -> torch.Tensor:
    """One sequence: query [query_len, num_heads, head_dim], key and value [num_kv_heads, context_len, head_dim]."""
    query_len, context_len = query.shape[0], key.shape[1]
    positions = torch.arange(context_len, device=query.device)
    outputs = []
    for start in range(0, query_len, _REFERENCE_QUERY_BLOCK):
        rows = query[start : start + _REFERENCE_QUERY_BLOCK].transpose(0, 1)  # [num_heads, rows, head_dim]
        first = context_len - query_len + start  # the position of the first of these queries
        end = first + rows.shape[1]
        begin = max(0, first - sliding_window + 1) if sliding_window else 0
        distance = positions[first:end, None] - positions[None, begin:end]
        visible = distance >= 0
        if sliding_window:
            visible &= distance < sliding_window
        attended = F.scaled_dot_product_attention(
            rows.unsqueeze(0),
            key[:, begin:end].unsqueeze(0),
            value[:, begin:end].unsqueeze(0),
            attn_mask=visible,
            scale=scale,
            enable_gqa=rows.shape[0] != key.shape[0],
        )
        outputs.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def paged_attention_reference(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int = 0,
    page_format: PageFormat = "plain",
    scales: KVScales = UNSCALED,
) -> torch.Tensor:
    """Specification of `paged_attention`: each sequence's pages are gathered and handed to torch's own attention."""
    _check(query, kv_cache, layer, sliding_window, page_format)
    _, _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    starts, context_lens = batch.query_starts.tolist(), batch.context_lens.tolist()
    if starts[-1] != query.shape[0] or any(
        context_len < end - start or context_len > batch.block_tables.shape[1] * block_size
        for context_len, (start, end) in zip(context_lens, pairwise(starts), strict=True)
    ):
        raise ValueError("query_starts, context_lens and block_tables do not fit together")
    for sequence, context_len in enumerate(context_lens):
        start, end = starts[sequence], starts[sequence + 1]
        if start == end:
            continue
        blocks = batch.block_tables[sequence, : -(-context_len // block_size)]
        pages = kv_cache[:, layer].index_select(0, blocks)  # [blocks, 2, num_kv_heads, block_size, head_dim]
        if page_format == "bf16-tiled":
            pages = untile_pages(pages)
        flat = pages.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :context_len].to(query.dtype)
        attended = _sequence_attention(query[start:end], flat[0], flat[1], scale * scales.key, sliding_window)
        output[start:end] = attended * scales.value
    return output


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int = 0,
    page_format: PageFormat = "plain",
    scales: KVScales = UNSCALED,
) -> torch.Tensor:
    """Attend query ([num_tokens, num_heads, head_dim]) to one layer of the cache; returns the same shape, contiguous.

    num_heads is any multiple of the cache's num_kv_heads; query head h reads KV head h // (num_heads / num_kv_heads).
    `sliding_window` w > 0 lets a query see its own position and the w - 1 before it; 0 means no window.
    Raises ValueError where shapes disagree or a context is shorter than its query, IndexError for a block id outside
    the cache; on a GPU the values of tensors are not looked at.
    """
    if query.is_cuda:
        from kernels.gpu import paged_attention as gpu  # needs Triton, which a machine without a GPU need not have

        _check(query, kv_cache, layer, sliding_window, page_format)
        return gpu.paged_attention(dense_heads(query), kv_cache, layer, batch, scale, sliding_window, scales)
    native = native_library.function("paged_attention", query)
    whole_words = query.shape[-1] * query.element_size() % native_library.WORD_BYTES == 0
    if native is None or not whole_words or kv_cache.dtype != query.dtype or scales != UNSCALED:
        return paged_attention_reference(query, kv_cache, layer, batch, scale, sliding_window, page_format, scales)
    _check(query, kv_cache, layer, sliding_window, page_format)
    query = dense_heads(query)
    num_tokens, num_heads, head_dim = query.shape
    output = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype)
    status = native(
        *(query.data_ptr(), layer_pointer(kv_cache, layer), output.data_ptr()),
        *(batch.query_starts.data_ptr(), batch.context_lens.data_ptr(), batch.block_tables.data_ptr()),
        *(batch.num_seqs, num_tokens, batch.block_tables.shape[1], num_heads, query.stride(0)),
        *(scale, sliding_window, native_view(kv_cache, page_format), torch.get_num_threads()),
    )
    native_library.raise_for_status(status)
    return output
