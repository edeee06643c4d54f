"""Engine: the thread around the core. Commands from outside, events, overload, stop, health."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from engine_bench import LAYOUT, VOCAB_SIZE, continuation, request
from prometheus_client import CollectorRegistry

from engine.config import EngineConfig, SpeculationConfig
from engine.engine import Engine
from engine.events import EngineEvent, Failed, Finished, PrefillFinished, Reserved, TokensSampled
from engine.request import Mode
from engine.runner import StepPlan, StepResult
from engine.simulated_runner import SimulatedRunner
from engine.telemetry import EngineTelemetry
from protocol.errors import Cancelled, DeadlineExceeded, Draining, InternalError, InvalidParameter, Overloaded
from protocol.ids import Incarnation, RequestId
from protocol.kv_events import AllBlocksCleared, BlocksStored
from protocol.tokens import SampledToken
from runtime.clock import Clock, ManualClock, MonotonicClock
from runtime.metrics import EngineMetrics

WAIT_S = 20.0
A, B = RequestId("a"), RequestId("b")


class GatedRunner(SimulatedRunner):
    """Stands still in a step for as long as `gate` is closed."""

    def __init__(self, num_blocks: int = 64, *, asynchronous: bool = False) -> None:
        super().__init__(LAYOUT, num_blocks, vocab_size=VOCAB_SIZE, max_model_len=1000, asynchronous=asynchronous)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def compute(self, plan: StepPlan) -> StepResult:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        return super().compute(plan)


class Listener:
    """Collects events; waits for what a test wants to see."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def __call__(self, events: list[EngineEvent]) -> None:
        assert events
        with self._changed:
            self.threads.add(threading.current_thread().name)
            self.events += events
            self._changed.notify_all()

    def wait_for(self, kind: type[EngineEvent] | tuple[type[EngineEvent], ...], request_id: str) -> EngineEvent:
        def found() -> EngineEvent | None:
            return next((e for e in self.events if isinstance(e, kind) and e.request_id == request_id), None)

        with self._changed:
            event = self._changed.wait_for(found, WAIT_S)
            assert event is not None, f"no {kind} of {request_id} in {self.events}"
            return event

    def tokens(self, request_id: str) -> list[int]:
        return [
            token.token_id
            for event in self.events
            if isinstance(event, TokensSampled) and event.request_id == request_id
            for token in event.tokens
        ]


@contextmanager
def running(
    runner: GatedRunner,
    clock: Clock | None = None,
    on_events: Callable[[list[EngineEvent]], None] | None = None,
    speculation: SpeculationConfig | None = None,
) -> Iterator[tuple[Engine, Listener]]:
    config = EngineConfig(max_waiting_tokens=100, max_num_batched_tokens=16, speculation=speculation)
    engine = Engine(runner, config, clock or MonotonicClock(), Incarnation("life-1"))
    listener = Listener()
    engine.start(on_events or listener)
    try:
        yield engine, listener
    finally:
        runner.gate.set()
        assert engine.stop(WAIT_S)
    load = engine.load()
    assert load.free_blocks == load.total_blocks
    assert (load.running, load.waiting, load.waiting_tokens, load.num_held, load.num_importing) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_requests_run_and_their_events_come_on_the_engine_thread(asynchronous: bool) -> None:
    with running(GatedRunner(asynchronous=asynchronous)) as (engine, heard):
        for name, start in (("a", 10), ("b", 100)):
            engine.submit(request(name, range(start, start + 20), max_tokens=6))
        heard.wait_for(Finished, "a")
        heard.wait_for(Finished, "b")
        assert heard.tokens("a") == continuation(range(10, 30), 6)
        assert heard.tokens("b") == continuation(range(100, 120), 6)
        assert heard.threads == {"engine"}
        assert engine.load().steps > 0
        assert engine.computed_prompt_tokens == 40


