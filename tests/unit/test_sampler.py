"""The sampler against a slow reference in plain Python, its distributions, and what must not influence a draw."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from engine.runner import ScheduledChunk
from engine.sampling.randomness import uniforms
from engine.sampling.sampler import Sampler, first_argmax
from engine.sampling.token_counts import TokenCounts
from kernels.draw import Cuts, draw
from protocol.errors import InternalError
from protocol.ids import RequestId
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken

VOCAB_SIZES = (2, 3, 50, 64, 333, 9000)


def row(
    prompt: list[int] | None = None, output: list[int] | None = None, name: str = "r", **sampling: object
) -> ScheduledChunk:
    """A sampling row; its output position is the length of its output."""
    output = output or []
    params = SamplingParams(**{"max_tokens": 1000, "seed": 1, **sampling})
    return ScheduledChunk(RequestId(name), [0], 0, [0], True, len(output), params, prompt or [], output)


def random_logits(seed: int, rows: int, vocab_size: int) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def token_ids(sampled: list[SampledToken | InternalError]) -> list[int]:
    assert all(isinstance(each, SampledToken) for each in sampled)
    return [each.token_id for each in sampled if isinstance(each, SampledToken)]


def reference_uniform(seed: int, position: int) -> float:
    """The documented formula, in Python's integers."""

    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    gamma = 0x9E3779B97F4A7C15
    key = mix((seed + gamma) % 2**64)
    return (mix((key + gamma * (position + 1)) % 2**64) >> 11) / 2**53


def reference_scores(chunk: ScheduledChunk, logits: list[float]) -> list[float]:
    """Bias, minimum length and penalties, token by token."""
    params, scores = chunk.sampling, list(logits)
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += bias
    if chunk.output_position < params.min_tokens:
        for token_id in params.stop_token_ids:
            scores[token_id] = -math.inf
    counts = Counter(chunk.output_token_ids)
    for token_id in set(chunk.prompt_token_ids) | set(counts):
        score = scores[token_id]
        score = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
        score -= params.frequency_penalty * counts[token_id]
        scores[token_id] = score - params.presence_penalty * (counts[token_id] > 0)
    return scores


def reference_token(chunk: ScheduledChunk, logits: list[float]) -> int:
    params, scores = chunk.sampling, reference_scores(chunk, logits)
    best = max(scores)
    if params.temperature == 0:
        return scores.index(best)
    weights = [math.exp((score - best) / params.temperature) for score in scores]
    ordered = sorted(weights, reverse=True)
    if params.top_k:
        least = ordered[min(params.top_k, len(ordered)) - 1]
        weights = [weight if weight >= least else 0.0 for weight in weights]
        ordered = sorted(weights, reverse=True)
    if params.top_p < 1:
        running, total = 0.0, sum(ordered)
        for weight in ordered:
            running += weight
            if running >= params.top_p * total:
                weights = [other if other >= weight else 0.0 for other in weights]
                break
    weights = [weight if weight >= params.min_p else 0.0 for weight in weights]
    target, running = reference_uniform(params.seed, chunk.output_position) * sum(weights), 0.0
    for token_id, weight in enumerate(weights):
        running += weight
        if running > target:
            return token_id
    raise AssertionError("a uniform number below 1 always finds a token")


SETTINGS: dict[str, dict[str, object]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k beyond the prefix": {"top_k": 200},
    "top_k beyond the vocabulary": {"top_k": 1 << 30},
    "top_p": {"top_p": 0.8},
    "top_p of nearly all": {"top_p": 0.9999, "temperature": 2.0},
    "tiny top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.05},
    "min_p of one": {"min_p": 1.0},
    "all cuts": {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "bias": {"logit_bias": {0: 5.0, 1: -100.0}},
    "minimum length": {"min_tokens": 4, "stop_token_ids": (0,), "logit_bias": {0: 100.0}},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.1},
    "repetition": {"repetition_penalty": 1.7},
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
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 2.0, "presence_penalty": 1.0},
}


