"""Sampling on the device, kernels and torch reference alike, against the engine's own sampler: token for token."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from engine.runner import ScheduledChunk
from engine.sampling.sampler import Sampler
from kernels.gpu.sampling import sample_rows as sample_rows_in_triton
from kernels.gpu.tuning import LaunchConfig, forced
from kernels.sampling import sample_rows, sample_rows_reference
from kernels.sampling_tensors import SampledRows, SamplingTensors
from protocol.ids import RequestId
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken

VOCAB_SIZE = 200
SMALL_TILE = LaunchConfig(4, 1, {"TILE": 128})
SMALL_LANES = LaunchConfig(4, 1, {"LANES": 32})
MAX_TOP = 20

SETTINGS: dict[str, dict[str, object]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k beyond the candidates": {"top_k": 150},
    "top_k beyond the vocabulary": {"top_k": 1 << 30},
    "top_p": {"top_p": 0.8},
    "top_p beyond the candidates": {"top_p": 0.9999, "temperature": 2.0},
    "top_p of a wide top_k": {"top_k": 170, "top_p": 0.99, "temperature": 2.0},
    "narrow top_p of a wide top_k": {"top_k": 170, "top_p": 0.3},
    "tiny top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.05},
    "min_p of one": {"min_p": 1.0},
    "min_p beyond the candidates": {"min_p": 1e-6, "temperature": 2.0},
    "all cuts": {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "bias": {"logit_bias": {0: 5.0, 1: -100.0, 199: 7.5}},
    "minimum length": {"min_tokens": 4, "stop_token_ids": (0, 7, 198), "logit_bias": {0: 100.0}},
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

Sample = Callable[[torch.Tensor, SamplingTensors, torch.Tensor, torch.Tensor], SampledRows]


def _in_triton(
    logits: torch.Tensor, params: SamplingTensors, rows: torch.Tensor, positions: torch.Tensor
) -> SampledRows:
    """With tiles so small that a row has many, and candidates that do not always hold the cut."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_device = params.map(lambda tensor: tensor.to(device))
    with forced("sampling_draw", SMALL_TILE):
        sampled = sample_rows_in_triton(logits.to(device), on_device, rows.to(device), positions.to(device), MAX_TOP)
    return SampledRows(*(getattr(sampled, name).cpu() for name in SampledRows.__slots__))


def _in_torch(
    logits: torch.Tensor, params: SamplingTensors, rows: torch.Tensor, positions: torch.Tensor
) -> SampledRows:
    return sample_rows_reference(logits, params, rows, positions, MAX_TOP)


@pytest.fixture(params=[_in_torch, _in_triton], ids=["torch", "triton"])
def sample(request: pytest.FixtureRequest) -> Sample:
    chosen: Sample = request.param
    return chosen


def row(prompt: Sequence[int] = (), output: Sequence[int] = (), name: str = "r", **sampling: object) -> ScheduledChunk:
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
        output = torch.tensor(chunk.output_token_ids, dtype=torch.int64)
        params.observe_output(torch.full_like(output, index), output)
    return params


def draw(sample: Sample, chunks: Sequence[ScheduledChunk], logits: torch.Tensor) -> SampledRows:
    params = tensors_of(chunks, logits.shape[1])
    rows = torch.arange(len(chunks)).flip(0)
    positions = torch.tensor([chunk.output_position for chunk in chunks])
    return sample(logits, params, rows, positions)


def engine_tokens(chunks: Sequence[ScheduledChunk], logits: torch.Tensor) -> list[SampledToken]:
    sampled = Sampler().sample(chunks, logits)
    assert all(isinstance(each, SampledToken) for each in sampled)
    return [each for each in sampled if isinstance(each, SampledToken)]


@pytest.mark.parametrize("settings", list(SETTINGS))
def test_draws_the_engine_samplers_tokens(settings: str, sample: Sample) -> None:
    chunks, logits = some_rows(SETTINGS[settings], 2), random_logits(3, 2)
    before = logits.clone()
    sampled = draw(sample, chunks, logits)
    assert sampled.token_ids.tolist() == [each.token_id for each in engine_tokens(chunks, logits)]
    assert bool(sampled.finite.all())
    assert torch.equal(logits, before)


def test_tied_logits_stay_or_go_together(sample: Sample) -> None:
    """Exact ties at every cut, more of them than a tile holds."""
    logits = torch.full((1, VOCAB_SIZE), -5.0)
    logits[0, torch.arange(VOCAB_SIZE) % 4 > 0] = 1.0
    for settings in ({"top_k": 3}, {"top_p": 0.01}, {"min_p": 0.9}):
        chunks = [row(seed=seed, **settings) for seed in range(2)]
        batch = logits.repeat(2, 1)
        assert draw(sample, chunks, batch).token_ids.tolist() == [
            each.token_id for each in engine_tokens(chunks, batch)
        ]


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129])
def test_vocabularies_around_a_tile(vocab_size: int, sample: Sample) -> None:
    settings = ({}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.9}, {"frequency_penalty": 1.0})
    chunks = [some_rows(each, 3, vocab_size)[2] for each in settings]
    logits = random_logits(vocab_size, len(chunks), vocab_size)
    sampled = draw(sample, chunks, logits)
    assert sampled.token_ids.tolist() == [each.token_id for each in engine_tokens(chunks, logits)]


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_fails_alone(damage: float, sample: Sample) -> None:
    chunks = [row(temperature=t, seed=i, top_p=0.9, presence_penalty=1.0) for i, t in enumerate((0.0, 1.0, 1.0))]
    logits = random_logits(5, 3)
    expected = [each.token_id for each in engine_tokens(chunks, logits)]
    logits[1, 190] = damage
    sampled = draw(sample, chunks, logits)
    assert sampled.finite.tolist() == [True, False, True]
    assert sampled.token_ids.tolist() == [expected[0], 0, expected[2]]