@pytest.mark.parametrize("asynchronous", [False, True])
def test_many_threads_submit_and_cancel(asynchronous: bool) -> None:
    with running(GatedRunner(asynchronous=asynchronous)) as (engine, heard):

        def client(number: int) -> None:
            for turn in range(8):
                name = f"r{number}-{turn}"
                while True:
                    try:
                        engine.submit(request(name, range(number, number + 10), max_tokens=5))
                        break
                    except Overloaded:
                        time.sleep(0.001)
                if turn % 3 == 0:
                    engine.cancel([RequestId(name)])

        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        for number in range(4):
            for turn in range(8):
                name = f"r{number}-{turn}"
                end = heard.wait_for((Finished, Failed), name)
                if turn % 3:
                    assert isinstance(end, Finished)
                    assert heard.tokens(name) == continuation(range(number, number + 10), 5)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_commands_of_a_hand_off(asynchronous: bool) -> None:
    with running(GatedRunner(asynchronous=asynchronous)) as (engine, heard):
        engine.submit(request("p", range(10), Mode.PREFILL_ONLY, max_tokens=5))
        done = heard.wait_for(PrefillFinished, "p")
        assert isinstance(done, PrefillFinished)
        assert engine.load().num_held == 1
        engine.release(RequestId("p"))
        engine.submit(request("i", range(10), Mode.IMPORT, max_tokens=5))
        heard.wait_for(Reserved, "i")
        assert engine.load().num_importing == 1
        engine.activate(RequestId("i"), done.first_token, None)
        heard.wait_for(Finished, "i")
        assert heard.tokens("i") == continuation(range(10), 5)
        engine.submit(request("j", range(50, 60), Mode.IMPORT))
        heard.wait_for(Reserved, "j")
        engine.abandon_import(RequestId("j"), 0, DeadlineExceeded("too slow"))
        failed = heard.wait_for(Failed, "j")
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, DeadlineExceeded)


def test_a_receiver_may_give_commands_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener()
    reserved: list[Engine] = []

    def on_events(events: list[EngineEvent]) -> None:
        listener(events)
        for event in events:
            if isinstance(event, Reserved):
                reserved[0].activate(event.request_id, SampledToken(5), None)
        raise ValueError("the receiver has a bug")

    with running(GatedRunner(), on_events=on_events) as (engine, _):
        reserved.append(engine)
        engine.submit(request("a", range(10), Mode.IMPORT))
        listener.wait_for(Finished, "a")
    assert "the receiver has a bug" in caplog.text


def test_overload_is_refused_at_once_but_one_request_is_always_taken() -> None:
    runner = GatedRunner()
    runner.gate.clear()
    with running(runner) as (engine, heard):
        engine.submit(request("a", range(150), max_tokens=1))
        assert runner.entered.wait(WAIT_S)
        with pytest.raises(Overloaded) as caught:
            engine.submit(request("b", range(10)))
        assert caught.value.retry_after_s
        assert engine.load().waiting_tokens >= 100
        runner.gate.set()
        heard.wait_for(Finished, "a")
        for name in ("c", "d"):
            engine.submit(request(name, range(50), max_tokens=1))
        heard.wait_for(Finished, "d")


def test_what_was_just_submitted_shows_in_the_load() -> None:
    runner = GatedRunner()
    runner.gate.clear()
    with running(runner) as (engine, _):
        engine.submit(request("a", range(10)))
        assert runner.entered.wait(WAIT_S)
        engine.submit(request("b", range(10, 20)))
        load = engine.load()
        assert (load.running, load.waiting, load.waiting_tokens) == (1, 1, 20)


def test_an_id_is_taken_until_its_request_has_left() -> None:
    with running(GatedRunner()) as (engine, heard):
        engine.submit(request("a", range(10), Mode.PREFILL_ONLY))
        with pytest.raises(InvalidParameter, match="being served"):
            engine.submit(request("a", range(10)))
        heard.wait_for(PrefillFinished, "a")
        engine.cancel([A])
        with pytest.raises(InvalidParameter, match="being served"):
            engine.submit(request("a", range(10)))
        engine.release(A)
        engine.submit(request("b", range(20, 30), max_tokens=1))
        heard.wait_for(Finished, "b")
        engine.submit(request("a", range(10)))
        heard.wait_for(Finished, "a")


def test_a_command_takes_effect_after_the_step_under_way() -> None:
    runner = GatedRunner()
    runner.gate.clear()
    with running(runner) as (engine, heard):
        engine.submit(request("a", range(10), max_tokens=50))
        assert runner.entered.wait(WAIT_S)
        engine.cancel([A])
        runner.gate.set()
        failed = heard.wait_for(Failed, "a")
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, Cancelled)
        assert heard.tokens("a") == continuation(range(10), 1)


