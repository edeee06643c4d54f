"""One token for each row, by inverting the distribution at a given uniform number.

A row's distribution is exp(logits / temperature) over the tokens that top-k, top-p and min-p keep, in this order. Tokens
are summed up in the order of their ids; the drawn token is the first whose sum exceeds uniform * total. So a row's token
is a function of its logits, parameters and uniform number, whatever else is in the batch:

- what is kept depends on values alone: tokens of equal logit stay or go together;
- weights are whole numbers, the likeliest token's being 2**30, so that float64 sums are exact in whatever order they are
  taken. A token 2**30 times less likely than the likeliest is never drawn.

A full sort of the vocabulary costs several times more than finding its best few. The reference looks for cuts among the
best tokens first; C++ (native/draw.cpp) needs no sort at all. The two may differ in the last bit of an exponential, and
so, once in many millions of draws, in a token.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from kernels import native_library

_LIKELIEST = 2.0**30
_PREFIX_WIDTH = 128
_MAX_CHUNK = 64
_ELEMENTS_AT_ONCE_ON_CPU = 1 << 19


@dataclass(frozen=True, slots=True)
class Cuts:
    """Of each row, which tokens are kept. 0, 1.0 and 0.0 keep all. The tensors are contiguous."""

    top_k: torch.Tensor  # [num_rows], int64
    top_p: torch.Tensor  # [num_rows], float64
    min_p: torch.Tensor  # [num_rows], float64

    def __post_init__(self) -> None:
        dtypes = (self.top_k.dtype, self.top_p.dtype, self.min_p.dtype)
        if dtypes != (torch.int64, torch.float64, torch.float64):
            raise ValueError(f"cuts are int64, float64 and float64, not {dtypes}")

    def take(self, rows: torch.Tensor | slice) -> "Cuts":
        return Cuts(self.top_k[rows], self.top_p[rows], self.min_p[rows])

    @property
    def any(self) -> torch.Tensor:
        """[num_rows]: whether the row is cut at all."""
        return (self.top_k > 0) | (self.top_p < 1.0) | (self.min_p > 0.0)


def draw(logits: torch.Tensor, temperatures: torch.Tensor, cuts: Cuts, uniforms: torch.Tensor) -> torch.Tensor:
    """Tokens, [num_rows] int64. `logits` ([num_rows, vocab_size], float32, finite or -inf) may be overwritten.

    temperatures [num_rows] float32, positive; uniforms [num_rows] float64 in [0, 1). A row of nothing but -inf draws
    token 0. Raises ValueError for other dtypes.
    """
    if (logits.dtype, temperatures.dtype, uniforms.dtype) != (torch.float32, torch.float32, torch.float64):
        raise ValueError(
            f"draw takes float32, float32 and float64, not {logits.dtype}, {temperatures.dtype}, {uniforms.dtype}"
        )
    native = native_library.function("draw", logits)
    if native is None:
        return draw_reference(logits, temperatures, cuts, uniforms)
    logits, temperatures, uniforms = logits.contiguous(), temperatures.contiguous(), uniforms.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64)
    native(
        *(logits.data_ptr(), temperatures.data_ptr()),
        *(cuts.top_k.data_ptr(), cuts.top_p.data_ptr(), cuts.min_p.data_ptr()),
        *(uniforms.data_ptr(), tokens.data_ptr(), *logits.shape, torch.get_num_threads()),
    )
    return tokens


def draw_reference(
    logits: torch.Tensor, temperatures: torch.Tensor, cuts: Cuts, uniforms: torch.Tensor
) -> torch.Tensor:
    """Specification of `draw`; overwrites logits."""
    rows_at_once = max(1, _ELEMENTS_AT_ONCE_ON_CPU // logits.shape[1]) if logits.is_cpu else max(1, len(logits))
    groups = [slice(start, start + rows_at_once) for start in range(0, len(logits), rows_at_once)]
    return torch.cat(
        [_draw_group(logits[rows], temperatures[rows], cuts.take(rows), uniforms[rows]) for rows in groups]
    )


def _draw_group(logits: torch.Tensor, temperatures: torch.Tensor, cuts: Cuts, uniforms: torch.Tensor) -> torch.Tensor:
    """`draw` for a few rows: their working copies of the vocabulary stay in the caches."""
    # The maximum goes first: it makes the largest exponential 1, and no temperature is small enough to overflow.
    largest = logits.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)  # a row may be all -inf
    scores = logits.sub_(largest).div_(temperatures[:, None])
    weights = _weights(scores)
    mass = _chunks(weights).sum(dim=(1, 2), dtype=torch.float64)
    tokens = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
    is_cut = cuts.any
    pending = is_cut.nonzero().squeeze(1)
    if len(pending):
        best, token_ids = _rows(scores, pending).topk(min(_PREFIX_WIDTH, scores.shape[1]), dim=-1)
        floors, found = _floors(best, mass[pending], cuts.take(pending), scores.shape[1])
        found_rows = pending[found]
        tokens[found_rows] = _draw_among(best[found], token_ids[found], floors[found], uniforms[found_rows])
        pending = pending[~found]
    if len(pending):
        part = scores[pending]
        floors, _ = _floors(_sorted_descending(part), mass[pending], cuts.take(pending), scores.shape[1])
        weights[pending] = weights[pending].masked_fill_(part < floors[:, None], 0.0)
    rest = torch.cat(((~is_cut).nonzero().squeeze(1), pending)).sort().values
    if len(rest):
        tokens[rest] = _invert(_rows(weights, rest), uniforms[rest])
    return tokens


def _rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The given rows, which are distinct and, where they are all of them, in order; then without a copy."""
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _weights(scores: torch.Tensor) -> torch.Tensor:
    """Whole numbers in proportion to exp(scores); scores are at most 0."""
    return scores.exp().mul_(_LIKELIEST).floor_()


