"""Prefixes that come from elsewhere, prefixes that are held for others, and prefills whose readers are slow."""

import pytest
from engine_bench import BLOCK_SIZE, Bench, continuation, hashes_of, request

from engine.admission import check_request
from engine.engine import Engine
from engine.request import Mode
from protocol.errors import Cancelled, DeadlineExceeded, InvalidParameter, Overloaded, PeerLost
from protocol.ids import Incarnation
from runtime.clock import ManualClock

PROMPT = list(range(3, 17))  # 14 tokens: three full blocks and a half
PREFIX = 3 * BLOCK_SIZE


@pytest.fixture(autouse=True, params=["off", "on"])
def with_and_without_running_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Bench.DEFAULTS, "async_scheduling", request.param)


def bring(bench: Bench, name: str, num_blocks: int) -> None:
    """Write the first blocks of an awaited prefix as somebody who has computed it would."""
    reserved, context = bench.heard[name].reserved, list(bench.requests[name].prompt_token_ids)
    assert reserved is not None
    other = Bench()
    other.submit(request("source", context, Mode.PREFILL_ONLY))
    other.run()
    for index in range(reserved.num_cached_blocks, num_blocks):
        source = other.heard["source"].block_ids[index]
        bench.runner.import_block(other.runner.memory, source, reserved.block_ids[index])


# Imports of a prefix.


@pytest.mark.parametrize("num_blocks", [0, 1, 3])
def test_what_was_not_brought_is_computed(num_blocks: int) -> None:
    bench = Bench()
    bench.submit(request("r", PROMPT, import_tokens=PREFIX))
    assert not bench.step()
    reserved = bench.heard["r"].reserved
    assert reserved is not None
    assert (len(reserved.block_ids), reserved.num_cached_blocks) == (3, 0)
    bring(bench, "r", num_blocks)
    bench.resume("r", num_blocks * BLOCK_SIZE)
    bench.run()
    heard, load = bench.heard["r"], bench.core.load()
    assert heard.tokens == continuation(PROMPT, 4)
    assert heard.computed is not None
    assert heard.computed.num_cached_tokens == load.imported_prompt_tokens == num_blocks * BLOCK_SIZE
    assert load.computed_prompt_tokens == len(PROMPT) - num_blocks * BLOCK_SIZE
    assert bench.busy_blocks == 0
    again = bench.generate(request("s", PROMPT)).computed
    assert again is not None
    assert again.num_cached_tokens == PREFIX


def test_nobody_is_asked_for_what_is_cached() -> None:
    bench = Bench()
    bench.generate(request("first", PROMPT))
    heard = bench.generate(request("r", PROMPT, import_tokens=PREFIX))
    assert heard.reserved is None
    assert heard.tokens == continuation(PROMPT, 4)


def test_only_what_is_not_cached_is_asked_for() -> None:
    bench = Bench()
    bench.generate(request("first", PROMPT[: BLOCK_SIZE + 1], max_tokens=1))
    bench.submit(request("r", PROMPT, import_tokens=PREFIX))
    bench.run()
    reserved = bench.heard["r"].reserved
    assert reserved is not None
    assert (len(reserved.block_ids), reserved.num_cached_blocks) == (3, 1)
    bring(bench, "r", 3)
    bench.resume("r", PREFIX)
    bench.run()
    assert bench.heard["r"].tokens == continuation(PROMPT, 4)
    assert bench.core.load().imported_prompt_tokens == 2 * BLOCK_SIZE


def test_an_export_announces_what_is_cached_then_what_was_brought_then_what_is_computed() -> None:
    bench = Bench()
    bench.generate(request("first", PROMPT[: BLOCK_SIZE + 1], max_tokens=1))
    bench.submit(request("r", PROMPT, Mode.PREFILL_ONLY, import_tokens=PREFIX))
    bench.run()
    assert len(bench.heard["r"].block_ids) == 1
    bring(bench, "r", 3)
    bench.resume("r", PREFIX)
    assert len(bench.heard["r"].block_ids) == 3
    bench.run()
    prefill = bench.heard["r"].prefill
    assert prefill is not None
    assert prefill.num_cached_tokens == PREFIX
    assert len(bench.heard["r"].block_ids) == 4
    bench.check_exported("r")


