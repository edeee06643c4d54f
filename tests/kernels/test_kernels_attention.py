"""Paged attention against an oracle in float64 that knows nothing of pages, and against its own reference."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kernels.attention_batch import AttentionBatch
from kernels.kv_cache import tile_pages, untile_pages
from kernels.paged_attention import paged_attention, paged_attention_reference

LAYER = 1
TOLERANCE = {  # absolute, for outputs of about 1; bf16 rounds keys, weights and outputs to 8 bits
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
# (query_len, context_len): decode rows, prefill from nothing, chunks after a cached prefix, an idle sequence
MIXED = [(1, 1), (17, 17), (1, 130), (3, 64), (100, 233), (0, 5), (1, 65), (70, 71)]


def make_case(
    lengths: list[tuple[int, int]],
    *,
    block_size: int = 16,
    num_kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
    """Query, cache and batch; blocks are scattered, and blocks of no sequence hold NaN."""
    torch.manual_seed(0)
    needed = [-(-context // block_size) for _, context in lengths]
    num_blocks = sum(needed) + 3
    free = torch.randperm(num_blocks).tolist()
    cache = torch.full((num_blocks, 3, 2, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    tables = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
    for sequence, ((_, context), count) in enumerate(zip(lengths, needed, strict=True)):
        blocks = [free.pop() for _ in range(count)]
        tables[sequence, :count] = torch.tensor(blocks, dtype=torch.int32)
        for index, block in enumerate(blocks):
            filled = min(block_size, context - index * block_size)  # what follows in the last block stays NaN
            cache[block, LAYER, :, :, :filled] = torch.randn(2, num_kv_heads, filled, head_dim).to(dtype)
    query_lens = torch.tensor([0] + [query for query, _ in lengths])
    batch = AttentionBatch(
        query_starts=query_lens.cumsum(0).to(torch.int32),
        context_lens=torch.tensor([context for _, context in lengths], dtype=torch.int32),
        block_tables=tables,
        max_query_len=max(query for query, _ in lengths),
        max_context_len=max(context for _, context in lengths),
    )
    query = torch.randn(int(query_lens.sum()), num_kv_heads * group, head_dim).to(dtype)
    return query, cache, batch


def oracle(
    query: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, scale: float, window: int = 0
) -> torch.Tensor:
    """Plain softmax attention in float64, one sequence and one full score matrix at a time."""
    rows = []
    group = query.shape[1] // cache.shape[3]
    for sequence in range(batch.num_seqs):
        start, end = batch.query_starts[sequence : sequence + 2].tolist()
        context = int(batch.context_lens[sequence])
        table = batch.block_tables[sequence, : -(-context // cache.shape[4])].long()
        keys, values = cache[table, LAYER].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
        q = query[start:end].double().transpose(0, 1)
        scores = q @ keys.repeat_interleave(group, 0).transpose(1, 2) * scale
        distance = torch.arange(context - (end - start), context)[:, None] - torch.arange(context)[None, :]
        hidden = (distance < 0) | (distance >= window if window else distance < 0)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        rows.append((weights @ values.repeat_interleave(group, 0)).transpose(0, 1))
    return torch.cat(rows)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
def test_mixed_batch(dtype: torch.dtype, window: int) -> None:
    query, cache, batch = make_case(MIXED, dtype=dtype)
    expected = oracle(query, cache, batch, 0.125, window)
    assert_close(paged_attention(query, cache, LAYER, batch, 0.125, window), expected, dtype)
    assert_close(paged_attention_reference(query, cache, LAYER, batch, 0.125, window), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [7, 16, 24, 40, 64, 128, 256])
@pytest.mark.parametrize("block_size", [8, 24, 128])
def test_head_and_block_sizes(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    query, cache, batch = make_case([(1, 33), (19, 140)], head_dim=head_dim, block_size=block_size, dtype=dtype)
    scale = head_dim**-0.5
    assert_close(paged_attention(query, cache, LAYER, batch, scale), oracle(query, cache, batch, scale), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 7, 13, 100])
def test_query_heads_per_kv_head(dtype: torch.dtype, group: int) -> None:
    query, cache, batch = make_case([(1, 50), (9, 20)], num_kv_heads=1, group=group, dtype=dtype)
    assert_close(paged_attention(query, cache, LAYER, batch, 0.125), oracle(query, cache, batch, 0.125), dtype)


@pytest.mark.parametrize("window", [0, 1, 5, 100])
def test_mixed_batch_over_tiled_pages(window: int) -> None:
    query, cache, batch = make_case(MIXED, dtype=torch.bfloat16)
    tiled, expected = tile_pages(cache), oracle(query, cache, batch, 0.125, window)
    for attend in (paged_attention, paged_attention_reference):
        assert_close(attend(query, tiled, LAYER, batch, 0.125, window, "bf16-tiled"), expected, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("group", [1, 5, 16])
def test_tiled_pages_of_many_sizes(head_dim: int, block_size: int, group: int) -> None:
    lengths = [(1, 33), (19, 140), (2, 128), (17, 17)]
    query, cache, batch = make_case(
        lengths, head_dim=head_dim, block_size=block_size, group=group, dtype=torch.bfloat16
    )
    scale = head_dim**-0.5
    actual = paged_attention(query, tile_pages(cache), LAYER, batch, scale, page_format="bf16-tiled")
    assert_close(actual, oracle(query, cache, batch, scale), torch.bfloat16)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("window", [0, 700])
def test_long_context_cut_into_spans(threads: int, window: int) -> None:
    query, cache, batch = make_case([(1, 1500), (4, 1031)], num_kv_heads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = paged_attention(query, cache, LAYER, batch, 0.125, window)
    finally:
        torch.set_num_threads(before)
    assert_close(actual, oracle(query, cache, batch, 0.125, window), torch.float32)


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("threads", [1, 3])
def test_decode_row_does_not_depend_on_its_company(window: int, threads: int) -> None:
    """Bitwise: alone, among others, and with drafts behind it."""
    query, cache, batch = make_case([(1, 700), (8, 300), (40, 40), (1, 1)], dtype=torch.bfloat16)
    tiled = tile_pages(cache)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = paged_attention(query, tiled, LAYER, batch, 0.125, window, "bf16-tiled")
        for sequence, row, context in [(0, 0, 700), (1, 1, 293), (1, 5, 297), (1, 8, 300), (3, 49, 1)]:
            alone = AttentionBatch(
                torch.tensor([0, 1], dtype=torch.int32),
                torch.tensor([context], dtype=torch.int32),
                batch.block_tables[sequence : sequence + 1].contiguous(),
                1,
                context,
            )
            single = paged_attention(query[row : row + 1], tiled, LAYER, alone, 0.125, window, "bf16-tiled")
            assert torch.equal(single[0], together[row])
    finally:
        torch.set_num_threads(before)


def test_tiling_is_undone_by_untiling() -> None:
    pages = torch.arange(3 * 2 * 2 * 32 * 48).to(torch.int16).view(torch.bfloat16).view(3, 2, 2, 32, 48)
    tiled = tile_pages(pages)
    assert torch.equal(untile_pages(tiled).view(torch.int16), pages.view(torch.int16))
    keys, values = tiled[1, 0, 1].flatten(), tiled[1, 1, 1].flatten()
    token, dim = 21, 7
    assert torch.equal(keys[(1 * 24 + 3) * 32 + 5 * 2 + 1], pages[1, 0, 1, token, dim])
    assert torch.equal(values[(10 * 48 + 7) * 2 + 1], pages[1, 1, 1, token, dim])


def test_chunked_prefill_equals_whole_prefill() -> None:
    query, cache, whole = make_case([(90, 90)])
    expected = paged_attention(query, cache, LAYER, whole, 0.125)
    for start, end in [(0, 33), (33, 34), (34, 90)]:
        starts, context = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        chunk = AttentionBatch(starts, context, whole.block_tables, end - start, end)
        actual = paged_attention(query[start:end], cache, LAYER, chunk, 0.125)
        torch.testing.assert_close(actual, expected[start:end], atol=1e-5, rtol=1e-5)


def test_query_may_be_a_slice_and_cache_a_view() -> None:
    query, cache, batch = make_case([(1, 20), (5, 40)])
    fused = torch.cat((query.flatten(1), torch.randn(query.shape[0], 10)), dim=1)
    sliced = fused[:, : query[0].numel()].view(query.shape)
    arena = torch.full((*cache.shape[:4], cache.shape[4] * 2, cache.shape[5]), float("nan"))
    arena[:, :, :, :, ::2] = cache
    actual = paged_attention(sliced, arena[:, :, :, :, ::2], LAYER, batch, 0.125)
    assert_close(actual, oracle(query, cache, batch, 0.125), torch.float32)


def test_large_scores_do_not_overflow() -> None:
    query, cache, batch = make_case([(3, 80)])
    actual = paged_attention(query * 1e3, cache, LAYER, batch, 1.0)
    torch.testing.assert_close(actual.double(), oracle(query * 1e3, cache, batch, 1.0), atol=1e-3, rtol=1e-3)


def test_empty_batch() -> None:
    query, cache, batch = make_case([(0, 5)])
    assert paged_attention(query, cache, LAYER, batch, 0.125).shape == query.shape


@pytest.mark.parametrize("attend", [paged_attention, paged_attention_reference])
def test_bad_batches_are_refused(attend: Callable[..., torch.Tensor]) -> None:
    query, cache, batch = make_case([(2, 40)])
    with pytest.raises(IndexError):
        attend(query, cache, LAYER, replace(batch, block_tables=torch.full_like(batch.block_tables, 1000)), 1.0)
    with pytest.raises(ValueError, match="do not fit together"):
        attend(query, cache, LAYER, replace(batch, context_lens=torch.tensor([1], dtype=torch.int32)), 1.0)
    with pytest.raises(ValueError, match="do not fit together"):
        attend(query, cache, LAYER, replace(batch, block_tables=batch.block_tables[:, :2].contiguous()), 1.0)
    with pytest.raises(ValueError, match="do not fit together"):
        attend(query[:1], cache, LAYER, batch, 1.0)


def test_shapes_are_checked() -> None:
    query, cache, batch = make_case([(2, 40)])
    with pytest.raises(ValueError, match="layer 3"):
        paged_attention(query, cache, 3, batch, 1.0)
    with pytest.raises(ValueError, match="does not fit cache"):
        paged_attention(query[..., :32], cache, LAYER, batch, 1.0)
    with pytest.raises(ValueError, match="sliding_window"):
        paged_attention(query, cache, LAYER, batch, 1.0, -1)
    with pytest.raises(ValueError, match="cannot be bf16-tiled"):
        paged_attention(query, cache, LAYER, batch, 1.0, page_format="bf16-tiled")
    with pytest.raises(ValueError, match="int32"):
        AttentionBatch(batch.query_starts.long(), batch.context_lens, batch.block_tables, 2, 40)
    with pytest.raises(ValueError, match="one entry more"):
        AttentionBatch(batch.query_starts[:1], batch.context_lens, batch.block_tables, 2, 40)