def _chunks(weights: torch.Tensor) -> torch.Tensor:
    """[num_rows, width] as [num_rows, num_chunks, chunk], all chunks of one size."""
    num_rows, width = weights.shape
    chunk = math.gcd(width, _MAX_CHUNK)
    return weights.view(num_rows, width // chunk, chunk)


def _floors(best: torch.Tensor, mass: torch.Tensor, cuts: Cuts, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least score that each row keeps, and whether its best tokens, sorted, were enough to tell.

    best is [num_rows, width]; they are enough if a token beyond them can neither be kept nor change what is.
    """
    width = best.shape[1]
    kth = best.gather(1, (cuts.top_k.clamp(1, width) - 1)[:, None])
    kth = kth.masked_fill_(cuts.top_k[:, None] == 0, -math.inf)
    sums = _weights(best).masked_fill_(best < kth, 0.0).cumsum(dim=-1, dtype=torch.float64)
    kept_mass = torch.where(cuts.top_k > 0, sums[:, -1], mass)
    wanted = torch.where(cuts.top_p < 1.0, cuts.top_p * kept_mass, 0.0)
    reached = torch.searchsorted(sums, wanted[:, None])  # the first whose sum is at least what is wanted
    nucleus = best.gather(1, reached.clamp(max=width - 1))
    nucleus = nucleus.masked_fill_(cuts.top_p[:, None] >= 1.0, -math.inf)
    floors = torch.maximum(torch.maximum(kth, nucleus).squeeze(1), cuts.min_p.log().float())
    last = best[:, -1]
    all_kept = (cuts.top_k == 0) | (
        (cuts.top_k <= width) & (kth.squeeze(1) > last)
    )  # ties of the kth beyond would count
    enough = (floors > last) & all_kept & (reached.squeeze(1) < width)
    return floors, enough | (width == vocab_size)


def _sorted_descending(scores: torch.Tensor) -> torch.Tensor:
    """Each row sorted. numpy sorts float32 ten times faster than torch, on a CPU."""
    if not scores.is_cpu:
        return scores.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)


def _draw_among(
    best: torch.Tensor, token_ids: torch.Tensor, floors: torch.Tensor, uniforms: torch.Tensor
) -> torch.Tensor:
    """Draw among the best tokens of each row alone, in the order of their ids."""
    token_ids, order = token_ids.sort(dim=-1)
    weights = _weights(best).masked_fill_(best < floors[:, None], 0.0).gather(1, order)
    return token_ids.gather(1, _invert(weights, uniforms)[:, None]).squeeze(1)


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first position of each row whose running sum exceeds uniform * total: first its chunk, then its place there."""
    rows = torch.arange(len(weights), device=weights.device)
    chunks = _chunks(weights)
    ends = chunks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = ends[:, -1]
    target = torch.minimum((uniforms * total).floor_(), total - 1.0)[:, None]  # the product may round up to the total
    chunk = torch.searchsorted(ends, target, right=True).squeeze(1)
    inside = chunks[rows, chunk].cumsum(dim=-1, dtype=torch.float64)
    inside += (ends[rows, chunk] - inside[:, -1])[:, None]
    return chunk * chunks.shape[2] + torch.searchsorted(inside, target, right=True).squeeze(1)