@pytest.mark.parametrize("mode", [Mode.GENERATE, Mode.PREFILL_ONLY])
@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_blocks_stay_with_the_transfer_of_a_request_that_has_ended(mode: Mode, end: str) -> None:
    bench = Bench()
    bench.submit(request("r", PROMPT, mode, import_tokens=PREFIX, deadline_s=5.0))
    bench.run()
    if end == "cancel":
        bench.cancel("r")
    else:
        bench.clock.advance(6.0)
        bench.run()
    assert isinstance(bench.heard["r"].error, Cancelled if end == "cancel" else DeadlineExceeded)
    assert (bench.busy_blocks, bench.core.load().num_importing) == (4, 1)
    bring(bench, "r", 2)
    bench.resume("r", 2 * BLOCK_SIZE)
    assert (bench.busy_blocks, bench.core.load().num_importing) == (0, 0)
    computed = bench.generate(request("again", PROMPT)).computed
    assert computed is not None
    assert computed.num_cached_tokens == 2 * BLOCK_SIZE, "what had come is kept"


def test_a_prefix_that_cannot_be_awaited_any_longer_fails_the_request_and_keeps_what_came() -> None:
    bench = Bench()
    bench.submit(request("r", PROMPT, import_tokens=PREFIX))
    bench.run()
    bring(bench, "r", 1)
    bench.abandon("r", BLOCK_SIZE, PeerLost("gone"))
    assert isinstance(bench.heard["r"].error, PeerLost)
    assert bench.busy_blocks == 0
    computed = bench.generate(request("again", PROMPT)).computed
    assert computed is not None
    assert computed.num_cached_tokens == BLOCK_SIZE


def test_a_resumed_sequence_can_be_preempted_and_does_not_ask_again() -> None:
    bench = Bench(num_blocks=10, enable_prefix_cache=False)
    old, young = list(range(100, 114)), list(range(200, 214))
    bench.submit(request("old", old, max_tokens=20))
    bench.submit(request("young", young, max_tokens=20, import_tokens=PREFIX))
    bench.step()
    bring(bench, "young", 3)
    bench.resume("young", PREFIX)
    bench.run()
    assert bench.core.load().preemptions > 0
    assert bench.heard["old"].tokens == continuation(old, 20)
    assert bench.heard["young"].tokens == continuation(young, 20)


def test_waiting_for_a_prefix_is_no_compute() -> None:
    bench = Bench(max_num_batched_tokens=8, async_scheduling="off")
    bench.submit(request("r", PROMPT, import_tokens=PREFIX))
    assert bench.core.load().waiting_tokens == len(PROMPT)
    bench.run()
    assert bench.core.load().waiting_tokens == len(PROMPT) - PREFIX, "what is left to compute here"
    other = list(range(300, 316))
    bench.submit(request("other", other, max_tokens=1))
    bench.step()
    assert sum(len(chunk.token_ids) for chunk in bench.runner.plans[-1]) == 8, "all of the step is the other's"
    bench.run()
    assert bench.heard["other"].tokens == continuation(other, 1)


def test_prefixes_come_while_others_compute_and_nobody_is_overtaken_for_good() -> None:
    bench = Bench(max_num_batched_tokens=4, async_scheduling="off")
    bench.submit(request("long", range(100, 140), max_tokens=1))
    bench.step()
    bench.submit(request("older", range(200, 220), max_tokens=1))
    bench.submit(request("younger", PROMPT, max_tokens=1, import_tokens=PREFIX))
    bench.step()
    assert bench.heard["younger"].reserved is not None, "the step was full, but an import needs no compute"
    bring(bench, "younger", 3)
    bench.resume("younger", PREFIX)
    bench.run()
    order = [chunk.request_id for plan in bench.runner.plans for chunk in plan if chunk.samples]
    assert order == ["long", "older", "younger"]


