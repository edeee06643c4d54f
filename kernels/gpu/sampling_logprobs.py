"""Log-probabilities of the drawn tokens and of each row's best, for the rows that want them.

Each lane keeps the best token of its own share of the vocabulary, as one integer that orders by logit, then by the lower
id. The best of all lanes is the next alternative; its lane alone then looks for its next best. So the row is read twice,
and then a LANES-th of it for each alternative.
"""

import triton
import triton.language as tl

_NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _packed(logits: tl.tensor, token_ids: tl.tensor) -> tl.tensor:
    """int64, greater for a greater logit, then for a lower id."""
    bits = logits.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, floats below zero are in reverse
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - token_ids)


@triton.jit
def logprobs_kernel(
    logits_ptr: tl.tensor,  # float32, [num_rows, vocab_size]
    rows_ptr: tl.tensor,  # int64
    num_logprobs_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,  # int64, [num_rows]
    logprobs_ptr: tl.tensor,  # float32, [num_rows]
    top_ids_ptr: tl.tensor,  # int32, [num_rows, max_top]
    top_logprobs_ptr: tl.tensor,  # float32, [num_rows, max_top]
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    max_top: tl.tensor,
    LANES: tl.constexpr,
    SHARE: tl.constexpr,
) -> None:
    """Program: one row of the logits. LANES * SHARE covers the vocabulary."""
    place = tl.program_id(0).to(tl.int64)
    wanted = tl.load(num_logprobs_ptr + tl.load(rows_ptr + place))
    if wanted < 0:
        return
    row_ptr = logits_ptr + place * logits_stride
    lanes = tl.arange(0, LANES)
    bests = tl.full((LANES,), _NOTHING, tl.int64)
    largest = tl.full((LANES,), float("-inf"), tl.float32)
    for start in range(0, vocab_size, LANES):
        token_ids = start + lanes
        logits = tl.load(row_ptr + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
        largest = tl.maximum(largest, logits)
        bests = tl.maximum(bests, tl.where(token_ids < vocab_size, _packed(logits, token_ids), _NOTHING))
    best = tl.max(largest)
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab_size, LANES):
        token_ids = start + lanes
        logits = tl.load(row_ptr + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
        sums += tl.exp(logits - best)
    normaliser = best + tl.log(tl.sum(sums))
    tl.store(logprobs_ptr + place, tl.load(row_ptr + tl.load(token_ids_ptr + place)) - normaliser)
    members = tl.arange(0, SHARE) * LANES
    for alternative in range(0, tl.minimum(wanted, tl.minimum(max_top, vocab_size))):
        top = tl.max(bests)
        token_id = 0x7FFFFFFF - (top & 0xFFFFFFFF)
        tl.store(top_ids_ptr + place * max_top + alternative, token_id.to(tl.int32))
        tl.store(top_logprobs_ptr + place * max_top + alternative, tl.load(row_ptr + token_id) - normaliser)
        lane = (token_id % LANES).to(tl.int32)
        others = lane + members
        logits = tl.load(row_ptr + others, mask=others < vocab_size, other=float("-inf"))
        packed = tl.where(others < vocab_size, _packed(logits, others), _NOTHING)
        bests = tl.where(lanes == lane, tl.max(tl.where(packed < top, packed, _NOTHING)), bests)
