"""Asynchronous scheduling: a step is planned and launched while the one before it is in flight.

The bench's runner touches memory only when a step is collected, so whoever uses a block too early finds the wrong bytes in it.
"""

import pytest
from engine_bench import BLOCK_SIZE, LAYOUT, VOCAB_SIZE, Bench, continuation, request

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.kv_event_log import KVEventLog
from engine.request import EngineRequest, Mode
from engine.runner import PENDING, LaunchedStep, StepPlan, StepResult
from engine.simulated_runner import SimulatedRunner
from protocol.errors import Cancelled, DeadlineExceeded, Draining, InternalError
from protocol.ids import Incarnation, RequestId
from protocol.sampling import SamplingParams
from runtime.clock import ManualClock

PROMPT = list(range(3, 17))  # 14 tokens: three full blocks and a half


def bench(num_blocks: int = 64, **settings: object) -> Bench:
    return Bench(num_blocks, **({"async_scheduling": "on"} | settings))


def rows(busy: Bench, name: str) -> list[list[int]]:
    """The tokens of one request's chunks, step by step."""
    return [list(chunk.token_ids) for plan in busy.runner.plans for chunk in plan if chunk.request_id == name]


def test_the_next_step_begins_with_the_token_that_the_last_one_draws() -> None:
    busy = bench()
    assert busy.generate(request("a", PROMPT, max_tokens=4)).tokens == continuation(PROMPT, 4)
    assert rows(busy, "a") == [PROMPT, [PENDING], [PENDING], [PENDING]]


def test_results_come_a_step_later() -> None:
    busy = bench()
    busy.submit(request("a", PROMPT, max_tokens=3))
    heard = []
    while busy.step():
        heard.append(len(busy.heard["a"].tokens))
    assert heard == [0, 1, 2, 3]


def test_chunks_of_a_prompt_follow_one_another_without_waiting() -> None:
    busy = bench(max_num_batched_tokens=5)
    busy.submit(request("a", PROMPT, max_tokens=2))
    busy.step()
    busy.step()
    assert busy.core.in_flight
    assert busy.heard["a"].tokens == []
    busy.run()
    assert rows(busy, "a") == [PROMPT[:5], PROMPT[5:10], PROMPT[10:], [PENDING]]
    assert busy.core.load().computed_prompt_tokens == len(PROMPT)


def test_no_row_is_spent_behind_a_last_token_that_can_be_foreseen() -> None:
    for candidate in (
        request("a", PROMPT, max_tokens=1),
        request("a", PROMPT, Mode.PREFILL_ONLY, max_tokens=9),
        request("a", range(39), max_tokens=9),
    ):
        busy = bench(num_blocks=10)
        busy.generate(candidate)
        assert len(busy.runner.plans) == 1


def test_a_stop_token_leaves_a_row_behind_that_nobody_hears_of() -> None:
    whole = continuation(PROMPT, 5)
    busy = bench()
    heard = busy.generate(request("a", PROMPT, max_tokens=20, stop_token_ids=(whole[3],)))
    assert heard.tokens == whole[:4]
    assert len(rows(busy, "a")) == 5
    assert (busy.busy_blocks, busy.core.load().sampled_tokens) == (0, 4)


def test_penalties_wait_for_the_token_they_are_taken_over() -> None:
    sampling = SamplingParams(max_tokens=4, seed=0, presence_penalty=1.0)
    busy = bench()
    busy.submit(EngineRequest(RequestId("penalised"), tuple(PROMPT), sampling))
    busy.submit(request("plain", range(100, 110), max_tokens=6))
    busy.run()
    assert busy.heard["penalised"].tokens == continuation(PROMPT, 4)
    assert busy.heard["plain"].tokens == continuation(range(100, 110), 6)
    assert all(PENDING not in row for row in rows(busy, "penalised"))
    assert [PENDING] in rows(busy, "plain"), "it runs ahead once it is alone"
    assert len(busy.runner.plans) == 6, "the batch stays one batch"


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_blocks_of_one_that_leaves_wait_for_the_step_in_flight(end: str) -> None:
    """Another node would write the import into them while the step still does."""
    busy = bench(num_blocks=8)
    busy.submit(request("a", PROMPT, max_tokens=18, deadline_s=100.0))
    busy.step()
    busy.submit(request("b", range(200, 220), Mode.IMPORT))
    if end == "cancel":
        busy.cancel("a")
    else:
        busy.clock.advance(100.0)
        busy.core.schedule()
        busy.listen()
    assert isinstance(busy.heard["a"].error, Cancelled if end == "cancel" else DeadlineExceeded), "it is told at once"
    assert (busy.busy_blocks, busy.core.load().running) == (4, 0)
    assert busy.core.take_departed() == []
    assert busy.core.schedule() is None, "five blocks are not free"
    busy.run()
    assert busy.core.take_departed() == ["a"]
    assert busy.runner.forgotten == ["a"]
    assert busy.heard["b"].reserved is not None


