"""What is done to the logits before a token is chosen: logit bias, minimum length, penalties, in this order.

Rows that have any of these get adjusted logits of their own; for others no memory is touched, so that the launches can
always be made. `penalise_kernel` writes a whole row with its penalties. Biases come before penalties, and change few
tokens: `apply_lists_kernel` computes those again, from the raw logits.
"""

import triton
import triton.language as tl

from kernels.sampling_tensors import HAS_LISTS, HAS_PENALTIES

_HAS_LISTS, _HAS_PENALTIES = tl.constexpr(HAS_LISTS), tl.constexpr(HAS_PENALTIES)


@triton.jit
def _penalised(logits: tl.tensor, observed: tl.tensor, penalties_ptr: tl.tensor) -> tl.tensor:
    """logits of tokens that were observed this often (2 * times in the output + 1 if in the prompt)."""
    repetition, presence = tl.load(penalties_ptr), tl.load(penalties_ptr + 1)
    times = (observed >> 1).to(tl.float32)
    repeated = tl.where(logits > 0.0, tl.div_rn(logits, repetition), logits * repetition)
    penalised = repeated - tl.load(penalties_ptr + 2) * times - tl.where(times > 0.0, presence, 0.0)
    return tl.where(observed != 0, penalised, logits)


@triton.jit
def penalise_kernel(
    logits_ptr: tl.tensor,  # float32, [num_rows, vocab_size]
    adjusted_ptr: tl.tensor,  # float32, [num_rows, vocab_size]
    rows_ptr: tl.tensor,  # int64
    adjusts_ptr: tl.tensor,
    penalties_ptr: tl.tensor,
    observed_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Program (row, tile): the logits with penalties, where the row adjusts its own at all."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    adjusts = tl.load(adjusts_ptr + row)
    if adjusts == 0:
        return
    token_ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = token_ids < vocab_size
    logits = tl.load(logits_ptr + place * logits_stride + token_ids, mask=mask, other=0.0)
    if (adjusts & _HAS_PENALTIES) > 0:
        observed = tl.load(observed_ptr + row * vocab_size + token_ids, mask=mask, other=0)
        logits = _penalised(logits, observed, penalties_ptr + row * 3)
    tl.store(adjusted_ptr + place * vocab_size + token_ids, logits, mask=mask)


@triton.jit
def apply_lists_kernel(
    logits_ptr: tl.tensor,  # float32, [num_rows, vocab_size]
    adjusted_ptr: tl.tensor,  # float32, [num_rows, vocab_size]
    rows_ptr: tl.tensor,  # int64
    positions_ptr: tl.tensor,  # int64
    adjusts_ptr: tl.tensor,
    penalties_ptr: tl.tensor,
    observed_ptr: tl.tensor,
    num_biases_ptr: tl.tensor,
    bias_token_ids_ptr: tl.tensor,
    biases_ptr: tl.tensor,
    min_tokens_ptr: tl.tensor,
    num_stops_ptr: tl.tensor,
    stop_token_ids_ptr: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    MAX_BIASES: tl.constexpr,
    MAX_STOPS: tl.constexpr,
) -> None:
    """Program: one row's biased tokens, then its stop tokens while the output is too short."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    adjusts = tl.load(adjusts_ptr + row)
    if (adjusts & _HAS_LISTS) == 0:
        return
    adjusted_row_ptr = adjusted_ptr + place * vocab_size
    index = tl.arange(0, MAX_BIASES)
    mask = index < tl.load(num_biases_ptr + row)
    token_ids = tl.load(bias_token_ids_ptr + row * MAX_BIASES + index, mask=mask, other=0)
    biased = tl.load(logits_ptr + place * logits_stride + token_ids, mask=mask, other=0.0)
    biased += tl.load(biases_ptr + row * MAX_BIASES + index, mask=mask, other=0.0)
    if (adjusts & _HAS_PENALTIES) > 0:
        observed = tl.load(observed_ptr + row * vocab_size + token_ids, mask=mask, other=0)
        biased = _penalised(biased, observed, penalties_ptr + row * 3)
    tl.store(adjusted_row_ptr + token_ids, biased, mask=mask)
    tl.debug_barrier()  # a stop token may have a bias, and then another thread has just stored it
    if tl.load(positions_ptr + place) < tl.load(min_tokens_ptr + row):
        stops = tl.arange(0, MAX_STOPS)
        early = stops < tl.load(num_stops_ptr + row)
        stop_ids = tl.load(stop_token_ids_ptr + row * MAX_STOPS + stops, mask=early, other=0)
        tl.store(adjusted_row_ptr + stop_ids, tl.full((MAX_STOPS,), float("-inf"), tl.float32), mask=early)