def some_rows(settings: dict[str, object], vocab_size: int, count: int) -> list[ScheduledChunk]:
    """Sequences of different lengths, each with a seed of its own."""
    usable = {**settings, "logit_bias": {t: b for t, b in settings.get("logit_bias", {}).items() if t < vocab_size}}
    rng = np.random.default_rng(vocab_size)
    return [
        row(
            rng.integers(0, vocab_size, 6).tolist(),
            rng.integers(0, vocab_size, 2 * index % 7).tolist(),
            name=f"r{index}",
            seed=1000 + index,
            **usable,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("settings", list(SETTINGS))
def test_every_parameter_equals_the_reference(settings: str, vocab_size: int) -> None:
    chunks = some_rows(SETTINGS[settings], vocab_size, 12)
    logits = random_logits(3, 12, vocab_size)
    expected = [reference_token(chunk, values) for chunk, values in zip(chunks, logits.tolist(), strict=True)]
    before = logits.clone()
    assert token_ids(Sampler().sample(chunks, logits)) == expected
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """All settings in one batch, in three orders, alone, and with another number of threads."""
    vocab_size = 9000
    chunks = [some_rows(settings, vocab_size, 3)[2] for settings in SETTINGS.values()]
    logits = random_logits(4, len(chunks), vocab_size).to(dtype)
    expected = [token_ids(Sampler().sample([each], logits[i : i + 1]))[0] for i, each in enumerate(chunks)]
    threads = torch.get_num_threads()
    for order in (range(len(chunks)), range(len(chunks))[::-1], [0, 3, 8, 15]):
        torch.set_num_threads(1 if len(order) == 4 else 2)
        batch = [chunks[i] for i in order]
        assert token_ids(Sampler().sample(batch, logits[list(order)])) == [expected[i] for i in order]
    torch.set_num_threads(threads)


def test_tied_logits_stay_or_go_together() -> None:
    """Exact ties, which bfloat16 logits have, at every cut and wider than the prefix that is looked at first."""
    logits = torch.full((1, 9000), -5.0)
    logits[0, ::2] = 1.0
    for settings in ({"top_k": 3}, {"top_p": 0.01}, {"min_p": 0.9}):
        chunks = [row(seed=seed, **settings) for seed in range(20)]
        drawn = token_ids(Sampler().sample(chunks, logits.expand(20, -1)))
        assert drawn == [reference_token(chunk, logits[0].tolist()) for chunk in chunks]
        assert all(token_id % 2 == 0 for token_id in drawn)


@pytest.mark.parametrize(
    ("temperature", "cuts", "kept"),
    [(1.0, {}, 8), (0.5, {}, 8), (1.0, {"top_k": 3}, 3), (1.0, {"top_p": 0.75}, 4), (1.0, {"min_p": 0.3}, 3)],
)
def test_draws_follow_the_distribution(temperature: float, cuts: dict[str, object], kept: int) -> None:
    """Chi-square over 20,000 seeds, and over 20,000 positions of one seed; the limit is the 99.9 % quantile."""
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.5, 0.0, 1.0, -0.5, 0.25]])
    num_draws, limits = 20_000, {3: 13.82, 4: 16.27, 8: 24.32}
    scaled = (logits[0] / temperature).double().exp()
    scaled[scaled < scaled.sort(descending=True).values[kept - 1]] = 0.0
    expected = scaled / scaled.sum() * num_draws
    for seeds, positions in ((range(num_draws), [5] * num_draws), ([77] * num_draws, range(num_draws))):
        drawn = draw(
            logits.repeat(num_draws, 1),
            torch.full((num_draws,), temperature),
            Cuts(
                torch.full((num_draws,), cuts.get("top_k", 0)),
                torch.full((num_draws,), cuts.get("top_p", 1.0), dtype=torch.float64),
                torch.full((num_draws,), cuts.get("min_p", 0.0), dtype=torch.float64),
            ),
            torch.from_numpy(uniforms(np.array(seeds, np.uint64), np.array(positions, np.uint64))),
        )
        observed = drawn.bincount(minlength=8).double()
        assert observed[expected == 0].sum() == 0
        inside = expected > 0
        assert ((observed - expected)[inside] ** 2 / expected[inside]).sum() < limits[kept]


class TestUniforms:
    def test_the_documented_formula(self) -> None:
        seeds, positions = [0, 1, 12345, 2**63 - 1], [0, 1, 77, 2**24]
        values = uniforms(np.array(seeds, np.uint64), np.array(positions, np.uint64))
        assert values.tolist() == [reference_uniform(*each) for each in zip(seeds, positions, strict=True)]

    def test_golden_values(self) -> None:
        """Nodes of two releases must agree: these never change."""
        values = uniforms(np.array([0, 42, 42], np.uint64), np.array([0, 0, 1], np.uint64))
        assert values.tolist() == [0.6524484863740322, 0.34329192209867343, 0.9557467261317436]

    def test_uniform_in_every_direction(self) -> None:
        """64 buckets over positions of one seed, seeds at one position, and the diagonal that a weak hash would show."""
        count = 64_000
        numbers, constant = np.arange(count, dtype=np.uint64), np.full(count, 9, np.uint64)
        for seeds, positions in (
            (numbers, constant),
            (constant, numbers),
            (numbers, numbers),
            (numbers, numbers[::-1]),
        ):
            observed = np.bincount((uniforms(seeds, positions) * 64).astype(int), minlength=64)
            assert ((observed - count / 64) ** 2 / (count / 64)).sum() < 103.4  # 99.9 % quantile of chi-square(63)

    def test_neighbours_are_not_correlated(self) -> None:
        numbers, constant = np.arange(50_000, dtype=np.uint64), np.full(50_000, 3, np.uint64)
        for values in (uniforms(numbers, constant), uniforms(constant, numbers)):
            assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
        shifted = uniforms(constant + np.uint64(1), numbers)
        assert abs(np.corrcoef(uniforms(constant, numbers)[1:], shifted[:-1])[0, 1]) < 0.02


