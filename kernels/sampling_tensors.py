"""SamplingTensors: how each row of a batch is sampled, in tensors that stay where they are; SampledRows: what was drawn.

Life: allocated once for as many rows as a batch can have. A request that joins gets a row, and the row its parameters
(`of` on the host, `map` to the device, `assign`); from then on nothing is copied for it. A step names, for each row of
its logits, the row here that it belongs to. So a captured graph can go on reading the same tensors while requests come and
go. A sequence with penalties also has a row of counts, which `observe_prompt` begins and `observe_output` goes on with.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

MAX_BIASES, MAX_STOPS = 1024, 256

HAS_PENALTIES, HAS_LISTS = 1, 2
"""Bits of `SamplingTensors.adjusts`: what may change the row's logits. Lists: biases, or stop tokens with a minimum."""


class RowSampling(Protocol):
    """What is read of one request's parameters; protocol.sampling.SamplingParams says what they mean."""

    @property
    def seed(self) -> int: ...
    @property
    def greedy(self) -> bool: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def has_penalties(self) -> bool: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def stop_token_ids(self) -> Sequence[int]: ...
    @property
    def logit_bias(self) -> Mapping[int, float]: ...
    @property
    def logprobs(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """Row i of every tensor belongs to row i of the batch."""

    temperatures: torch.Tensor  # [rows], float32; 0 is greedy
    top_k: torch.Tensor  # [rows], int32; 0 keeps all
    top_p: torch.Tensor  # [rows], float64; 1 keeps all
    min_scores: torch.Tensor  # [rows], float32: log(min_p), so -inf keeps all
    seeds: torch.Tensor  # [rows], int64, the bits of an unsigned number
    penalties: torch.Tensor  # [rows, 3], float32: repetition, presence, frequency
    adjusts: torch.Tensor  # [rows], int32: HAS_PENALTIES, HAS_LISTS
    num_biases: torch.Tensor  # [rows], int32
    bias_token_ids: torch.Tensor  # [rows, MAX_BIASES], int32, distinct
    biases: torch.Tensor  # [rows, MAX_BIASES], float32
    min_tokens: torch.Tensor  # [rows], int32
    num_stops: torch.Tensor  # [rows], int32
    stop_token_ids: torch.Tensor  # [rows, MAX_STOPS], int32
    num_logprobs: torch.Tensor  # [rows], int32: alternatives wanted; -1 for no log-probabilities at all
    observed: torch.Tensor  # [rows, vocab_size], int32: 2 * times in the output + 1 if in the prompt

    @classmethod
    def allocate(cls, num_rows: int, vocab_size: int, device: torch.device) -> Self:
        """All rows greedy. The counts take 4 bytes a row and token of the vocabulary, the lists 10 KiB a row."""
        tensors = cls.of([_GREEDY]).map(lambda tensor: tensor.to(device).repeat_interleave(num_rows, dim=0))
        observed = torch.zeros((num_rows, vocab_size), dtype=torch.int32, device=device)
        return dataclasses.replace(tensors, observed=observed)

    @classmethod
    def of(cls, samplings: Sequence[RowSampling]) -> Self:
        """On the CPU, one row for each, without counts."""
        biases = [list(each.logit_bias.items()) for each in samplings]
        stops = [list(each.stop_token_ids) if each.min_tokens else [] for each in samplings]
        penalties = [(each.repetition_penalty, each.presence_penalty, each.frequency_penalty) for each in samplings]
        return cls(
            temperatures=_column([0.0 if each.greedy else each.temperature for each in samplings], torch.float32),
            top_k=_column([each.top_k for each in samplings], torch.int32),
            top_p=_column([each.top_p for each in samplings], torch.float64),
            min_scores=_column([each.min_p for each in samplings], torch.float64).log().float(),
            seeds=_column([each.seed for each in samplings], torch.int64),
            penalties=torch.tensor(penalties, dtype=torch.float32).view(-1, 3),
            adjusts=_column(
                [
                    HAS_PENALTIES * each.has_penalties + HAS_LISTS * bool(row_biases or row_stops)
                    for each, row_biases, row_stops in zip(samplings, biases, stops, strict=True)
                ],
                torch.int32,
            ),
            num_biases=_column([len(row) for row in biases], torch.int32),
            bias_token_ids=_table([[token_id for token_id, _ in row] for row in biases], MAX_BIASES, torch.int32),
            biases=_table([[bias for _, bias in row] for row in biases], MAX_BIASES, torch.float32),
            min_tokens=_column([each.min_tokens for each in samplings], torch.int32),
            num_stops=_column([len(row) for row in stops], torch.int32),
            stop_token_ids=_table(stops, MAX_STOPS, torch.int32),
            num_logprobs=_column([-1 if each.logprobs is None else each.logprobs for each in samplings], torch.int32),
            observed=torch.zeros((len(samplings), 0), dtype=torch.int32),
        )

    @property
    def vocab_size(self) -> int:
        return self.observed.shape[1]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with every tensor changed: moved to a device, say."""
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in _names()})

    def assign(self, rows: torch.Tensor, source: "SamplingTensors") -> None:
        """Row rows[i] ([n], int64) becomes row i of source, on the same device, in all but the counts."""
        for name in _names():
            if name != "observed":
                getattr(self, name).index_copy_(0, rows, getattr(source, name))

    def observe_prompt(self, row: int, token_ids: torch.Tensor) -> None:
        """Begin the row's counts: these tokens (int64) are the sequence's prompt."""
        self.observed[row].zero_()
        self.observed[row].index_fill_(0, token_ids, 1)

    def observe_output(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Row rows[i] has emitted token_ids[i] (both [n], int64); the same pair counts as often as it comes."""
        counts = self.observed.view(-1)
        counts.index_add_(0, rows * self.vocab_size + token_ids, torch.full_like(token_ids, 2, dtype=counts.dtype))


@dataclass(frozen=True, slots=True)
class SampledRows:
    """One for each row of the logits. Log-probabilities are natural, of the logits before anything was done to them; they
    are defined where the row asked for them, and the alternatives as many as it asked for, best first."""

    token_ids: torch.Tensor  # [num_rows], int64; 0 where the logits are not finite
    finite: torch.Tensor  # [num_rows], bool
    logprobs: torch.Tensor  # [num_rows], float32
    top_ids: torch.Tensor  # [num_rows, max_top], int32
    top_logprobs: torch.Tensor  # [num_rows, max_top], float32


@dataclass(frozen=True, slots=True)
class _Greedy:
    """The parameters of a row that nobody uses."""

    seed: int = 0
    greedy: bool = True
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    has_penalties: bool = False
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs: int | None = None


_GREEDY = _Greedy()


def _names() -> list[str]:
    return [each.name for each in dataclasses.fields(SamplingTensors)]


def _column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def _table(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, width], each row's values first. Raises ValueError for a row that is longer."""
    longest = max((len(row) for row in rows), default=0)
    if longest > width:
        raise ValueError(f"{longest} values in a row of {width}")
    table = torch.zeros((len(rows), width), dtype=dtype)
    for index, row in enumerate(rows):
        table[index, : len(row)] = torch.tensor(row, dtype=dtype)
    return table
