"""One tile of cached keys and values folded into a running softmax: the part that decode and prefill share.

The softmax is the online one (Milakov and Gimelshein, arXiv 1805.02867) in base 2, in float32: a row keeps the largest
score so far, the sum of 2 ** (score - largest) and the values weighted by the same, and rescales the latter two when a
larger score comes. Keys and values are read from a plane of the block-major cache (kv_cache.py) through a block table.
"""

import triton
import triton.language as tl


@triton.jit
def load_queries(
    query_ptr: tl.tensor,
    query_start: tl.tensor,
    query_len: tl.tensor,
    first_query: tl.tensor,
    kv_head: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tuple:
    """(rows of queries [ROWS, WIDTH], each one's index in its sequence, head, and whether there is such a one).

    GROUP heads that share a KV head stand in rows side by side, from query first_query on. Rows left over, where ROWS is
    no multiple of GROUP, are no queries, and are zeros like those past the sequence's last.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    index, head = first_query + rows // GROUP, kv_head * GROUP + rows % GROUP
    present = (index < query_len) & (rows < ROWS // GROUP * GROUP)
    offsets = (query_start + index).to(tl.int64) * token_stride + head * head_stride
    mask = present[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(query_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0), index, head, present


@triton.jit
def store_rows(
    target_ptr: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    present: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Store rows ([ROWS, WIDTH]) at places ([ROWS], int64) of a dense [..., HEAD_DIM] tensor, in its dtype."""
    columns = tl.arange(0, WIDTH)
    mask = present[:, None] & (columns < HEAD_DIM)[None, :]
    pointers = target_ptr + places[:, None] * HEAD_DIM + columns[None, :]
    tl.store(pointers, rows.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def token_offsets(
    table: tl.tensor,
    tile_start: tl.tensor,
    context_len: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Where the tokens tile_start.. lie in a plane: int64 [TILE], in elements. tile_start is a multiple of TILE.

    64 bits, because a cache has more than 2**31 elements. No entry of the table beyond the context is read.
    """
    tokens = tile_start + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:  # the tile lies in one block: one id instead of TILE
        blocks = tl.load(table + tile_start // BLOCK_SIZE)
    else:
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < context_len, other=0)
    return blocks.to(tl.int64) * block_stride + (tokens % BLOCK_SIZE) * token_stride


@triton.jit
def load_rows(
    plane: tl.tensor,
    offsets: tl.tensor,
    present: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """[rows, WIDTH], zeros where a row is not present and from HEAD_DIM on. Without MASKED every row is present."""
    columns = tl.arange(0, WIDTH)
    pointers = plane + offsets[:, None] + columns[None, :]
    if MASKED:
        rows = tl.load(pointers, mask=present[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < WIDTH:
        rows = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def fold_tile(
    query: tl.tensor,
    positions: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    tile_start: tl.tensor,
    context_len: tl.tensor,
    window: tl.tensor,
    score_scale: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SLIDING: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """(largest, total, weighted) of the rows of query ([rows, WIDTH]) with the tokens tile_start.. of the sequence.

    Row r stands at positions[r] and sees the tokens up to there, with SLIDING the last `window` of them. Without MASKED
    every row sees the whole tile, and no comparison is made.
    """
    tokens = tile_start + tl.arange(0, TILE)
    offsets = token_offsets(table, tile_start, context_len, block_stride, token_stride, BLOCK_SIZE, TILE)
    key = load_rows(keys, offsets, tokens < context_len, HEAD_DIM, WIDTH, MASKED).to(query.dtype)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * score_scale
    if MASKED:
        visible = tokens[None, :] <= positions[:, None]
        if SLIDING:
            visible = visible & (tokens[None, :] > positions[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    reference = larger
    if MASKED:  # a row that has seen nothing yet: -inf - -inf would be NaN
        reference = tl.where(larger == float("-inf"), 0.0, larger)
    weights = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(largest - reference)
    value = load_rows(values, offsets, tokens < context_len, HEAD_DIM, WIDTH, MASKED).to(query.dtype)
    weighted = tl.dot(weights.to(query.dtype), value, weighted * shrink[:, None], input_precision="ieee")
    return larger, total * shrink + tl.sum(weights, 1), weighted
