"""Sampler: from the logits of a step's sampling rows to their tokens, all rows at once.

The order: logit bias, minimum length, penalties, temperature, top-k, top-p, min-p, draw. Log-probabilities are those of
the model, taken from the logits as they came, before any of this, as in vLLM and the OpenAI API.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.runner import ScheduledChunk
from engine.sampling.adjust import add_logit_bias, apply_penalties, forbid_early_stop
from engine.sampling.parameters import Drawing, RowParameters
from engine.sampling.randomness import uniforms
from engine.sampling.token_counts import TokenCounts
from kernels.draw import draw
from protocol.errors import InternalError
from protocol.ids import RequestId
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken

_ARGMAX_CHUNK = 64

TopTokens = tuple[tuple[int, float], ...]


class Sampler:
    """Keeps, for sequences with penalties, what they have emitted; everything else is a function of its arguments."""

    def __init__(self) -> None:
        self._counts: dict[RequestId, TokenCounts] = {}
        self._rows: RowParameters | None = None

    def sample(self, chunks: Sequence[ScheduledChunk], logits: torch.Tensor) -> list[SampledToken | InternalError]:
        """One token for each chunk; row i of logits ([num_rows, vocab_size]) belongs to chunks[i].

        A row whose logits are not finite gets an InternalError in place of a token.
        """
        rows = self._row_parameters([chunk.sampling for chunk in chunks], logits.device)
        logits = logits.float()  # argmax and extremes of bfloat16 are slower than the conversion
        finite = _finite_rows(logits)
        if not all(finite):
            logits = torch.where(torch.tensor(finite, device=logits.device)[:, None], logits, 0.0)
        adjusted = self._adjusted(chunks, logits, rows) if rows.adjusts_logits else logits
        tokens = first_argmax(adjusted)
        if rows.drawing is not None:
            positions = np.fromiter((chunk.output_position for chunk in chunks), np.uint64, len(chunks))
            tokens[rows.drawing.rows] = _drawn(adjusted, rows.drawing, positions)
        token_ids = tokens.tolist()
        logprobs = _logprobs(logits, rows, tokens) if rows.logprob_rows else {}
        return [
            SampledToken(token_id, *logprobs.get(row, ()))
            if finite[row]
            else InternalError(f"the model's logits are not finite at output position {chunk.output_position}")
            for row, (chunk, token_id) in enumerate(zip(chunks, token_ids, strict=True))
        ]

    def forget(self, request_id: RequestId) -> None:
        """Drop what is kept of a sequence, if anything is."""
        self._counts.pop(request_id, None)

    def _row_parameters(self, params: list[SamplingParams], device: torch.device) -> RowParameters:
        if self._rows is None or self._rows.params != tuple(params):
            self._rows = RowParameters.build(params, device)
        return self._rows

    def _adjusted(self, chunks: Sequence[ScheduledChunk], logits: torch.Tensor, rows: RowParameters) -> torch.Tensor:
        adjusted = logits.clone()
        add_logit_bias(adjusted, rows)
        forbid_early_stop(adjusted, rows, [chunk.output_position for chunk in chunks])
        if rows.penalised_rows:
            apply_penalties(adjusted, rows, [self._observed(chunks[row]) for row in rows.penalised_rows])
        return adjusted

    def _observed(self, chunk: ScheduledChunk) -> TokenCounts:
        counts = self._counts.get(chunk.request_id)
        if counts is None or counts.num_observed > len(chunk.output_token_ids):
            counts = self._counts[chunk.request_id] = TokenCounts(chunk.prompt_token_ids)
        counts.observe(chunk.output_token_ids)
        return counts


def first_argmax(logits: torch.Tensor) -> torch.Tensor:
    """The lowest token id of those with the greatest logit, [num_rows] int64.

    Over chunks first: a maximum is found eight times faster than its place.
    """
    num_rows, vocab_size = logits.shape
    if vocab_size % _ARGMAX_CHUNK:
        return logits.argmax(dim=-1)
    chunks = logits.view(num_rows, -1, _ARGMAX_CHUNK)
    best = chunks.amax(dim=-1).argmax(dim=-1)  # [num_rows]
    inside = chunks[torch.arange(num_rows, device=logits.device), best].argmax(dim=-1)
    return best * _ARGMAX_CHUNK + inside


def _finite_rows(logits: torch.Tensor) -> list[bool]:
    """Extremes tell: NaN wins every comparison."""
    finite: list[bool] = (logits.amax(dim=-1).isfinite() & logits.amin(dim=-1).isfinite()).tolist()
    return finite


def _drawn(logits: torch.Tensor, drawing: Drawing, positions: npt.NDArray[np.uint64]) -> torch.Tensor:
    uniform = torch.from_numpy(uniforms(drawing.seeds, positions[drawing.rows.cpu().numpy()])).to(logits.device)
    return draw(logits.index_select(0, drawing.rows), drawing.temperatures, drawing.cuts, uniform)


def _logprobs(logits: torch.Tensor, rows: RowParameters, tokens: torch.Tensor) -> dict[int, tuple[float, TopTokens]]:
    """For each row that wants them: the token's log-probability, and the best alternatives with theirs."""
    wanted = torch.tensor(rows.logprob_rows, device=logits.device)
    if len(wanted) != len(logits):
        logits, tokens = logits[wanted], tokens[wanted]
    normaliser = logits.logsumexp(dim=-1, keepdim=True)  # cheaper than normalising the whole vocabulary
    sampled = (logits.gather(1, tokens[:, None]) - normaliser).squeeze(1).tolist()
    best = logits.topk(min(rows.num_top, logits.shape[1]), dim=-1)
    best_values, best_ids = (best.values - normaliser).tolist(), best.indices.tolist()
    result = {}
    for index, row in enumerate(rows.logprob_rows):
        count = rows.params[row].logprobs
        top = tuple(zip(best_ids[index][:count], best_values[index][:count], strict=True))
        result[row] = (sampled[index], top)
    return result