def test_a_row_whose_tokens_are_all_forbidden_draws_one_all_the_same(sample: Sample) -> None:
    chunks = [row(temperature=t, min_tokens=1, stop_token_ids=(0, 1)) for t in (0.0, 1.0)]
    sampled = draw(sample, chunks, random_logits(6, 2, 2))
    assert sampled.finite.tolist() == [True, True]
    assert sampled.token_ids.tolist()[0] == 0
    assert sampled.token_ids.tolist()[1] in (0, 1)


def test_logprobs_are_the_models(sample: Sample) -> None:
    """Of the raw logits, as many as each row wants; the lower id first among equals."""
    logits = random_logits(7, 4)
    logits[0, 40:44] = 20.0
    settings = {"temperature": 0.2, "logit_bias": {3: 100.0}, "repetition_penalty": 1.5}
    chunks = [row(logprobs=6), row(logprobs=2, **settings), row(logprobs=0), row()]
    with forced("sampling_logprobs", SMALL_LANES):
        sampled = draw(sample, chunks, logits)
    values = logits.double().log_softmax(-1)
    for index, count in enumerate((6, 2, 0)):
        expected = values[index].sort(descending=True, stable=True)
        assert sampled.top_ids[index, :count].tolist() == expected.indices[:count].tolist()
        assert sampled.top_logprobs[index, :count].tolist() == pytest.approx(expected.values[:count].tolist(), abs=1e-5)
        token_id = int(sampled.token_ids[index])
        assert float(sampled.logprobs[index]) == pytest.approx(float(values[index, token_id]), abs=1e-5)
    assert sampled.top_ids[0, :4].tolist() == [40, 41, 42, 43]
    assert int(sampled.token_ids[1]) == 3


def test_all_logprobs_of_a_vocabulary_smaller_than_wanted(sample: Sample) -> None:
    logits = random_logits(8, 1, 5)
    sampled = draw(sample, [row(logprobs=20)], logits)
    assert sampled.top_ids[0, :5].tolist() == logits[0].sort(descending=True).indices.tolist()


def test_what_is_emitted_is_counted(sample: Sample) -> None:
    """A sequence with penalties, drawn from the same logits again and again. The draw itself counts nothing."""
    logits, settings = (
        random_logits(9, 2, 40),
        {"temperature": 0.0, "frequency_penalty": 2.0, "repetition_penalty": 1.1},
    )
    params = tensors_of([row(), row([1, 2], **settings)], 40)  # the penalised one has row 0
    engine, output = Sampler(), list[int]()
    for position in range(12):
        sampled = sample(logits, params, torch.tensor([1, 0]), torch.tensor([position, position]))
        (expected,) = engine.sample([row([1, 2], output, **settings)], logits[1:])
        assert isinstance(expected, SampledToken)
        assert int(sampled.token_ids[1]) == expected.token_id
        output.append(expected.token_id)
        assert int((params.observed[0] >> 1).sum()) == position
        params.observe_output(torch.tensor([0]), sampled.token_ids[1:])
    assert len(set(output)) > 5
    assert int(params.observed[1].abs().sum()) == 0


def test_emitted_tokens_of_many_rows_are_counted_at_once() -> None:
    params = SamplingTensors.allocate(3, 5, torch.device("cpu"))
    params.observe_prompt(2, torch.tensor([4, 4, 1]))
    params.observe_output(torch.tensor([2, 0, 2, 2]), torch.tensor([4, 0, 3, 4]))
    assert params.observed.tolist() == [[2, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 2, 5]]


def test_a_row_can_be_given_to_another_sequence(sample: Sample) -> None:
    first, second = row([3], [4, 4], temperature=0.0, presence_penalty=2.0), row(temperature=0.0, logit_bias={7: 50.0})
    logits = random_logits(10, 1, 40)
    params = tensors_of([first], 40)
    params.assign(torch.tensor([0]), SamplingTensors.of([second.sampling]))
    params.observe_prompt(0, torch.tensor([], dtype=torch.int64))
    sampled = sample(logits, params, torch.tensor([0]), torch.tensor([0]))
    assert sampled.token_ids.tolist() == [7]
    assert int(params.observed.sum()) == 0


@pytest.mark.parametrize(
    ("logits", "rows"),
    [
        (torch.zeros(1, 40, dtype=torch.float16), torch.tensor([0])),
        (torch.zeros(1, 41), torch.tensor([0])),
        (torch.zeros(40, 1).T.expand(2, 40), torch.tensor([0])),
        (torch.zeros(1, 40), torch.tensor([0], dtype=torch.int32)),
    ],
)
def test_what_does_not_fit_is_refused(logits: torch.Tensor, rows: torch.Tensor) -> None:
    params = SamplingTensors.allocate(2, 40, torch.device("cpu"))
    with pytest.raises(ValueError, match="must be"):
        sample_rows(logits, params, rows, torch.zeros(1, dtype=torch.int64), 1)


def test_a_list_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="1025 values in a row of 1024"):
        SamplingTensors.of([row(logit_bias=dict.fromkeys(range(1025), 1.0)).sampling])