class TestNotFinite:
    @pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
    def test_one_row_fails_alone(self, damage: float) -> None:
        chunks = [row(temperature=t, seed=i, top_p=0.9, logprobs=1) for i, t in enumerate((0.0, 1.0, 1.0, 0.0))]
        logits = random_logits(5, 4, 640)
        expected = Sampler().sample(chunks, logits)
        logits[1, 333] = logits[3, 0] = damage
        sampled = Sampler().sample(chunks, logits)
        assert [sampled[0], sampled[2]] == [expected[0], expected[2]]
        for index in (1, 3):
            error = sampled[index]
            assert isinstance(error, InternalError)
            assert "logits are not finite" in error.message

    def test_the_coldest_temperature_is_greedy(self) -> None:
        logits = random_logits(6, 1, 640)
        assert token_ids(Sampler().sample([row(temperature=5e-324)], logits)) == [int(logits.argmax())]


class TestLogprobs:
    def test_of_the_model_before_anything_is_done_to_the_logits(self) -> None:
        logits = random_logits(7, 2, 500)
        settings = {"temperature": 0.2, "logit_bias": {3: 100.0}, "repetition_penalty": 1.5}
        plain, adjusted = Sampler().sample([row(logprobs=4), row([3], logprobs=2, **settings)], logits)
        expected = logits.double().log_softmax(-1)
        for sampled, count, values in ((plain, 4, expected[0]), (adjusted, 2, expected[1])):
            assert isinstance(sampled, SampledToken)
            assert sampled.logprob == pytest.approx(float(values[sampled.token_id]), abs=1e-5)
            best = values.topk(count)
            assert [token_id for token_id, _ in sampled.top] == best.indices.tolist()
            assert [logprob for _, logprob in sampled.top] == pytest.approx(best.values.tolist(), abs=1e-5)
            assert all(better >= worse for (_, better), (_, worse) in pairwise(sampled.top))
        assert isinstance(adjusted, SampledToken)
        assert adjusted.token_id == 3

    def test_none_unless_asked_for_and_zero_alternatives(self) -> None:
        silent, bare = Sampler().sample([row(), row(logprobs=0)], random_logits(8, 2, 50))
        assert isinstance(silent, SampledToken)
        assert silent.logprob is None
        assert isinstance(bare, SampledToken)
        assert bare.logprob is not None
        assert bare.top == ()


class TestState:
    def test_counts_follow_a_growing_output(self) -> None:
        sampler, output = Sampler(), []
        logits = random_logits(9, 1, 40)
        params = {"temperature": 0.0, "frequency_penalty": 2.0, "repetition_penalty": 1.1}
        for _ in range(60):
            chunk = row([1, 2], output, **params)
            (token_id,) = token_ids(sampler.sample([chunk], logits))
            assert token_id == reference_token(chunk, logits[0].tolist())
            output.append(token_id)
        assert len(set(output)) > 5

    def test_a_sequence_that_came_from_elsewhere_counts_what_it_had_emitted(self) -> None:
        logits = random_logits(10, 1, 40)
        chunk = row([1, 2], [5, 5, 7, 9], temperature=0.0, presence_penalty=2.0)
        assert token_ids(Sampler().sample([chunk], logits)) == [reference_token(chunk, logits[0].tolist())]

    def test_forget_drops_the_sequence(self) -> None:
        sampler, logits = Sampler(), random_logits(11, 1, 40)
        favourite = int(logits.argmax())
        before = row([favourite], temperature=0.0, repetition_penalty=100.0)
        assert token_ids(sampler.sample([before], logits)) != [favourite]
        sampler.forget(before.request_id)
        sampler.forget(RequestId("never seen"))
        after = row([favourite + 1], temperature=0.0, repetition_penalty=100.0)
        assert token_ids(sampler.sample([after], logits)) == [favourite]

    def test_changed_parameters_of_the_same_batch_are_noticed(self) -> None:
        sampler, logits = Sampler(), random_logits(12, 1, 40)
        for bias in ({3: 50.0}, {4: 50.0}):
            assert token_ids(sampler.sample([row(logit_bias=bias)], logits)) == list(bias)

    def test_token_counts(self) -> None:
        counts = TokenCounts([4, 4, 2])
        output = [*range(100, 400), 4, 100]
        for end in (0, 1, 200, 302):
            counts.observe(output[:end])
        expected = Counter(output) | {2: 0}
        assert dict(zip(counts.token_ids.tolist(), counts.output_counts.tolist(), strict=True)) == expected


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 128, 4096])
def test_first_argmax_is_the_lowest_id_of_the_best(vocab_size: int) -> None:
    logits = random_logits(13, 9, vocab_size).round()
    expected = [values.index(max(values)) for values in logits.tolist()]
    assert first_argmax(logits).tolist() == expected
    assert first_argmax(logits.bfloat16()).tolist() == expected