def test_want_of_blocks_waits_for_results_before_it_preempts() -> None:
    busy = bench(num_blocks=6)
    old, young = list(range(10)), list(range(100, 110))
    busy.submit(request("old", old, max_tokens=12))
    busy.submit(request("young", young, max_tokens=12))
    busy.run()
    assert busy.core.load().preemptions > 0
    assert busy.heard["old"].tokens == continuation(old, 12)
    assert busy.heard["young"].tokens == continuation(young, 12)
    assert busy.busy_blocks == 0


def test_a_failed_step_takes_the_one_behind_it_along_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """The step fails with both sequences, then with one of them alone; the other goes on from what is known."""
    busy = bench()
    busy.submit(request("good", PROMPT, max_tokens=6))
    busy.submit(request("bad", range(100, 110), max_tokens=6))
    busy.step()
    busy.step()

    def fault(plan: StepPlan) -> StepResult | None:
        if any(chunk.request_id == "bad" for chunk in plan.chunks):
            raise RuntimeError("the device fell off")
        return None

    busy.runner.fault = fault
    busy.step()
    assert isinstance(busy.heard["bad"].error, InternalError)
    assert busy.heard["bad"].tokens == continuation(range(100, 110), 1)
    busy.runner.fault = None
    busy.run()
    assert busy.heard["good"].tokens == continuation(PROMPT, 6)
    assert busy.busy_blocks == 0
    assert "the device fell off" in caplog.text


def test_a_step_that_fails_once_costs_nobody_a_token() -> None:
    """The device goes on with the step behind, from a token that was never drawn; nothing of that may be seen."""
    prompts = {"a": PROMPT, "b": list(range(100, 110)), "c": list(range(200, 207))}
    for failing in range(1, 6):
        busy = bench()
        for name, prompt in prompts.items():
            busy.submit(request(name, prompt, max_tokens=8))
        for _ in range(failing):
            busy.step()

        def fault(_: StepPlan, busy: Bench = busy) -> StepResult | None:
            busy.runner.fault = None
            raise RuntimeError("a hiccup")

        busy.runner.fault = fault
        busy.run()
        for name, prompt in prompts.items():
            assert busy.heard[name].tokens == continuation(prompt, 8)
        assert busy.busy_blocks == 0


def test_a_launch_that_raises_is_a_step_that_failed() -> None:
    class Unlaunchable(SimulatedRunner):
        def launch(self, plan: StepPlan) -> LaunchedStep:
            if len(plan.chunks) > 1:
                raise RuntimeError("no two at once")
            return super().launch(plan)

    runner = Unlaunchable(LAYOUT, 16, vocab_size=VOCAB_SIZE, max_model_len=64, asynchronous=True)
    core = EngineCore(runner, EngineConfig(), ManualClock(), KVEventLog(Incarnation("i")))
    for name in "ab":
        core.submit(request(name, PROMPT, max_tokens=3), 0.0)
    while (schedule := core.schedule()) is not None or core.in_flight:
        core.run(schedule)
    assert core.load().sampled_tokens == 6


def test_close_waits_for_what_is_in_flight() -> None:
    busy = bench()
    busy.submit(request("a", PROMPT, max_tokens=9))
    busy.step()
    busy.step()
    busy.cancel("a")
    busy.submit(request("b", PROMPT, max_tokens=9))
    busy.step()
    assert busy.core.in_flight
    busy.core.close(Draining("the node is stopping"))
    busy.listen()
    assert not busy.core.in_flight
    assert isinstance(busy.heard["b"].error, Draining)
    assert busy.busy_blocks == 0


def test_phases_add_up_when_steps_overlap() -> None:
    """Each step takes a second, and the device begins the next when one has ended."""
    busy = bench(max_num_batched_tokens=5)
    heard = busy.generate(request("a", PROMPT, max_tokens=4))
    assert heard.computed is not None
    assert heard.finished is not None
    assert heard.computed.phases.prefill_s == 3.0
    assert heard.finished.decode.decode_s == 3.0


@pytest.mark.parametrize(
    ("setting", "asynchronous", "expected"), [("auto", True, 2), ("auto", False, 1), ("off", True, 1)]
)
def test_whether_to_run_ahead_is_the_runners_word_or_the_users(setting: str, asynchronous: bool, expected: int) -> None:
    runner = SimulatedRunner(LAYOUT, 16, vocab_size=VOCAB_SIZE, max_model_len=64, asynchronous=asynchronous)
    config = EngineConfig(async_scheduling=setting)  # type: ignore[arg-type]
    core = EngineCore(runner, config, ManualClock(), KVEventLog(Incarnation("i")))
    core.submit(request("a", range(BLOCK_SIZE), max_tokens=3), 0.0)
    core.run(core.schedule())
    assert core.load().sampled_tokens == 2 - expected
    core.close(Draining("the end"))
