"""Sampling on the device, kernels and torch reference alike, against the engine's own sampler: token for token."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from engine.runner import ScheduledChunk
from engine.sampling.sampler import Sampler
from kernels.gpu.sampling import sample_rows as sample_rows_in_triton
from kernels.gpu.tuning import LaunchConfig, forced
from kernels.sampling import sample_rows_reference
from kernels.sampling_tensors import SampledRows, SamplingTensors
from protocol.ids import RequestId
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken

VOCAB_SIZE = 333
SMALL_TILE = LaunchConfig(4, 1, {"TILE": 64})
SMALL_LANES = LaunchConfig(4, 1, {"LANES": 32})
MAX_TOP = 20

SETTINGS: dict[str, dict[str, object]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k beyond the candidates": {"top_k": 200},
    "top_k beyond the vocabulary": {"top_k": 1 << 30},
    "top_p": {"top_p": 0.8},
    "top_p beyond the candidates": {"top_p": 0.9999, "temperature": 2.0},
    "top_p of a wide top_k": {"top_k": 250, "top_p": 0.99, "temperature": 2.0},
    "narrow top_p of a wide top_k": {"top_k": 250, "top_p": 0.3},
    "tiny top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.05},
    "min_p of one": {"min_p": 1.0},
    "min_p beyond the candidates": {"min_p": 1e-6, "temperature": 2.0},
    "all cuts": {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "bias": {"logit_bias": {0: 5.0, 1: -100.0, 332: 7.5}},
    "minimum length": {"min_tokens": 4, "stop_token_ids": (0, 7, 331), "logit_bias": {0: 100.0}},
    "minimum length passed": {"min_tokens": 1, "stop_token_ids": (0,), "logit_bias": {0: 100.0}},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.1},
    "repetition": {"repetition_penalty": 1.7},
    "penalties and bias": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {3: 4.0, 5: -2.0}},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 2.0, "presence_penalty": 1.0},
    "everything": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.001,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.2,
        "logit_bias": {1: 2.0},
        "min_tokens": 3,
        "stop_token_ids": (0,),
    },
}

Sample = Callable[[torch.Tensor, SamplingTensors, torch.Tensor, torch.Tensor, bool], SampledRows]


def _in_triton(
    logits: torch.Tensor, params: SamplingTensors, rows: torch.Tensor, positions: torch.Tensor, record: bool
) -> SampledRows:
    """With tiles so small that a row has many, and candidates that do not always hold the cut."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_device = params.map(lambda tensor: tensor.to(device))
    with forced("sampling_draw", SMALL_TILE):
        sampled = sample_rows_in_triton(
            logits.to(device), on_device, rows.to(device), positions.to(device), MAX_TOP, record=record
        )
    params.observed.copy_(on_device.observed)
    return SampledRows(*(getattr(sampled, name).cpu() for name in SampledRows.__slots__))


def _in_torch(
    logits: torch.Tensor, params: SamplingTensors, rows: torch.Tensor, positions: torch.Tensor, record: bool
) -> SampledRows:
    return sample_rows_reference(logits, params, rows, positions, MAX_TOP, record=record)


@pytest.fixture(params=[_in_torch, _in_triton], ids=["torch", "triton"])
def sample(request: pytest.FixtureRequest) -> Sample:
    chosen: Sample = request.param
    return chosen


def row(
    prompt: Sequence[int] = (), output: Sequence[int] = (), name: str = "r", **sampling: object
) -> ScheduledChunk:
    """A sampling row; its output position is the length of its output."""
    params = SamplingParams(**{"max_tokens": 1000, "seed": 1, **sampling})
    return ScheduledChunk(RequestId(name), [0], 0, [0], True, len(output), params, list(prompt), list(output))


def some_rows(settings: dict[str, object], count: int, vocab_size: int = VOCAB_SIZE) -> list[ScheduledChunk]:
    """Sequences of different lengths, each with a seed of its own; the last seeds have all their bits."""
    rng = np.random.default_rng(vocab_size)
    return [
        row(
            rng.integers(0, vocab_size, 6).tolist(),
            rng.integers(0, vocab_size, 2 * index % 7).tolist(),
            name=f"r{index}",
            seed=1000 + index if index < count // 2 else (1 << 63) - 1 - index,
            **settings,
        )
        for index in range(count)
    ]


def random_logits(seed: int, num_rows: int, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def tensors_of(chunks: Sequence[ScheduledChunk], vocab_size: int = VOCAB_SIZE) -> SamplingTensors:
    """Each chunk's parameters in a row, in reverse order, with what it has observed."""
    chunks = chunks[::-1]
    params = SamplingTensors.allocate(len(chunks), vocab_size, torch.device("cpu"))
    params.assign(torch.arange(len(chunks)), SamplingTensors.of([chunk.sampling for chunk in chunks]))
    for index, chunk in enumerate(chunks):
        params.observe_prompt(index, torch.tensor(chunk.prompt_token_ids, dtype=torch.int64))
        params.observe_output(index, torch.tensor(chunk.output_token_ids, dtype=torch.int64))
    return params


def draw(sample: Sample, chunks: Sequence[ScheduledChunk], logits: torch.Tensor) -> SampledRows:
    params = tensors_of(chunks, logits.shape[1])
    rows = torch.arange(len(chunks)).flip(0)
    positions = torch.tensor([chunk.output_position for chunk in chunks])
    return sample(logits, params, rows, positions, False)


def engine_tokens(chunks: Sequence[ScheduledChunk], logits: torch.Tensor) -> list[SampledToken]:
    sampled = Sampler().sample(chunks, logits)
    assert all(isinstance(each, SampledToken) for each in sampled)
    return [each for each in sampled if isinstance(each, SampledToken)]


@pytest.mark.parametrize("settings", list(SETTINGS))
def test_draws_the_engine_samplers_tokens(settings: str, sample: Sample) -> None:
    chunks, logits = some_rows(SETTINGS[settings], 8), random_logits(3, 8)
    before = logits.clone()
    sampled = draw(sample, chunks, logits)
    assert sampled.token_ids.tolist() == [each.token_id for each in engine_tokens(chunks, logits)]
    assert bool(sampled.finite.all())
    assert torch.equal(logits, before)