@pytest.mark.parametrize(
    ("mode", "import_tokens"),
    [(Mode.GENERATE, 3), (Mode.GENERATE, 16), (Mode.PREFILL_ONLY, -4), (Mode.IMPORT, BLOCK_SIZE)],
)
def test_what_cannot_be_imported_is_refused(mode: Mode, import_tokens: int) -> None:
    with pytest.raises(InvalidParameter) as refused:
        check_request(request("r", PROMPT, mode, import_tokens=import_tokens), Bench().runner)
    assert refused.value.param == "import_tokens"


# Pins.


def test_a_pinned_prefix_is_not_reused_whatever_happens() -> None:
    bench = Bench(num_blocks=8)
    bench.generate(request("a", PROMPT, max_tokens=1))
    pinned = bench.pin("p", hashes_of([*PROMPT, 1, 2]))
    assert len(pinned) == 3, "the fourth block is not cached"
    bench.core.clear_prefix_cache()
    heard = bench.generate(request("b", range(500, 517), max_tokens=3))
    assert heard.tokens == continuation(list(range(500, 517)), 3)
    bench.check_blocks(pinned, PROMPT, "p was pinned")
    assert bench.busy_blocks == 3
    bench.unpin("p")
    assert bench.busy_blocks == 0


def test_nothing_is_pinned_for_another_salt() -> None:
    bench = Bench()
    bench.generate(request("a", PROMPT, cache_salt="x"))
    assert bench.pin("none", hashes_of(PROMPT)) == ()
    assert bench.pin("other", hashes_of(PROMPT, "y")) == ()
    assert len(bench.pin("same", hashes_of(PROMPT, "x"))) == 3


def test_a_prefix_may_be_pinned_many_times_and_a_stop_frees_all() -> None:
    bench = Bench()
    bench.generate(request("a", PROMPT))
    assert bench.pin("p", hashes_of(PROMPT)) == bench.pin("q", hashes_of(PROMPT))
    assert (bench.busy_blocks, bench.core.load().num_pins) == (3, 2)
    bench.unpin("p")
    bench.unpin("p")
    assert (bench.busy_blocks, bench.core.load().num_pins) == (3, 1)
    bench.core.close(Cancelled("stopping"))
    assert (bench.busy_blocks, bench.core.load().num_pins) == (0, 0)


# Back-pressure.


def test_prefills_wait_for_readers_and_go_on_when_they_are_done() -> None:
    bench = Bench(num_blocks=16, enable_prefix_cache=False)
    prompts = {f"r{i}": list(range(100 * i, 100 * i + 14)) for i in range(12)}
    for name, prompt in prompts.items():
        bench.submit(request(name, prompt, Mode.PREFILL_ONLY))
    bench.run()
    load = bench.core.load()
    assert (load.num_held, load.waiting, load.running, load.free_blocks) == (4, 8, 0, 0)
    for number, name in enumerate(prompts):
        assert bench.heard[name].prefill is not None, "each release lets the next one in"
        bench.check_exported(name)
        bench.release(name)
        bench.run()
        assert bench.core.load().num_held == min(4, 11 - number)
    assert all(bench.heard[name].tokens == continuation(prompt, 1) for name, prompt in prompts.items())
    assert bench.busy_blocks == 0


def test_a_stalled_reader_fills_the_queue_up_to_its_bound_and_no_further() -> None:
    bench = Bench(num_blocks=4, max_waiting_tokens=30)
    engine = Engine(bench.runner, bench.config, ManualClock(), Incarnation("e"))
    for name in "abc":
        engine.submit(request(name, PROMPT if name == "a" else range(50, 58), Mode.PREFILL_ONLY))
    with pytest.raises(Overloaded):
        engine.submit(request("d", range(50, 58), Mode.PREFILL_ONLY))
    engine.stop(1.0)
