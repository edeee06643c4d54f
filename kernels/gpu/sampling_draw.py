"""Draws one token for each row of logits by inverting its distribution, a program a row, with nothing asked by the host.

The distribution is that of kernels.sampling: exp(scores), scores being (logits - largest) / temperature, over the tokens
that top-k, top-p and min-p keep, weights whole numbers up to 2**30 so that their sums are exact. Nothing is sorted:

- Scores are never positive, so a score's rank is its *magnitude*: the bits of its absolute value, as an integer. 0 is the
  likeliest token, more is less likely, and "the k-th largest score" or "the least score whose nucleus has this mass" is the
  least magnitude at which a sum that only grows reaches a number: 31 steps of bisection.
- Each step would read the whole row. Instead one pass over the row in groups finds a magnitude that at least a quarter of
  TILE tokens reach, a second gathers those tokens in the order of their ids, and bisection and draw work on
  them, in registers. Where a cut lies beyond them (a top-k of thousands, a nucleus of a flat distribution) the passes over
  the row do happen: correct, and slow.

Weights come from an exponential of additions and multiplications alone, compiled without fused multiply-add: the
interpreter and every GPU get the same bits. Other libraries' exponentials differ in the last place now and then, which moves a
draw only where the uniform number falls within 2**-24 of a token's edge.
"""

import triton
import triton.language as tl

_INFINITE = tl.constexpr(0x7F800000)
"""The magnitude of a score of -inf."""
_BEYOND = tl.constexpr(0x7FFFFFFF)
"""The magnitude of no score."""
_THIRTY = tl.constexpr(0x41F00000)
"""The magnitude of a score of -30."""
_QUARTER = tl.constexpr(4)


@triton.jit
def _weights(magnitudes: tl.tensor) -> tl.tensor:
    """floor(2**30 * exp(score)), int32, exact but for the exponential's last place."""
    score = -tl.minimum(magnitudes, _THIRTY).to(tl.float32, bitcast=True)  # exp(-30) * 2**30 is already below 1
    power = tl.floor(score * 1.4426950408889634 + 0.5)
    # log(2) in two parts, the first with few bits, so that its product with `power` is exact.
    rest = (score - power * 0.693359375) - power * -2.1219444005469057e-4  # at most log(2) / 2 either way
    series = 1.0 + rest * (1.0 / 7.0)  # exp's power series up to rest**7 / 7!
    series = 1.0 + rest * series * (1.0 / 6.0)
    series = 1.0 + rest * series * (1.0 / 5.0)
    series = 1.0 + rest * series * (1.0 / 4.0)
    series = 1.0 + rest * series * (1.0 / 3.0)
    series = 1.0 + rest * series * (1.0 / 2.0)
    series = 1.0 + rest * series
    factor = ((power.to(tl.int32) + (127 + 30)) << 23).to(tl.float32, bitcast=True)
    return (series * factor).to(tl.int32)


