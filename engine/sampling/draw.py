"""One token for each row, by inverting the distribution at a given uniform number.

A row's distribution is exp(logits / temperature) over the tokens that top-k, top-p and min-p keep, in this order. Tokens
are summed up in the order of their ids, in float64; the drawn token is the first whose sum exceeds uniform * total. What
is kept depends on values alone: tokens of equal logit stay or go together. So a row's token is a function of its
logits, parameters and uniform number, whatever else is in the batch.

A full sort of the vocabulary costs a hundred times more than finding its best few. Cuts are looked for among the best
tokens first; what was not found there is looked for among more. Both ways give the same token, to the last bit: tokens
that are not kept add exactly nothing to the sums.
"""

import math
from dataclasses import dataclass

import torch

_PREFIX_WIDTHS = (128, 4096)
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Cuts:
    """Of each row, which tokens are kept. 0, 1.0 and 0.0 keep all."""

    top_k: torch.Tensor  # [num_rows], int64
    top_p: torch.Tensor  # [num_rows], float64
    min_p: torch.Tensor  # [num_rows], float64

    def take(self, rows: torch.Tensor) -> "Cuts":
        return Cuts(self.top_k[rows], self.top_p[rows], self.min_p[rows])

    @property
    def ranked(self) -> torch.Tensor:
        """[num_rows]: whether the row's cut is defined by the order of its tokens."""
        return (self.top_k > 0) | (self.top_p < 1.0)


def draw(logits: torch.Tensor, temperatures: torch.Tensor, cuts: Cuts, uniforms: torch.Tensor) -> torch.Tensor:
    """Tokens, [num_rows] int64. `logits` ([num_rows, vocab_size], float32, finite or -inf) is overwritten.

    temperatures [num_rows] float32, positive; uniforms [num_rows] float64 in [0, 1).
    """
    # The maximum goes first: it makes the largest exponential 1, and no temperature is small enough to overflow.
    scores = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperatures[:, None])
    tokens = torch.empty(scores.shape[0], dtype=torch.int64, device=scores.device)
    mass = _mass(scores) if bool((cuts.top_p < 1.0).any()) else torch.ones_like(uniforms)
    is_cut = cuts.ranked | (cuts.min_p > 0.0)
    pending, uncut = is_cut.nonzero().squeeze(1), (~is_cut).nonzero().squeeze(1)
    for width in _PREFIX_WIDTHS:
        if not len(pending):
            break
        part = scores if len(pending) == len(scores) else scores[pending]
        best, token_ids = part.topk(min(width, part.shape[1]), dim=-1)
        floors, found = _floors(best, mass[pending], cuts.take(pending), part.shape[1])
        chosen = _invert(best, token_ids, floors, uniforms[pending])
        tokens[pending[found]] = chosen[found]
        pending = pending[~found]
    rest = torch.cat((uncut, pending))
    if len(rest):
        part = scores if len(rest) == len(scores) else scores[rest]
        floors = _exhaustive_floors(part, mass[rest], cuts.take(rest))
        sums = part.masked_fill(part < floors[:, None], -math.inf).exp_().cumsum(dim=-1, dtype=torch.float64)
        tokens[rest] = _first_above(sums, uniforms[rest])
    return tokens


def _mass(scores: torch.Tensor) -> torch.Tensor:
    """Sum of exp(scores) of each row, [num_rows] float64, in an order that does not depend on the number of rows."""
    weights = scores.exp()
    even = weights.shape[1] // _CHUNK * _CHUNK
    chunks = weights[:, :even].reshape(len(weights), even // _CHUNK, _CHUNK).sum(dim=-1, dtype=torch.float64)
    return chunks.cumsum(dim=-1)[:, -1:].sum(dim=-1) + weights[:, even:].sum(dim=-1, dtype=torch.float64)


def _floors(best: torch.Tensor, mass: torch.Tensor, cuts: Cuts, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least score that each row keeps, and whether the best tokens, sorted, were enough to tell.

    best is [num_rows, width]. They are enough if a token beyond them can neither be kept nor change what is.
    """
    width = best.shape[1]
    kth = best.gather(1, (cuts.top_k.clamp(1, width) - 1)[:, None])
    kth = kth.masked_fill_(cuts.top_k[:, None] == 0, -math.inf)
    sums = best.exp().masked_fill_(best < kth, 0.0).cumsum(dim=-1, dtype=torch.float64)
    kept_mass = torch.where(cuts.top_k > 0, sums[:, -1], mass)
    wanted = torch.where(cuts.top_p < 1.0, cuts.top_p * kept_mass, 0.0)
    reached = torch.searchsorted(sums, wanted[:, None])  # the first whose sum is at least what is wanted
    nucleus = best.gather(1, reached.clamp(max=width - 1))
    nucleus = nucleus.masked_fill_(cuts.top_p[:, None] >= 1.0, -math.inf)
    floors = torch.maximum(torch.maximum(kth, nucleus).squeeze(1), cuts.min_p.log().float())
    complete = (floors > best[:, -1]) | (width == vocab_size)
    return floors, complete & (reached.squeeze(1) < width) & (cuts.top_k <= width)


def _exhaustive_floors(scores: torch.Tensor, mass: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Like `_floors`, from the whole vocabulary; sorts only the rows that need it."""
    floors = cuts.min_p.log().float()
    ranked = cuts.ranked.nonzero().squeeze(1)
    if len(ranked):
        ordered = scores[ranked].sort(dim=-1, descending=True).values
        floors[ranked], _ = _floors(ordered, mass[ranked], cuts.take(ranked), scores.shape[1])
    return floors


def _invert(best: torch.Tensor, token_ids: torch.Tensor, floors: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw among the best tokens of each row alone."""
    token_ids, order = token_ids.sort(dim=-1)
    weights = best.exp().masked_fill_(best < floors[:, None], 0.0).gather(1, order)
    picked = _first_above(weights.cumsum(dim=-1, dtype=torch.float64), uniforms)
    return token_ids.gather(1, picked[:, None]).squeeze(1)


def _first_above(sums: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first position of each row whose running sum exceeds uniform * total. Its own weight is never zero."""
    total = sums[:, -1].contiguous()
    target = torch.minimum(uniforms * total, total.nextafter(torch.zeros_like(total)))  # the product may round up
    return torch.searchsorted(sums, target[:, None], right=True).squeeze(1)
