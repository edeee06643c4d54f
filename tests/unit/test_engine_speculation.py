"""Guesses: what prompt lookup finds, when it is asked, and that nobody can tell from the tokens."""

import random
import tracemalloc

import pytest
from engine_bench import VOCAB_SIZE, Bench, Oracle, continuation, request
from hypothesis import given
from hypothesis import strategies as st

from engine.build import engine_config
from engine.config import EngineConfig, SpeculationConfig
from engine.request import EngineRequest, Mode
from engine.speculation import INDEXED_PER_SEQUENCE, INDEXED_PER_STEP, MAX_PAUSE, NgramDrafter
from protocol.errors import ConfigError
from protocol.ids import RequestId
from protocol.sampling import SamplingParams
from runtime.node_config import NodeConfig, SchedulerOptions

R = RequestId("r")
PROMPT = list(range(3, 17))


def lookup(token_ids: list[int], count: int, min_n: int, max_n: int, max_places: int = 1000) -> list[int]:
    """The rule, by scanning."""
    for size in range(max_n, min_n - 1, -1):
        for place in range(len(token_ids) - 1, max(size, len(token_ids) - max_places) - 1, -1):
            if token_ids[place - size : place] == token_ids[-size:]:
                return token_ids[place : place + count]
    return []


class Always:
    """Guesses the same wrong thing each time, and counts how often it was asked and for how many steps."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.num_steps = 0

    def begin_step(self) -> None:
        self.num_steps += 1

    def propose(self, request_id: RequestId, token_ids: object, max_drafts: int) -> list[int]:
        self.num_asked += 1
        return [VOCAB_SIZE - 1] * max_drafts

    def forget(self, request_id: RequestId) -> None:
        """It remembers nothing of anybody."""


def speculating(num_draft_tokens: int = 3, num_blocks: int = 64, **settings: object) -> Bench:
    speculation = SpeculationConfig(num_draft_tokens=num_draft_tokens)
    return Bench(num_blocks, **({"drafter": Oracle(), "speculation": speculation} | settings))


# Prompt lookup.


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 3), st.integers(0, 2), st.integers(1, 5))
def test_lookup_equals_a_scan_at_every_length(token_ids: list[int], min_n: int, more: int, count: int) -> None:
    drafter = NgramDrafter(min_n, min_n + more)
    for end in range(1, len(token_ids) + 1):
        so_far = token_ids[:end]
        assert drafter.propose(R, so_far, count) == lookup(so_far, count, min_n, min_n + more)


def test_the_latest_occurrence_of_the_longest_match_wins() -> None:
    drafter = NgramDrafter(1, 3)
    assert drafter.propose(R, [1, 2, 3, 9, 2, 3, 8, 3, 7, 1, 2, 3], 2) == [9, 2]
    assert drafter.propose(RequestId("s"), [5, 1, 6, 1, 7, 1], 1) == [7]
    assert drafter.propose(RequestId("t"), [1, 2, 3], 4) == []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 10), st.integers(1, 9))
def test_lookup_equals_a_scan_of_the_last_tokens(token_ids: list[int], part: int, stride: int) -> None:
    drafter = NgramDrafter(1, 3, max_indexed=2 * part)
    for end in range(1, len(token_ids) + 1, stride):
        so_far = token_ids[:end]
        known = part + (end - 1) % part + 1
        assert drafter.propose(R, so_far, 4) == lookup(so_far, 4, 1, 3, known)


def long_prompt(length: int, repeated_at: int) -> list[int]:
    """Its last two tokens also stand at `repeated_at`, and nowhere else."""
    generator = random.Random(length)
    prompt = [generator.randrange(3, 10_000) for _ in range(length)]
    prompt[repeated_at : repeated_at + 2] = prompt[-2:] = [1, 2]
    return prompt


def test_a_long_prompt_is_indexed_little_by_little() -> None:
    prompt = long_prompt(5 * INDEXED_PER_STEP, repeated_at=4 * INDEXED_PER_STEP - 100)
    drafter = NgramDrafter(2, 2)
    guesses = []
    for _ in range(5):
        drafter.begin_step()
        guesses += [drafter.propose(R, prompt, 2), drafter.propose(R, prompt, 2)]
    found = prompt[4 * INDEXED_PER_STEP - 98 :][:2]
    assert guesses == [[]] * 6 + [found] * 4


def test_sequences_share_the_indexing_of_a_step() -> None:
    """Each would be found in one step, had it the step for itself."""
    prompt = long_prompt(INDEXED_PER_STEP, repeated_at=INDEXED_PER_STEP - 100)
    first, second = RequestId("first"), RequestId("second")
    drafter = NgramDrafter(2, 2)
    found = prompt[-98:][:2]
    drafter.begin_step()
    assert [drafter.propose(name, prompt, 2) for name in (first, second)] == [found, []]
    drafter.begin_step()
    assert [drafter.propose(name, prompt, 2) for name in (first, second)] == [found, found]


@pytest.mark.parametrize(("distance", "known"), [(INDEXED_PER_SEQUENCE // 2, True), (INDEXED_PER_SEQUENCE + 10, False)])
def test_only_the_last_tokens_of_a_very_long_prompt_are_known(distance: int, known: bool) -> None:
    prompt = long_prompt(INDEXED_PER_SEQUENCE + 500, repeated_at=INDEXED_PER_SEQUENCE + 500 - distance)
    drafter = NgramDrafter(2, 2)
    for _ in range(INDEXED_PER_SEQUENCE // INDEXED_PER_STEP):
        drafter.begin_step()
        guesses = drafter.propose(R, prompt, 2)
    assert bool(guesses) == known


def test_a_sequence_that_grows_on_takes_no_more_memory() -> None:
    generator = random.Random(2)
    tokens = [generator.randrange(10_000) for _ in range(40 * 256)]
    drafter = NgramDrafter(2, 4, max_indexed=256)
    sizes = []
    tracemalloc.start()
    try:
        for end in range(256, len(tokens), 32):
            drafter.begin_step()
            drafter.propose(R, tokens[:end], 4)
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    half = len(sizes) // 2
    assert max(sizes[half:]) < 1.2 * max(sizes[:half])
    assert max(sizes) < 256 * 3 * 250, "bytes of 3 n-grams a token, twice over"


def test_what_is_forgotten_is_looked_up_anew() -> None:
    drafter = NgramDrafter(1, 1)
    assert drafter.propose(R, [1, 2, 1], 1) == [2]
    drafter.forget(R)
    assert drafter.propose(R, [1, 3, 1], 1) == [3]


# In the engine.


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
@pytest.mark.parametrize("num_draft_tokens", [1, 3, 8])
def test_tokens_are_those_without_guesses_in_fewer_steps(num_draft_tokens: int, async_scheduling: str) -> None:
    bench = speculating(num_draft_tokens, async_scheduling=async_scheduling)
    for name, prompt in (("a", PROMPT), ("b", range(200, 209))):
        bench.submit(request(name, prompt, max_tokens=30))
    bench.run()
    for name, prompt in (("a", PROMPT), ("b", range(200, 209))):
        assert bench.heard[name].tokens == continuation(prompt, 30)
    load = bench.core.load()
    accepted = sum(number * count for number, count in enumerate(load.accepted_drafts))
    assert 0 < accepted < load.draft_tokens
    assert len(bench.runner.plans) < 30
    assert load.sampled_tokens == 60
    assert bench.busy_blocks == 0


def test_a_stop_token_among_right_guesses_is_the_last_token() -> None:
    whole = continuation(PROMPT, 30)
    for place in range(1, 12):
        heard = speculating(8).generate(request("a", PROMPT, max_tokens=30, stop_token_ids=(whole[place],)))
        assert heard.tokens == whole[: place + 1]
        assert heard.finished is not None
        assert heard.finished.stop_token_id == whole[place]


def test_no_stop_token_before_the_minimum_length() -> None:
    whole = continuation(PROMPT, 2)
    plain, guessing = Bench(), speculating(8)
    candidate = request("a", PROMPT, max_tokens=20, stop_token_ids=tuple(whole), min_tokens=6)
    assert guessing.generate(candidate).tokens == plain.generate(candidate).tokens


def test_lengths_are_kept_and_so_is_the_pool() -> None:
    for max_tokens in range(1, 12):
        heard = speculating(8).generate(request("a", PROMPT, max_tokens=max_tokens))
        assert heard.tokens == continuation(PROMPT, max_tokens)
    bench = speculating(8, num_blocks=5)
    assert bench.generate(request("a", PROMPT, max_tokens=100)).tokens == continuation(PROMPT, 6)
    assert bench.busy_blocks == 0


def test_only_accepted_tokens_are_in_the_prefix_cache() -> None:
    bench = speculating(6)
    answer = bench.generate(request("a", PROMPT, max_tokens=20)).tokens
    following = [*PROMPT, *answer, 5]
    assert bench.generate(request("b", following, max_tokens=9)).tokens == continuation(following, 9)


def test_guesses_stay_within_the_budget_and_give_way_to_prefill() -> None:
    bench = speculating(6, max_num_batched_tokens=8)
    bench.submit(request("a", PROMPT[:6], max_tokens=40))
    bench.step()
    bench.step()
    assert len(bench.runner.plans[-1][0].token_ids) > 1
    bench.submit(request("b", range(100, 140), max_tokens=1))
    while not bench.heard["b"].over:
        bench.step()
        assert [chunk.num_drafts for chunk in bench.runner.plans[-1]] in ([0, 0], [1, 0])
    bench.run()
    assert bench.heard["a"].tokens == continuation(PROMPT[:6], 40)


def test_an_import_that_waits_for_room_leaves_others_their_guesses() -> None:
    bench = speculating(num_blocks=30, async_scheduling="off")
    bench.submit(request("running", PROMPT, max_tokens=60))
    bench.step()
    bench.submit(request("waiting", range(3, 203), mode=Mode.IMPORT))
    while not bench.heard["running"].over:
        bench.step()
    assert bench.core.load().draft_tokens > 30
    bench.cancel("waiting")


def test_nothing_is_guessed_for_a_prefill_or_under_penalties() -> None:
    sampling = SamplingParams(max_tokens=9, seed=0, frequency_penalty=0.5)
    bench = speculating(4)
    bench.submit(request("prefill", PROMPT, Mode.PREFILL_ONLY, max_tokens=9))
    bench.submit(EngineRequest(RequestId("penalised"), tuple(PROMPT), sampling))
    bench.run()
    assert bench.core.load().draft_tokens == 0
    assert bench.heard["penalised"].tokens == continuation(PROMPT, 9)


def test_wrong_guesses_become_rare_and_right_ones_long_again() -> None:
    drafter = Always()
    bench = speculating(8, num_blocks=128, drafter=drafter)
    bench.generate(request("a", PROMPT, max_tokens=400))
    assert drafter.num_asked < 20, f"at most every {MAX_PAUSE} tokens, in the long run"
    load = bench.core.load()
    assert load.draft_tokens < 40
    assert load.accepted_drafts[1:] == (0,) * 8


def test_the_drafter_hears_of_every_step_once() -> None:
    drafter = Always()
    bench = speculating(num_blocks=128, drafter=drafter, async_scheduling="on")
    for name in ("a", "b"):
        bench.submit(request(name, PROMPT, max_tokens=50))
    bench.run()
    assert len(bench.runner.plans) <= drafter.num_steps <= len(bench.runner.plans) + 2, "some plans are empty"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_draft_tokens", 0),
        ("num_draft_tokens", 16),
        ("ngram_min", 0),
        ("ngram_min", 9),
        ("ngram_max", 1),
        ("ngram_max", 9),
    ],
)
def test_a_setting_that_cannot_work_is_named(setting: str, value: int) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(speculation=SpeculationConfig(**{setting: value}))
    assert caught.value.param == setting


def test_flags_reach_the_engine() -> None:
    options = SchedulerOptions(speculation="ngram", num_draft_tokens=6, max_prefill_chunk=64, async_scheduling="on")
    config = engine_config(NodeConfig(scheduler=options), "cpu")
    assert config.speculation == SpeculationConfig(num_draft_tokens=6, ngram_min=2, ngram_max=4)
    assert (config.max_prefill_chunk, config.async_scheduling) == (64, "on")
    plain = engine_config(NodeConfig(), "cpu")
    assert (plain.speculation, plain.max_prefill_chunk, plain.async_scheduling) == (None, None, "auto")


def test_the_token_budget_depends_on_the_device_unless_it_is_set() -> None:
    budgets = [engine_config(NodeConfig(), device).max_num_batched_tokens for device in ("cpu", "cuda")]
    assert budgets == [128, 2048]
    chosen = NodeConfig(scheduler=SchedulerOptions(max_num_batched_tokens=77))
    assert engine_config(chosen, "cuda").max_num_batched_tokens == 77
