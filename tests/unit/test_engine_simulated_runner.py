"""SimulatedRunner: tokens by hand, independent of how steps are cut; time by the cost model; memory that matters."""

import random
import subprocess
import sys

import pytest
from engine_bench import BLOCK_SIZE, LAYOUT, VOCAB_SIZE, Bench, continuation, request

from engine.runner import ScheduledChunk, StepPlan
from engine.simulated_runner import SimulatedCost, SimulatedRunner, next_token
from protocol.errors import ConfigError, HeadraceError
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken

GREEDY = SamplingParams(max_tokens=10, seed=0, temperature=0.0)


def chunk(
    context: list[int], start: int, end: int, sampling: SamplingParams = GREEDY, output: int = 0
) -> ScheduledChunk:
    return ScheduledChunk(
        request_id=RequestId("r"),
        token_ids=context[start:end],
        start=start,
        block_ids=range(LAYOUT.num_blocks_for(end)),
        samples=end == len(context),
        output_position=output,
        sampling=sampling,
        prompt_token_ids=context,
        output_token_ids=(),
    )


def runner(**options: object) -> SimulatedRunner:
    return SimulatedRunner(LAYOUT, 16, vocab_size=VOCAB_SIZE, max_model_len=64, **options)  # type: ignore[arg-type]


def sample(simulated: SimulatedRunner, *chunks: ScheduledChunk) -> list[int | None]:
    sampled = simulated.launch(StepPlan(chunks)).result().sampled
    assert not any(isinstance(tokens, HeadraceError) for tokens in sampled)
    return [tokens[0].token_id if isinstance(tokens, tuple) and tokens else None for tokens in sampled]


def test_the_rule_by_hand() -> None:
    # 1 * (4 + 1) + 2 * (0 + 1) + 3 * (9 + 1) = 37
    assert next_token([4, 0, 9], 1000) == 37
    assert next_token([4, 0, 9], 10) == 7
    assert continuation([4, 0, 9], 2) == [37, next_token([4, 0, 9, 37], VOCAB_SIZE)]


@pytest.mark.parametrize("stored", [True, False])
def test_cuts_do_not_matter(stored: bool) -> None:
    generator = random.Random(7)
    for _ in range(50):
        context = [generator.randrange(VOCAB_SIZE) for _ in range(generator.randint(1, 40))]
        cuts = sorted(generator.sample(range(1, len(context)), min(3, len(context) - 1)))
        simulated = runner(memory=memoryview(bytearray(16 * LAYOUT.block_bytes)) if stored else None)
        pieces = [chunk(context, start, end) for start, end in zip([0, *cuts], [*cuts, len(context)], strict=True)]
        results = [token for piece in pieces for token in sample(simulated, piece)]
        assert results == [None] * len(cuts) + [next_token(context, VOCAB_SIZE)]


def test_without_memory_a_context_computed_elsewhere_is_taken_from_the_request() -> None:
    context = list(range(10))
    assert sample(runner(), chunk(context, 9, 10)) == [next_token(context, VOCAB_SIZE)]


def test_with_memory_it_is_not() -> None:
    context = list(range(10))
    memory = memoryview(bytearray(16 * LAYOUT.block_bytes))
    assert sample(runner(memory=memory), chunk(context, 9, 10)) != [next_token(context, VOCAB_SIZE)]


def test_garbage_in_memory_is_no_crash() -> None:
    memory = memoryview(bytearray(b"\xff") * (16 * LAYOUT.block_bytes))
    assert len(sample(runner(memory=memory), chunk(list(range(10)), 9, 10))) == 1


def test_stop_tokens_are_stepped_over_before_min_tokens() -> None:
    context = [1, 2, 3]
    token = next_token(context, VOCAB_SIZE)
    stops = SamplingParams(max_tokens=9, seed=0, min_tokens=1, stop_token_ids=(token, token + 1))
    assert sample(runner(), chunk(context, 0, 3, stops, output=0)) == [token + 2]
    assert sample(runner(), chunk(context, 0, 3, stops, output=1)) == [token]


def test_log_probabilities_only_where_asked_for() -> None:
    context = [1, 2, 3]
    token = next_token(context, VOCAB_SIZE)
    for logprobs, expected in (
        (None, SampledToken(token)),
        (0, SampledToken(token, 0.0)),
        (2, SampledToken(token, 0.0, ((token, 0.0),))),
    ):
        sampling = SamplingParams(max_tokens=9, seed=0, logprobs=logprobs)
        assert runner().launch(StepPlan((chunk(context, 0, 3, sampling),))).result().sampled == ((expected,),)


def test_the_cost_model() -> None:
    slept: list[float] = []
    cost = SimulatedCost(step_s=1.0, prefill_token_s=0.25, decode_sequence_s=0.5)
    context = list(range(10))
    runner(cost=cost, sleep=slept.append).launch(StepPlan((chunk(context, 9, 10), chunk(context, 0, 8))))
    runner(sleep=slept.append).launch(StepPlan((chunk(context, 0, 8),)))
    assert slept == [1.0 + 8 * 0.25 + 0.5]


def test_memory_that_cannot_hold_the_sums_is_refused() -> None:
    with pytest.raises(ConfigError, match="not 16 blocks"):
        runner(memory=memoryview(bytearray(100)))
    thin = KVLayout(
        model="m",
        revision="1",
        dtype="bfloat16",
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        block_size=BLOCK_SIZE,
        rope="none",
    )
    with pytest.raises(ConfigError, match="8 bytes a token"):
        SimulatedRunner(thin, 1, vocab_size=9, max_model_len=9, memory=memoryview(bytearray(thin.block_bytes)))


def test_batch_neighbours_do_not_matter() -> None:
    generator = random.Random(3)
    prompts = [[generator.randrange(VOCAB_SIZE) for _ in range(generator.randint(1, 30))] for _ in range(12)]
    for budget, rows in ((7, 3), (64, 64), (1, 1)):
        bench = Bench(num_blocks=40, max_num_batched_tokens=budget, max_num_seqs=rows)
        for number in generator.sample(range(12), 12):
            bench.submit(request(f"r{number}", prompts[number], max_tokens=9))
        bench.run()
        for number, prompt in enumerate(prompts):
            assert bench.heard[f"r{number}"].tokens == continuation(prompt, 9)


def test_no_tensor_library_is_needed() -> None:
    code = (
        "import sys, engine.engine, engine.simulated_runner; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
