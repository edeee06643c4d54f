"""What is done to the logits before a token is chosen: logit bias, minimum length, penalties, in this order."""

from collections.abc import Sequence

import numpy as np
import torch

from engine.sampling.parameters import RowParameters
from engine.sampling.token_counts import TokenCounts


def add_logit_bias(logits: torch.Tensor, rows: RowParameters) -> None:
    """Add each row's biases, in place."""
    logits[rows.bias_rows, rows.bias_token_ids] += rows.biases


def forbid_early_stop(logits: torch.Tensor, rows: RowParameters, output_positions: Sequence[int]) -> None:
    """Make stop tokens impossible, in place, where the output is shorter than the row's minimum."""
    early = [row for row in rows.minimum_rows if output_positions[row] < rows.params[row].min_tokens]
    if early:
        stops = [rows.params[row].stop_token_ids for row in early]
        flat_rows = np.repeat(early, [len(ids) for ids in stops])
        flat_ids = np.concatenate([np.asarray(ids, np.int64) for ids in stops])
        logits[_index(flat_rows, logits), _index(flat_ids, logits)] = -torch.inf


def apply_penalties(logits: torch.Tensor, rows: RowParameters, counts: Sequence[TokenCounts]) -> None:
    """Apply repetition, presence and frequency penalties, in place; `counts[i]` belongs to `rows.penalised_rows[i]`.

    Repetition (over prompt and output) divides positive logits and multiplies negative ones; presence and frequency
    (over the output alone) are then subtracted, once and once for every occurrence.
    """
    flat_rows = _index(np.repeat(rows.penalised_rows, [len(each.token_ids) for each in counts]), logits)
    token_ids = _index(np.concatenate([each.token_ids for each in counts]), logits)
    times = torch.from_numpy(np.concatenate([each.output_counts for each in counts])).to(logits.device)
    repetition, presence, frequency = rows.penalties[flat_rows].unbind(dim=1)
    seen = logits[flat_rows, token_ids]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    logits[flat_rows, token_ids] = seen - frequency * times - presence * (times > 0)


def _index(values: np.ndarray[tuple[int, ...], np.dtype[np.int64]], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False)).to(like.device)