@triton.jit
def _tile(
    source_ptr: tl.tensor,
    start: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The magnitudes of TILE tokens; infinite beyond the vocabulary."""
    token_ids = start + tl.arange(0, TILE)
    logits = tl.load(source_ptr + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
    return tl.div_rn(logits - best, temperature).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _row_sum(
    source_ptr: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    most: tl.tensor,
    WEIGH: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """int64: the row's tokens up to magnitude `most`, counted or weighed."""
    sums = tl.zeros((TILE,), tl.int64)
    for start in range(0, vocab_size, TILE):
        magnitudes = _tile(source_ptr, start, vocab_size, best, temperature, TILE)
        amounts = _weights(magnitudes) if WEIGH else tl.full((TILE,), 1, tl.int32)
        sums += tl.where(magnitudes <= most, amounts, 0)
    return tl.sum(sums)


@triton.jit
def _least_in_row(
    source_ptr: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    wanted: tl.tensor,
    high: tl.tensor,
    WEIGH: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The least magnitude, up to high, that as many tokens (or as much weight) of the row reach as wanted."""
    low = high * 0
    while low < high:
        middle = low + ((high - low) >> 1)
        if _row_sum(source_ptr, vocab_size, best, temperature, middle, WEIGH, TILE) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _least(magnitudes: tl.tensor, amounts: tl.tensor, wanted: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The same of tokens in registers; amounts are int64."""
    low = high * 0
    while low < high:
        middle = low + ((high - low) >> 1)
        if tl.sum(tl.where(magnitudes <= middle, amounts, 0)) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _mix(state: tl.tensor) -> tl.tensor:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def _target(seed: tl.tensor, position: tl.tensor, total: tl.tensor) -> tl.tensor:
    """floor(uniform * total), int64, below total; engine.sampling.randomness has the uniform number's formula."""
    key = _mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    bits = _mix(key + (position + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15) >> 11
    uniform = bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2**-53
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _draw_in_row(
    source_ptr: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    most: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """A token up to magnitude `most`, from two passes over the row: their weight, and where it passes the target."""
    target = _target(seed, position, _row_sum(source_ptr, vocab_size, best, temperature, most, True, TILE))
    before = target * 0
    token = before
    for start in range(0, vocab_size, TILE):
        magnitudes = _tile(source_ptr, start, vocab_size, best, temperature, TILE)
        weights = tl.where(magnitudes <= most, _weights(magnitudes), 0).to(tl.int64)
        after = before + tl.sum(weights)
        if (before <= target) & (target < after):
            token = start + tl.sum((before + tl.cumsum(weights) <= target).to(tl.int64))
        before = after
    return token


@triton.jit
def _gather_likeliest(
    source_ptr: tl.tensor,
    candidates_ptr: tl.tensor,  # int32, [2, TILE]: magnitudes, token ids
    vocab_size: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """(magnitude up to which tokens were gathered, how many there are, the row's weight). More than TILE do not fit."""
    limit = tl.full((), _BEYOND, tl.int32)
    if vocab_size > TILE:
        groups = tl.full((TILE,), _BEYOND, tl.int32)
        for start in range(0, vocab_size, TILE):
            groups = tl.minimum(groups, _tile(source_ptr, start, vocab_size, best, temperature, TILE))
        limit = _least(groups, tl.full((TILE,), 1, tl.int64), TILE // _QUARTER, tl.full((), _INFINITE, tl.int32))
    count = tl.zeros((), tl.int32)
    mass = tl.zeros((TILE,), tl.int64)
    for start in range(0, vocab_size, TILE):
        magnitudes = _tile(source_ptr, start, vocab_size, best, temperature, TILE)
        token_ids = start + tl.arange(0, TILE)
        mass += _weights(magnitudes)
        kept = tl.where(token_ids < vocab_size, magnitudes, _BEYOND) <= tl.minimum(limit, _INFINITE)
        places = count + tl.cumsum(kept.to(tl.int32)) - 1
        fits = tl.where(kept, places, TILE) < TILE
        tl.store(candidates_ptr + places, magnitudes, mask=fits)
        tl.store(candidates_ptr + TILE + places, token_ids, mask=fits)
        count += tl.sum(kept.to(tl.int32))
    tl.debug_barrier()  # a thread goes on with what others have stored
    return limit, count, tl.sum(mass)


@triton.jit
def _draw_cut(
    source_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_score: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """A token of those that top-k, then top-p, then min-p keep."""
    limit, count, mass = _gather_likeliest(source_ptr, candidates_ptr, vocab_size, best, temperature, TILE)
    held = tl.minimum(count, TILE) * (count <= TILE).to(
        tl.int32
    )  # tokens in registers: all that were gathered, or none
    lanes = tl.arange(0, TILE)
    magnitudes = tl.load(candidates_ptr + lanes, mask=lanes < held, other=_BEYOND)
    weights = tl.where(lanes < held, _weights(magnitudes), 0).to(tl.int64)
    most = tl.full((), _INFINITE, tl.int32)
    if (top_k > 0) & (top_k < vocab_size):
        if top_k <= held:
            most = _least(magnitudes, tl.full((TILE,), 1, tl.int64), top_k, most)
        else:
            most = _least_in_row(source_ptr, vocab_size, best, temperature, top_k, most, False, TILE)
    if top_p < 1.0:
        held_mass = tl.sum(tl.where(magnitudes <= most, weights, 0))
        if most < _INFINITE:
            mass = held_mass
            if (most > limit) | (held == 0):
                mass = _row_sum(source_ptr, vocab_size, best, temperature, most, True, TILE)
        wanted = tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64)
        if held_mass >= wanted:
            most = _least(magnitudes, weights, wanted, most)
        else:
            most = _least_in_row(source_ptr, vocab_size, best, temperature, wanted, most, True, TILE)
    most = tl.minimum(most, min_score.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if (most <= limit) & (held > 0):
        weights = tl.where(magnitudes <= most, weights, 0)
        place = tl.sum((tl.cumsum(weights) <= _target(seed, position, tl.sum(weights))).to(tl.int32))
        token = tl.load(candidates_ptr + TILE + place).to(tl.int64)
    else:
        token = _draw_in_row(source_ptr, vocab_size, best, temperature, most, seed, position, TILE)
    return token


@triton.jit
def draw_kernel(
    logits_ptr: tl.tensor,  # float32, [num_rows, vocab_size]
    adjusted_ptr: tl.tensor,  # float32, [num_rows, vocab_size], of rows that adjust theirs
    rows_ptr: tl.tensor,  # int64
    positions_ptr: tl.tensor,  # int64
    temperatures_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_scores_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    adjusts_ptr: tl.tensor,
    candidates_ptr: tl.tensor,  # int32, [num_rows, 2, TILE]
    token_ids_ptr: tl.tensor,  # int64, [num_rows]
    finite_ptr: tl.tensor,  # uint8, [num_rows]
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Program: one row of the logits."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    adjusts = tl.load(adjusts_ptr + row)
    raw_ptr = logits_ptr + place * logits_stride
    source_ptr = raw_ptr
    if adjusts != 0:
        source_ptr = adjusted_ptr + place * vocab_size
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    largest_ids, damaged = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)
    for start in range(0, vocab_size, TILE):
        token_ids = start + tl.arange(0, TILE)
        raw = tl.load(raw_ptr + token_ids, mask=token_ids < vocab_size, other=0.0)
        damaged |= ((raw.to(tl.int32, bitcast=True) & _INFINITE) == _INFINITE).to(tl.int32)
        logits = tl.load(source_ptr + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
        better = logits > largest
        largest = tl.where(better, logits, largest)
        largest_ids = tl.where(better, token_ids, largest_ids)
    best = tl.max(largest)
    finite = (tl.max(damaged) == 0).to(tl.int32)
    token = tl.min(tl.where(largest == best, largest_ids, vocab_size)).to(tl.int64) * finite
    temperature = tl.load(temperatures_ptr + row)
    if (finite > 0) & (temperature > 0.0) & (best > float("-inf")):
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        min_score, seed = tl.load(min_scores_ptr + row), tl.load(seeds_ptr + row)
        position = tl.load(positions_ptr + place)
        if (top_k > 0) | (top_p < 1.0) | (min_score > float("-inf")):
            token = _draw_cut(
                source_ptr, candidates_ptr + place * 2 * TILE, vocab_size, best, temperature,
                top_k, top_p, min_score, seed, position, TILE,
            )  # fmt: skip
        else:
            everything = tl.full((), _INFINITE, tl.int32)
            token = _draw_in_row(source_ptr, vocab_size, best, temperature, everything, seed, position, TILE)
    tl.store(token_ids_ptr + place, token)
    tl.store(finite_ptr + place, finite.to(tl.uint8))
