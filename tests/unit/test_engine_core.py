"""EngineCore: prefix reuse, hand-over of contexts, ends of all kinds, phases."""

import pytest
from engine_bench import BLOCK_SIZE, VOCAB_SIZE, Bench, Heard, continuation, request

from engine.admission import check_request
from engine.request import Mode
from engine.runner import StepPlan, StepResult
from protocol.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidParameter,
    PeerLost,
    PromptTooLong,
)
from protocol.tokens import SampledToken

PROMPT = list(range(3, 17))  # 14 tokens: three full blocks and a half


@pytest.fixture(autouse=True, params=["off", "on"])
def with_and_without_running_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is true of requests is true either way. Tests of single steps ask for one at a time."""
    monkeypatch.setitem(Bench.DEFAULTS, "async_scheduling", request.param)


def hand_over(prefill: Bench, decode: Bench, request_id: str, skip: tuple[int, ...] = ()) -> None:
    """Copy the blocks that decode lacks, except `skip`."""
    exported, reserved = prefill.heard[request_id], decode.heard[request_id].reserved
    assert reserved is not None
    for index in range(reserved.num_cached_blocks, len(reserved.block_ids)):
        if index not in skip:
            decode.runner.import_block(prefill.runner.memory, exported.block_ids[index], reserved.block_ids[index])


# Prefix reuse.


def test_a_second_prompt_computes_only_what_is_new() -> None:
    bench = Bench()
    bench.generate(request("a", PROMPT))
    before = bench.core.load().computed_prompt_tokens
    longer = [*PROMPT, 900, 901, 902]
    heard = bench.generate(request("b", longer))
    assert heard.tokens == continuation(longer, 4)
    assert heard.computed is not None
    assert heard.computed.num_cached_tokens == 12
    assert bench.core.load().computed_prompt_tokens - before == len(longer) - 12


def test_the_next_turn_of_a_chat_reuses_the_answer_too() -> None:
    bench = Bench()
    answer = bench.generate(request("a", PROMPT, max_tokens=9)).tokens
    heard = bench.generate(request("b", PROMPT + answer + [5]))
    assert heard.computed is not None
    # The last token of the answer was sampled but never computed: 22 of 23 tokens, five full blocks.
    assert heard.computed.num_cached_tokens == 20


def test_at_least_one_token_is_computed() -> None:
    bench = Bench()
    prompt = list(range(2 * BLOCK_SIZE))
    first, second = (bench.generate(request(name, prompt)) for name in "ab")
    assert first.tokens == second.tokens
    assert second.computed is not None
    assert second.computed.num_cached_tokens == BLOCK_SIZE


def test_a_salt_keeps_tenants_apart() -> None:
    bench = Bench()
    bench.generate(request("a", PROMPT, cache_salt="x"))
    for name, salt, cached in (("b", "y", 0), ("c", None, 0), ("d", "x", 12)):
        computed = bench.generate(request(name, PROMPT, cache_salt=salt)).computed
        assert computed is not None
        assert computed.num_cached_tokens == cached


def test_without_prefix_cache_nothing_is_reused_or_reported() -> None:
    bench = Bench(enable_prefix_cache=False)
    for name in "ab":
        computed = bench.generate(request(name, PROMPT)).computed
        assert computed is not None
        assert computed.num_cached_tokens == 0
    assert bench.kv_events.take() is None


def test_cached_blocks_last_until_they_are_needed() -> None:
    bench = Bench(num_blocks=8)
    bench.generate(request("a", PROMPT, max_tokens=1))
    bench.generate(request("other", range(500, 528), max_tokens=1))
    computed = bench.generate(request("b", PROMPT, max_tokens=1)).computed
    assert computed is not None
    assert computed.num_cached_tokens == BLOCK_SIZE, "five free blocks and the tail of a's three went to the other"
    assert bench.busy_blocks == 0


def test_clearing_the_cache_forgets_addresses_but_not_what_runs() -> None:
    bench = Bench(async_scheduling="off")
    bench.submit(request("a", PROMPT, max_tokens=12))
    bench.step()
    bench.core.clear_prefix_cache()
    bench.run()
    assert bench.heard["a"].tokens == continuation(PROMPT, 12)
    computed = bench.generate(request("b", PROMPT)).computed
    assert computed is not None
    assert computed.num_cached_tokens == 0
    assert bench.busy_blocks == 0


def test_identical_prompts_at_once_are_both_right() -> None:
    bench = Bench(max_num_batched_tokens=64)
    for name in "abc":
        bench.submit(request(name, PROMPT, max_tokens=10))
    bench.run()
    assert [bench.heard[name].tokens for name in "abc"] == [continuation(PROMPT, 10)] * 3
    assert bench.busy_blocks == 0


# Hand-over.


def test_a_context_changes_hands_and_the_tokens_are_the_same() -> None:
    prefill, decode = Bench(max_num_batched_tokens=5), Bench()
    prefill.submit(request("r", PROMPT, Mode.PREFILL_ONLY, max_tokens=8))
    decode.submit(request("r", PROMPT, Mode.IMPORT, max_tokens=8))
    prefill.run()
    decode.run()
    hand_over(prefill, decode, "r")
    decode.activate("r", prefill.heard["r"].tokens[0])
    decode.run()
    assert decode.heard["r"].tokens == continuation(PROMPT, 8)
    assert prefill.busy_blocks == 4
    prefill.release("r")
    assert (prefill.busy_blocks, decode.busy_blocks) == (0, 0)
    assert decode.core.load().computed_prompt_tokens == 0


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_a_block_that_did_not_move_shows(missing: int) -> None:
    prefill, decode = Bench(), Bench()
    prefill.submit(request("r", PROMPT, Mode.PREFILL_ONLY, max_tokens=3))
    decode.submit(request("r", PROMPT, Mode.IMPORT, max_tokens=3))
    prefill.run()
    decode.run()
    hand_over(prefill, decode, "r", skip=(missing,))
    decode.activate("r", prefill.heard["r"].tokens[0])
    decode.run()
    assert decode.heard["r"].tokens != continuation(PROMPT, 3)


def test_blocks_are_announced_as_they_fill_and_those_of_the_cache_first() -> None:
    bench = Bench(max_num_batched_tokens=5, async_scheduling="off")
    bench.submit(request("a", PROMPT, Mode.PREFILL_ONLY))
    announced = []
    while bench.step():
        announced.append(len(bench.heard["a"].block_ids))
    assert announced == [1, 2, 4]
    bench.submit(request("b", PROMPT, Mode.PREFILL_ONLY))
    bench.core.schedule()
    bench.listen()
    assert bench.heard["b"].block_ids == bench.heard["a"].block_ids[:3], "before anything is computed"


def test_an_import_that_is_cached_whole_moves_nothing() -> None:
    bench = Bench()
    prompt = list(range(2 * BLOCK_SIZE))
    first = bench.generate(request("a", prompt)).tokens[0]
    bench.submit(request("b", prompt, Mode.IMPORT))
    bench.run()
    reserved = bench.heard["b"].reserved
    assert reserved is not None
    assert reserved.num_cached_blocks == len(reserved.block_ids) == 2
    bench.activate("b", first)
    bench.run()
    assert bench.heard["b"].tokens == continuation(prompt, 4)


def test_an_imported_context_is_in_the_prefix_cache() -> None:
    prefill, decode = Bench(), Bench()
    prefill.submit(request("r", PROMPT, Mode.PREFILL_ONLY))
    decode.submit(request("r", PROMPT, Mode.IMPORT))
    prefill.run()
    decode.run()
    hand_over(prefill, decode, "r")
    decode.activate("r", prefill.heard["r"].tokens[0])
    computed = decode.generate(request("s", PROMPT)).computed
    assert computed is not None
    assert computed.num_cached_tokens == 12


def test_what_arrived_before_a_failure_is_kept() -> None:
    prefill, decode = Bench(), Bench()
    prefill.submit(request("r", PROMPT, Mode.PREFILL_ONLY))
    decode.submit(request("r", PROMPT, Mode.IMPORT))
    prefill.run()
    decode.run()
    hand_over(prefill, decode, "r", skip=(2, 3))
    decode.abandon("r", 2 * BLOCK_SIZE + 1, PeerLost("the prefill node died"))
    assert isinstance(decode.heard["r"].error, PeerLost)
    assert decode.busy_blocks == 0
    again = decode.generate(request("again", PROMPT))
    assert again.tokens == continuation(PROMPT, 4)
    assert again.computed is not None
    assert again.computed.num_cached_tokens == 2 * BLOCK_SIZE


@pytest.mark.parametrize("end", ["activate", "abandon"])
def test_a_cancelled_import_keeps_its_blocks_until_the_transfer_has_ended(end: str) -> None:
    bench = Bench()
    bench.submit(request("r", PROMPT, Mode.IMPORT))
    bench.run()
    bench.cancel("r")
    assert isinstance(bench.heard["r"].error, Cancelled)
    assert (bench.busy_blocks, bench.core.load().num_importing) == (4, 1)
    if end == "activate":
        bench.activate("r", 1)
    else:
        bench.abandon("r", 0, PeerLost("late"))
    assert (bench.busy_blocks, bench.core.load().num_importing) == (0, 0)
    bench.activate("r", 1)
    bench.abandon("r", 0, PeerLost("twice is no error"))


def test_a_cancelled_import_gives_its_place_in_the_batch_away_at_once() -> None:
    bench = Bench(max_num_seqs=1)
    bench.submit(request("r", PROMPT, Mode.IMPORT))
    bench.submit(request("next", PROMPT))
    bench.run()
    assert not bench.heard["next"].over
    bench.cancel("r")
    bench.run()
    assert bench.heard["next"].tokens == continuation(PROMPT, 4)


def test_an_import_may_end_with_its_first_token() -> None:
    bench = Bench()
    bench.submit(request("r", PROMPT, Mode.IMPORT, max_tokens=1))
    bench.run()
    bench.activate("r", 7)
    heard = bench.heard["r"]
    assert heard.tokens == [7]
    assert heard.finished is not None
    assert heard.finished.reason == "length"
    assert bench.busy_blocks == 0


def test_emitted_tokens_are_context_and_count_as_output() -> None:
    bench = Bench()
    whole = continuation(PROMPT, 6)
    heard = bench.generate(request("r", PROMPT, emitted=whole[:4], max_tokens=6))
    assert heard.tokens == whole[4:]


# Ends.


def test_a_stop_token_is_the_last_token_and_wins_over_the_length() -> None:
    whole = continuation(PROMPT, 3)
    heard = Bench().generate(request("r", PROMPT, max_tokens=3, stop_token_ids=(whole[2],)))
    assert heard.tokens == whole
    assert heard.finished is not None
    assert (heard.finished.reason, heard.finished.stop_token_id) == ("stop", whole[2])


def test_stop_tokens_are_not_honoured_before_min_tokens() -> None:
    first = continuation(PROMPT, 1)[0]
    bench = Bench()
    bench.submit(request("r", PROMPT, Mode.IMPORT, max_tokens=3, stop_token_ids=(first,), min_tokens=1))
    bench.run()
    bench.activate("r", first)
    assert not bench.heard["r"].over
    bench.submit(request("s", PROMPT, Mode.IMPORT, max_tokens=3, stop_token_ids=(first,)))
    bench.run()
    bench.activate("s", first)
    finished = bench.heard["s"].finished
    assert finished is not None
    assert finished.reason == "stop"


def test_a_prefill_says_that_its_token_was_the_last_and_is_held_all_the_same() -> None:
    first = continuation(PROMPT, 1)[0]
    bench = Bench()
    for name, limit, stops in (("a", 1, ()), ("b", 5, (first,)), ("c", 5, ())):
        bench.submit(request(name, PROMPT, Mode.PREFILL_ONLY, max_tokens=limit, stop_token_ids=stops))
    bench.run()
    ends = [bench.heard[name].prefill for name in "abc"]
    assert [end and (end.finish_reason, end.stop_token_id) for end in ends] == [
        ("length", None),
        ("stop", first),
        (None, None),
    ]
    assert bench.core.load().num_held == 3
    for name in "abc":
        bench.release(name)
    assert bench.busy_blocks == 0


def test_max_model_len_ends_a_sequence() -> None:
    heard = Bench(max_model_len=16).generate(request("r", PROMPT, max_tokens=100))
    assert heard.tokens == continuation(PROMPT, 2)
    assert heard.finished is not None
    assert heard.finished.reason == "length"


def test_a_release_during_the_prefill_means_no_hold() -> None:
    bench = Bench(max_num_batched_tokens=5)
    bench.submit(request("r", PROMPT, Mode.PREFILL_ONLY))
    bench.step()
    bench.release("r")
    bench.run()
    assert bench.heard["r"].prefill is not None
    assert bench.busy_blocks == 0


@pytest.mark.parametrize("mode", [Mode.GENERATE, Mode.PREFILL_ONLY])
def test_cancel_frees_at_once_what_nobody_reads(mode: Mode) -> None:
    bench = Bench(max_num_batched_tokens=BLOCK_SIZE - 1, async_scheduling="off")
    bench.submit(request("running", PROMPT, mode))
    bench.step()
    bench.submit(request("waiting", range(200, 210), mode))
    bench.cancel("running", "waiting", "unknown")
    assert all(isinstance(bench.heard[name].error, Cancelled) for name in ("running", "waiting"))
    assert bench.busy_blocks == 0
    assert not bench.step()
    assert bench.runner.forgotten == ["running", "waiting"]


def test_cancelling_a_held_prefill_is_silent_and_leaves_its_blocks_to_its_reader() -> None:
    bench = Bench()
    bench.generate(request("r", PROMPT, Mode.PREFILL_ONLY))
    bench.cancel("r")
    assert bench.heard["r"].error is None
    assert bench.busy_blocks == len(bench.heard["r"].block_ids)
    bench.release("r")
    assert bench.busy_blocks == 0


def test_deadlines_end_what_waits_runs_or_lands_but_not_what_is_held() -> None:
    bench = Bench(num_blocks=16, async_scheduling="off")
    bench.generate(request("held", PROMPT, Mode.PREFILL_ONLY, deadline_s=10))
    bench.submit(request("landing", range(100, 116), Mode.IMPORT, deadline_s=20))
    bench.submit(request("running", range(200, 210), max_tokens=30, deadline_s=20))
    bench.submit(request("patient", range(300, 310), max_tokens=12))
    bench.submit(request("waiting", range(400, 420), deadline_s=20))
    bench.step()
    bench.clock.advance(19)
    bench.step()
    for name in ("landing", "running", "waiting"):
        assert isinstance(bench.heard[name].error, DeadlineExceeded)
    assert bench.heard["held"].error is None
    bench.run()
    assert bench.heard["patient"].tokens == continuation(range(300, 310), 12)
    assert bench.core.load().num_importing == 1
    bench.activate("landing", 1)
    bench.release("held")
    assert bench.busy_blocks == 0


def test_a_failed_step_fails_its_sequences_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(num_blocks=8, async_scheduling="off")
    bench.submit(request("a", PROMPT, max_tokens=20))
    bench.submit(request("b", range(100, 112), max_tokens=2))
    bench.submit(request("waiting", range(200, 220), max_tokens=2))

    def fault(plan: StepPlan) -> StepResult:
        raise RuntimeError("the device fell off")

    bench.runner.fault = fault
    bench.step()
    bench.runner.fault = None
    bench.run()
    assert all(isinstance(bench.heard[name].error, InternalError) for name in "ab")
    assert "the device fell off" in caplog.text
    assert bench.heard["waiting"].tokens == continuation(range(200, 220), 2)
    computed = bench.generate(request("again", PROMPT)).computed
    assert computed is not None
    assert computed.num_cached_tokens == 0, "what a failed step wrote is not believed"


def test_one_bad_sequence_does_not_take_the_others_along() -> None:
    bench = Bench()
    bench.submit(request("bad", PROMPT))
    bench.submit(request("good", range(100, 110)))

    def fault(plan: StepPlan) -> StepResult | None:
        if plan.chunks[0].request_id != "bad":
            return None
        sampled = SampledToken(continuation(range(100, 110), 1)[0])
        bench.runner.fault = None
        computed = bench.runner.compute(StepPlan(plan.chunks))
        assert computed.sampled[1] == (sampled,)
        return StepResult((InternalError("not finite"), (sampled,)))

    bench.runner.fault = fault
    bench.run()
    assert isinstance(bench.heard["bad"].error, InternalError)
    assert bench.heard["good"].tokens == continuation(range(100, 110), 4)
    assert bench.busy_blocks == 0


@pytest.mark.parametrize("sampled", [(), ((),), ((SampledToken(1), SampledToken(2)),)])
def test_a_runner_that_breaks_its_contract_is_an_internal_error(sampled: tuple[tuple[SampledToken, ...], ...]) -> None:
    bench = Bench()
    bench.runner.fault = lambda plan: StepResult(sampled)
    assert isinstance(bench.generate(request("r", PROMPT)).error, InternalError)
    assert bench.busy_blocks == 0


def test_close_fails_what_is_left_and_frees_everything() -> None:
    bench = Bench(num_blocks=24, max_num_batched_tokens=20)
    bench.generate(request("held", PROMPT, Mode.PREFILL_ONLY))
    for name in ("landing", "orphan"):
        bench.submit(request(name, range(100, 110), Mode.IMPORT))
    bench.submit(request("running", range(200, 210), max_tokens=30))
    bench.step()
    bench.submit(request("waiting", range(300, 340)))
    bench.cancel("orphan")
    bench.core.close(Draining("the node is stopping"))
    bench.listen()
    for name in ("landing", "running", "waiting"):
        assert isinstance(bench.heard[name].error, Draining)
    assert isinstance(bench.heard["orphan"].error, Cancelled)
    assert bench.busy_blocks == 0


@pytest.mark.parametrize(
    ("prompt", "emitted", "error"),
    [
        ([], [], InvalidParameter),
        ([VOCAB_SIZE], [], InvalidParameter),
        ([-1], [], InvalidParameter),
        ([1], [VOCAB_SIZE], InvalidParameter),
        ([1], [1, 2, 3, 4], InvalidParameter),
        ([1] * 20, [], PromptTooLong),
        ([1] * 18, [1, 1], PromptTooLong),
        ([1] * 19, [], None),
    ],
)
def test_what_can_never_run_is_refused(prompt: list[int], emitted: list[int], error: type[Exception] | None) -> None:
    bench = Bench(num_blocks=5)
    candidate = request("r", prompt, emitted=emitted)
    if error is None:
        check_request(candidate, bench.runner)
        assert bench.generate(candidate).finished is not None
        return
    with pytest.raises(error):
        check_request(candidate, bench.runner)


# Phases. Every step of the bench takes one second.


def ledger(heard: Heard) -> list[float]:
    assert heard.computed is not None
    assert heard.finished is not None
    prefill, decode = heard.computed.phases, heard.finished.decode
    return [prefill.queue_s, prefill.prefill_s, decode.handoff_s, decode.decode_s]


def test_phases_of_a_local_request() -> None:
    bench = Bench(max_num_batched_tokens=5)
    bench.submit(request("r", PROMPT, max_tokens=4))
    bench.clock.advance(0.5)
    bench.run()
    assert ledger(bench.heard["r"]) == [0.5, 3.0, 0.0, 3.0]
    assert ledger(bench.generate(request("one", range(500, 504), max_tokens=1))) == [0.0, 1.0, 0.0, 0.0]


def test_phases_of_a_hand_off() -> None:
    bench = Bench()
    bench.submit(request("r", PROMPT, Mode.IMPORT, max_tokens=3))
    bench.submit(request("short", PROMPT, Mode.IMPORT, max_tokens=1))
    bench.submit(request("unknown", PROMPT, Mode.IMPORT, max_tokens=2))
    bench.run()
    computed_at = bench.clock.now()
    bench.clock.advance(2.0)
    bench.activate("short", 1, computed_at)
    bench.activate("r", 1, computed_at)
    bench.activate("unknown", 1, None)
    bench.clock.advance(0.25)
    bench.run()
    phases = {name: heard.finished and heard.finished.decode for name, heard in bench.heard.items()}
    assert [(p.handoff_s, p.decode_s) for p in phases.values() if p] == [(2.25, 2.0), (2.0, 0.0), (0.25, 1.0)]


def test_phases_of_a_prefill() -> None:
    bench = Bench(max_num_batched_tokens=5)
    bench.submit(request("r", PROMPT, Mode.PREFILL_ONLY))
    bench.clock.advance(4.0)
    bench.run()
    end = bench.heard["r"].prefill
    assert end is not None
    assert (end.phases.queue_s, end.phases.prefill_s) == (4.0, 3.0)
    assert end.computed_at == bench.clock.now()