def test_a_deadline_wakes_a_sleeping_engine() -> None:
    with running(GatedRunner()) as (engine, heard):
        engine.submit(request("a", range(10), Mode.IMPORT, deadline_s=0.05))
        failed = heard.wait_for(Failed, "a")
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, DeadlineExceeded)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_stop_fails_what_is_left_and_takes_nothing_more(asynchronous: bool) -> None:
    runner = GatedRunner(num_blocks=8, asynchronous=asynchronous)
    with running(runner) as (engine, heard):
        engine.submit(request("landing", range(10), Mode.IMPORT))
        heard.wait_for(Reserved, "landing")
        runner.gate.clear()
        engine.submit(request("runs", range(100, 110), max_tokens=20))
        assert runner.entered.wait(WAIT_S)
        engine.submit(request("waits", range(200, 220)))
        assert not engine.stop(0.0), "the step under way is not cut short"
        runner.gate.set()
        assert engine.stop(WAIT_S)
        for name in ("landing", "runs", "waits"):
            failed = heard.wait_for(Failed, name)
            assert isinstance(failed, Failed)
            assert isinstance(failed.error, Draining)
        with pytest.raises(Draining):
            engine.submit(request("late", range(10)))
        engine.activate(RequestId("landing"), SampledToken(1), None)
        engine.cancel([RequestId("runs")])


def test_stop_without_a_start() -> None:
    engine = Engine(GatedRunner(), EngineConfig(), MonotonicClock(), Incarnation("i"))
    assert engine.stop(WAIT_S)
    with pytest.raises(Draining):
        engine.submit(request("a", range(10)))


def test_a_step_that_does_not_end_shows_and_an_idle_engine_is_healthy() -> None:
    runner, clock = GatedRunner(), ManualClock()
    with running(runner, clock) as (engine, heard):
        clock.advance(1000.0)
        assert engine.last_progress_s() == 0.0
        runner.gate.clear()
        engine.submit(request("a", range(10), max_tokens=1))
        assert runner.entered.wait(WAIT_S)
        clock.advance(30.0)
        assert engine.last_progress_s() == 30.0
        runner.gate.set()
        heard.wait_for(Finished, "a")
        while engine.last_progress_s() > 0.0:
            clock.advance(1.0)


def test_a_broken_loop_fails_everything_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Forgetless(GatedRunner):
        def forget(self, request_id: RequestId) -> None:
            if request_id == "a":
                raise ValueError("a bug of ours")

    with running(Forgetless()) as (engine, heard):
        engine.submit(request("b", range(100, 110), Mode.IMPORT))
        heard.wait_for(Reserved, "b")
        engine.submit(request("a", range(10), max_tokens=1))
        failed = heard.wait_for(Failed, "b")
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, InternalError)
        with pytest.raises(InternalError):
            engine.submit(request("c", range(10)))
        assert engine.last_progress_s() == math.inf
    assert "a bug of ours" in caplog.text


def test_kv_events_can_be_taken_from_outside() -> None:
    with running(GatedRunner()) as (engine, heard):
        assert engine.kv_snapshot().events == (AllBlocksCleared(),)
        engine.submit(request("a", range(10), max_tokens=1))
        heard.wait_for(Finished, "a")
        batch = engine.take_kv_events()
        assert batch is not None
        assert (batch.incarnation, batch.first_event) == ("life-1", 1)
        (stored,) = batch.events
        assert isinstance(stored, BlocksStored)
        assert len(stored.block_hashes) == 2
        engine.clear_prefix_cache()
        engine.submit(request("b", range(50, 53), max_tokens=1))
        heard.wait_for(Finished, "b")
        after = engine.take_kv_events()
        assert after is not None
        assert after.events == (AllBlocksCleared(),)


def test_metrics_say_where_time_went_and_what_was_guessed() -> None:
    registry = CollectorRegistry()
    with running(GatedRunner(), speculation=SpeculationConfig(ngram_min=1)) as (engine, heard):
        telemetry = EngineTelemetry(engine, EngineMetrics(registry))
        engine.submit(request("a", [7] * 20, max_tokens=60))
        heard.wait_for(Finished, "a")
    telemetry.update()

    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(name, labels) or 0.0

    assert heard.tokens("a") == continuation([7] * 20, 60)
    assert all(
        value("headrace_engine_step_seconds_total", phase=phase) > 0 for phase in ("schedule", "compute", "emit")
    )
    drafts, accepted = (value(f"headrace_spec_{kind}_tokens_total") for kind in ("draft", "accepted"))
    assert 0 <= accepted <= drafts
    assert drafts > 0
    assert value("headrace_spec_accepted_length_sum") == accepted
