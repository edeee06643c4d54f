"""RowParameters: the sampling parameters of a step's rows as tensors. A decode batch keeps them for many steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from kernels.draw import Cuts
from protocol.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Drawing:
    """The rows that are not greedy."""

    rows: torch.Tensor  # [num_drawn], int64
    seeds: npt.NDArray[np.uint64]  # [num_drawn]
    temperatures: torch.Tensor  # [num_drawn], float32
    cuts: Cuts


@dataclass(frozen=True, slots=True)
class RowParameters:
    """`params[i]` belongs to row i of the logits."""

    params: tuple[SamplingParams, ...]
    drawing: Drawing | None
    bias_rows: torch.Tensor  # [num_biases], int64
    bias_token_ids: torch.Tensor  # [num_biases], int64
    biases: torch.Tensor  # [num_biases], float32
    penalised_rows: tuple[int, ...]
    penalties: torch.Tensor  # [num_rows, 3], float32: repetition, presence, frequency
    minimum_rows: tuple[int, ...]  # rows that have a minimum length
    logprob_rows: tuple[int, ...]
    num_top: int  # the most alternatives that any row wants

    @classmethod
    def build(cls, params: Sequence[SamplingParams], device: torch.device) -> Self:
        biases = [(row, *item) for row, each in enumerate(params) for item in each.logit_bias.items()]
        bias_rows, bias_token_ids, values = zip(*biases, strict=True) if biases else ((), (), ())
        return cls(
            params=tuple(params),
            drawing=_drawing(params, device),
            bias_rows=torch.tensor(bias_rows, dtype=torch.int64, device=device),
            bias_token_ids=torch.tensor(bias_token_ids, dtype=torch.int64, device=device),
            biases=torch.tensor(values, dtype=torch.float32, device=device),
            penalised_rows=tuple(row for row, each in enumerate(params) if each.has_penalties),
            penalties=torch.tensor(
                [[each.repetition_penalty, each.presence_penalty, each.frequency_penalty] for each in params],
                dtype=torch.float32,
                device=device,
            ),
            minimum_rows=tuple(row for row, each in enumerate(params) if each.min_tokens and each.stop_token_ids),
            logprob_rows=tuple(row for row, each in enumerate(params) if each.logprobs is not None),
            num_top=max((each.logprobs or 0 for each in params), default=0),
        )

    @property
    def adjusts_logits(self) -> bool:
        return bool(len(self.biases) or self.penalised_rows or self.minimum_rows)


def _drawing(params: Sequence[SamplingParams], device: torch.device) -> Drawing | None:
    rows = [row for row, each in enumerate(params) if not each.greedy]
    if not rows:
        return None
    drawn = [params[row] for row in rows]
    return Drawing(
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
        seeds=np.array([each.seed for each in drawn], np.uint64),
        temperatures=torch.tensor([each.temperature for each in drawn], dtype=torch.float32, device=device),
        cuts=Cuts(
            top_k=torch.tensor([each.top_k for each in drawn], dtype=torch.int64, device=device),
            top_p=torch.tensor([each.top_p for each in drawn], dtype=torch.float64, device=device),
            min_p=torch.tensor([each.min_p for each in drawn], dtype=torch.float64, device=device),
        ),
    )
