"""What a prompt's logits are does not depend on what else is in the batch, nor on how the prompt was cut into chunks.

Not to the last bit: the order in which attention sums its spans may differ. Within what the dtype leaves of it.
"""

import random
from pathlib import Path

import pytest
from runner_driver import Driver, Sequence
from tiny_models import make_model

from engine.torch_runner import RunnerOptions, build_torch_runner
from protocol.ids import RequestId
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken
from runtime.models.resolve import resolve_model

NUM_TOP = 20
PROMPT_LENGTH = 150
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}  # of log-probabilities between 0 and -10


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, 512) for _ in range(length)]


def sequence(name: str, prompt: list[int]) -> Sequence:
    return Sequence(RequestId(name), prompt, SamplingParams(max_tokens=9, seed=0, temperature=0.0, logprobs=NUM_TOP))


class Measured:
    """The same prompt's log-probabilities after its last token, computed in different company."""

    def __init__(self, folder: Path, dtype: str) -> None:
        options = RunnerOptions(dtype=dtype, device="cpu", block_size=16, num_blocks=200)  # type: ignore[arg-type]
        self.driver = Driver(build_torch_runner(resolve_model(str(folder)), options))
        self.prompt = prompt_of(PROMPT_LENGTH, seed=1)

    def in_chunks(self, *lengths: int) -> dict[int, float]:
        """The prompt alone; the last length is repeated as long as there is more."""
        subject = sequence("subject", self.prompt)
        remaining = list(lengths)
        while subject.num_computed < len(self.prompt):
            length = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            self.driver.step((subject, min(length, len(self.prompt) - subject.num_computed)))
        return logprobs(subject.tokens[0])

    def among_others(self, num_others: int, last_chunk: int) -> dict[int, float]:
        """The prompt's last tokens in one step with decodes and chunks of other sequences, before and after it."""
        subject = sequence("subject", self.prompt)
        self.driver.step((subject, PROMPT_LENGTH - last_chunk))
        others = [sequence(f"other-{i}", prompt_of(5 + 11 * i, seed=2 + i)) for i in range(num_others)]
        for other in others[::2]:
            self.driver.step((other, len(other.prompt)))
        shares = [(other, 1 if other.tokens else len(other.prompt)) for other in others]
        middle = len(shares) // 2
        self.driver.step(*shares[:middle], (subject, last_chunk), *shares[middle:])
        return logprobs(subject.tokens[0])


def logprobs(token: SampledToken) -> dict[int, float]:
    return dict(token.top)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_neither_chunks_nor_company_change_the_answer(family: str, dtype: str, tmp_path: Path) -> None:
    measured = Measured(make_model(family, tmp_path), dtype)
    alone = measured.in_chunks(PROMPT_LENGTH)
    best = sorted(alone, key=lambda token_id: -alone[token_id])[: NUM_TOP // 2]
    others = {
        "chunks of 64": measured.in_chunks(64),
        "chunks of 7": measured.in_chunks(7),
        "a prompt, then one token at a time": measured.in_chunks(120, 1),
        "decoding among 3": measured.among_others(3, last_chunk=1),
        "decoding among 12": measured.among_others(12, last_chunk=1),
        "a chunk among 12": measured.among_others(12, last_chunk=33),
    }
    for name, found in others.items():
        worst = max(abs(found[token_id] - alone[token_id]) for token_id in best)
        assert worst <= TOLERANCE[dtype], f"{name}: off by {worst}"
