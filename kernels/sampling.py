"""From a step's logits to its tokens without a word from the host: what decode graphs sample with.

Every row is a function of its logits, its parameters and (seed, output position): logit bias, minimum length, penalties,
temperature, top-k, top-p, min-p, draw, in this order, as in engine.sampling, whose tokens these are.

A row's distribution is exp(scores), scores being (logits - largest) / temperature, over the tokens that the cuts keep. Weights
are whole numbers, the likeliest token's being 2**30, so that sums are exact in any order; tokens of equal logit are
kept or cut together; the drawn token is the first in the order of ids whose running sum exceeds uniform * total.
"""

import torch

from kernels.sampling_tensors import HAS_PENALTIES, SampledRows, SamplingTensors

_LIKELIEST = 2.0**30


def sample_rows(
    logits: torch.Tensor,
    params: SamplingTensors,
    rows: torch.Tensor,
    positions: torch.Tensor,
    max_top: int,
) -> SampledRows:
    """One token for each row of logits ([num_rows, vocab_size], float32, rows dense; left as they are).

    rows ([num_rows], int64) are the rows of params; positions ([num_rows], int64) the output positions that are drawn for.
    At most max_top alternatives are found. What is drawn is not counted: SamplingTensors.observe_output does that. On a
    GPU nothing is waited for, and the call can be captured. Raises ValueError where shapes do not fit.
    """
    _check(logits, params, rows, positions)
    if not logits.is_cuda:
        return sample_rows_reference(logits, params, rows, positions, max_top)
    from kernels.gpu import sampling  # triton is there only where a GPU is

    return sampling.sample_rows(logits, params, rows, positions, max_top)


def sample_rows_reference(
    logits: torch.Tensor,
    params: SamplingTensors,
    rows: torch.Tensor,
    positions: torch.Tensor,
    max_top: int,
) -> SampledRows:
    """Specification of `sample_rows`. It sorts every row, and asks the device for nothing either."""
    finite = logits.isfinite().all(dim=-1)
    logits = torch.where(finite[:, None], logits, 0.0)
    adjusted = _adjusted(logits, params, rows, positions)
    temperatures = params.temperatures[rows]
    greedy = temperatures == 0.0
    scores = (adjusted - adjusted.amax(-1, keepdim=True)) / torch.where(greedy, 1.0, temperatures)[:, None]
    tokens = torch.where(greedy, adjusted.argmax(-1), _drawn(scores, params, rows, positions)) * finite
    normaliser = logits.logsumexp(-1, keepdim=True)
    top = logits.sort(dim=-1, descending=True, stable=True)
    width = min(max_top, logits.shape[1])
    return SampledRows(
        token_ids=tokens,
        finite=finite,
        logprobs=(logits.gather(1, tokens[:, None]) - normaliser).squeeze(1),
        top_ids=_widened(top.indices[:, :width].int(), max_top),
        top_logprobs=_widened(top.values[:, :width] - normaliser, max_top),
    )


def _adjusted(
    logits: torch.Tensor, params: SamplingTensors, rows: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Logit bias, minimum length, penalties. What a list does not use of its row goes to a column that is cut off."""
    num_rows, vocab_size = logits.shape
    wide = torch.cat((logits, logits.new_zeros(num_rows, 1)), dim=1)
    unused = torch.arange(params.biases.shape[1], device=logits.device) >= params.num_biases[rows][:, None]
    wide.scatter_add_(1, params.bias_token_ids[rows].long().masked_fill(unused, vocab_size), params.biases[rows])
    early = positions < params.min_tokens[rows]
    num_stops = torch.where(early, params.num_stops[rows], 0)
    unused = torch.arange(params.stop_token_ids.shape[1], device=logits.device) >= num_stops[:, None]
    wide.scatter_(1, params.stop_token_ids[rows].long().masked_fill(unused, vocab_size), -torch.inf)
    adjusted = wide[:, :vocab_size]
    observed = params.observed[rows] * (params.adjusts[rows] & HAS_PENALTIES)[:, None]
    repetition, presence, frequency = params.penalties[rows].unsqueeze(1).unbind(-1)
    repeated = torch.where(adjusted > 0, adjusted / repetition, adjusted * repetition)
    times = (observed >> 1).float()
    return torch.where(observed != 0, repeated - frequency * times - presence * (times > 0), adjusted)


def _drawn(scores: torch.Tensor, params: SamplingTensors, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The floor of a row's kept scores is the greatest of three: each cut keeps all that are at least its own."""
    weights = (scores.exp() * _LIKELIEST).floor().double()
    ordered = scores.sort(dim=-1, descending=True).values
    top_k, top_p = params.top_k[rows].long(), params.top_p[rows][:, None]
    kth = ordered.gather(1, (top_k.clamp(1, scores.shape[1]) - 1)[:, None]).masked_fill_(
        (top_k == 0)[:, None], -torch.inf
    )
    sums = (ordered.exp() * _LIKELIEST).floor().double().masked_fill_(ordered < kth, 0.0).cumsum(-1)
    reached = torch.searchsorted(sums, top_p * sums[:, -1:])
    nucleus = ordered.gather(1, reached.clamp(max=scores.shape[1] - 1)).masked_fill_(top_p >= 1.0, -torch.inf)
    floors = torch.maximum(torch.maximum(kth, nucleus), params.min_scores[rows][:, None])
    sums = weights.masked_fill_(scores < floors, 0.0).cumsum(-1)
    total = sums[:, -1:]
    target = torch.minimum((_uniforms(params.seeds[rows], positions)[:, None] * total).floor(), total - 1.0)
    return torch.searchsorted(sums, target, right=True).squeeze(1).clamp(max=scores.shape[1] - 1)


def _uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """float64 in [0, 1): SplitMix64, as engine.sampling.randomness says. int64 arithmetic wraps around; shifts must not
    bring in the sign."""
    gamma = _signed(0x9E3779B97F4A7C15)
    bits = _mix(_mix(seeds + gamma) + gamma * (positions + 1))
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _mix(state: torch.Tensor) -> torch.Tensor:
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def _widened(values: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))


def _check(logits: torch.Tensor, params: SamplingTensors, rows: torch.Tensor, positions: torch.Tensor) -> None:
    num_rows, vocab_size = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or vocab_size != params.vocab_size:
        raise ValueError(
            f"logits must be float32 with dense rows of {params.vocab_size}; got {logits.dtype} {tuple(logits.shape)}"
        )
    for name, tensor in (("rows", rows), ("positions", positions)):
        if tensor.shape != (num_rows,) or tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [{num_rows}], got {tensor.dtype} {tuple(tensor.shape)}")
