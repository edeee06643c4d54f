"""Prefixes that are computed from the front while they are brought from the back: right tokens wherever the two meet."""

import pytest
from engine_bench import BLOCK_SIZE, Bench, continuation, request
from engine_store import BenchStore
from hypothesis import given
from hypothesis import strategies as st

from engine.request import Mode
from engine.runner import StepPlan, StepResult
from protocol.errors import Cancelled, DeadlineExceeded, Draining, InternalError, PeerLost

PROMPT = list(range(3, 37))  # 34 tokens: eight full blocks and a half
NUM_FULL = 8
SWITCH = ["off", "on"]


def store_of(prompt: list[int]) -> BenchStore:
    """A store that holds all full blocks of this prompt."""
    store = BenchStore(eager=True)
    source = Bench(256, store=store)
    source.generate(request("source", prompt, max_tokens=1))
    source.save()
    store.eager = False
    return store


def waiting(async_scheduling: str = "off", **settings: object) -> Bench:
    """`r` waits for all eight blocks of its prompt that a step may compute two of."""
    settings = {"max_num_batched_tokens": 2 * BLOCK_SIZE, "async_scheduling": async_scheduling} | settings
    bench = Bench(store=store_of(PROMPT), **settings)
    bench.submit(request("r", PROMPT, deadline_s=50.0))
    assert not bench.step()
    assert bench.heard["r"].awaiting
    return bench


@pytest.mark.parametrize("async_scheduling", SWITCH)
@pytest.mark.parametrize("num_steps", range(5))
def test_front_and_rest_meet_whoever_comes_first(num_steps: int, async_scheduling: str) -> None:
    bench = waiting(async_scheduling)
    bench.proceed("r", 5 * BLOCK_SIZE)
    for _ in range(num_steps):
        bench.step()
    bench.bring("r", NUM_FULL)
    bench.resume("r", NUM_FULL * BLOCK_SIZE)
    bench.run()
    heard, load = bench.heard["r"], bench.core.load()
    assert heard.tokens == continuation(PROMPT, 4)
    assert heard.computed is not None
    assert heard.computed.num_cached_tokens == load.loaded_prompt_tokens == 3 * BLOCK_SIZE
    assert load.computed_prompt_tokens == len(PROMPT) - 3 * BLOCK_SIZE
    assert (bench.busy_blocks, load.waiting_tokens) == (0, 0)


def test_a_front_stops_where_it_was_told_to_and_others_run_meanwhile() -> None:
    bench = waiting()
    bench.proceed("r", 3 * BLOCK_SIZE)
    bench.run()
    computed = [len(chunk.token_ids) for plan in bench.runner.plans for chunk in plan]
    assert (sum(computed), bench.core.load().waiting_tokens) == (3 * BLOCK_SIZE, len(PROMPT) - NUM_FULL * BLOCK_SIZE)
    other = list(range(300, 316))
    assert bench.generate(request("other", other)).tokens == continuation(other, 4)
    assert bench.heard["r"].awaiting


@pytest.mark.parametrize("async_scheduling", SWITCH)
@pytest.mark.parametrize("num_valid", [0, 2, 3])
def test_if_nothing_came_all_is_computed_once(num_valid: int, async_scheduling: str) -> None:
    bench = waiting(async_scheduling)
    bench.proceed("r", 3 * BLOCK_SIZE)
    bench.step()
    bench.resume("r", num_valid * BLOCK_SIZE)
    bench.run()
    assert bench.heard["r"].tokens == continuation(PROMPT, 4)
    load = bench.core.load()
    assert (load.computed_prompt_tokens, load.loaded_prompt_tokens) == (len(PROMPT), 0)


@pytest.mark.parametrize("async_scheduling", SWITCH)
def test_an_export_announces_only_what_is_final_and_in_order(async_scheduling: str) -> None:
    bench = Bench(store=store_of(PROMPT), max_num_batched_tokens=2 * BLOCK_SIZE, async_scheduling=async_scheduling)
    bench.submit(request("r", PROMPT, Mode.PREFILL_ONLY))
    bench.step()
    bench.proceed("r", 4 * BLOCK_SIZE)
    bench.step()
    bench.bring("r", NUM_FULL)
    bench.resume("r", NUM_FULL * BLOCK_SIZE)
    assert len(bench.heard["r"].block_ids) <= 2, "what has come is not announced before what precedes it"
    bench.run()
    assert bench.heard["r"].prefill is not None
    assert bench.heard["r"].prefill.num_cached_tokens == 4 * BLOCK_SIZE
    bench.check_exported("r")
    bench.release("r")
    assert bench.busy_blocks == 0


def cancel(bench: Bench) -> None:
    bench.cancel("r")


def expire(bench: Bench) -> None:
    bench.clock.advance(50.0)
    bench.step()


def fail(bench: Bench) -> None:
    bench.core.fail_import(bench.requests["r"].request_id, PeerLost("slow"))
    bench.listen()


def stumble(bench: Bench) -> None:
    def fault(_: StepPlan) -> StepResult:
        raise RuntimeError("the device hiccups")

    bench.runner.fault = fault
    bench.step()
    bench.step()
    bench.runner.fault = None


@pytest.mark.parametrize("async_scheduling", SWITCH)
@pytest.mark.parametrize("answer", ["resume", "abandon"])
@pytest.mark.parametrize(
    ("end", "error"), [(cancel, Cancelled), (expire, DeadlineExceeded), (fail, PeerLost), (stumble, InternalError)]
)
def test_blocks_stay_until_the_transfer_and_the_steps_have_ended(
    end: object, error: type[Exception], answer: str, async_scheduling: str
) -> None:
    bench = waiting(async_scheduling)
    bench.proceed("r", 6 * BLOCK_SIZE)
    bench.step()
    assert callable(end)
    end(bench)
    assert isinstance(bench.heard["r"].error, error)
    bench.run()
    assert (bench.busy_blocks, bench.core.load().num_importing) == (9, 1)
    assert bench.core.take_departed() == []
    if answer == "resume":
        bench.resume("r", NUM_FULL * BLOCK_SIZE)
    else:
        bench.abandon("r", NUM_FULL * BLOCK_SIZE, PeerLost("gone"))
    bench.run()
    assert (bench.busy_blocks, bench.core.load().num_importing) == (0, 0)
    assert bench.core.take_departed() == ["r"]
    bench.store.kept.clear()  # type: ignore[union-attr]
    assert bench.generate(request("again", PROMPT)).tokens == continuation(PROMPT, 4)


@pytest.mark.parametrize("async_scheduling", SWITCH)
def test_a_stop_frees_all_blocks_of_fronts_and_transfers(async_scheduling: str) -> None:
    bench = waiting(async_scheduling)
    bench.proceed("r", 6 * BLOCK_SIZE)
    bench.step()
    bench.core.close(Draining("stopping"))
    bench.listen()
    assert isinstance(bench.heard["r"].error, Draining)
    assert (bench.busy_blocks, bench.core.load().num_importing) == (0, 0)
    bench.proceed("r", 6 * BLOCK_SIZE)
    bench.resume("r", NUM_FULL * BLOCK_SIZE)
    assert bench.busy_blocks == 0


def test_a_front_is_not_preempted_while_others_write_into_its_blocks() -> None:
    bench = waiting(num_blocks=13)
    bench.proceed("r", NUM_FULL * BLOCK_SIZE)
    old = list(range(100, 110))
    bench.submit(request("decode", old, max_tokens=30))
    bench.run()
    assert not bench.heard["decode"].over
    assert bench.core.load().preemptions > 0, "of the decode itself"
    assert bench.heard["r"].awaiting
    bench.resume("r", 0)
    bench.run()
    bench.save(kept=False)
    bench.run()
    assert bench.heard["r"].tokens == continuation(PROMPT, 4)
    assert bench.heard["decode"].tokens == continuation(old, 30)


def test_a_front_whose_rest_has_come_may_be_preempted_and_starts_over() -> None:
    bench = Bench(14, store=store_of(PROMPT), max_num_batched_tokens=2)
    old = list(range(100, 110))
    bench.submit(request("old", old, max_tokens=30))
    for _ in range(8):
        bench.step()
    bench.submit(request("r", PROMPT))
    bench.step()
    bench.proceed("r", 7 * BLOCK_SIZE)
    bench.bring("r", NUM_FULL)
    bench.resume("r", NUM_FULL * BLOCK_SIZE)
    assert bench.store is not None
    bench.store.kept.clear()
    bench.run()
    bench.save(kept=False)
    bench.run()
    assert bench.core.load().preemptions == 1
    assert bench.heard["r"].reserved is not None
    assert bench.heard["old"].tokens == continuation(old, 30)
    assert bench.heard["r"].tokens == continuation(PROMPT, 4)
    assert bench.core.load().imported_prompt_tokens == 0, "what had come is not where it was"


@given(
    mode=st.sampled_from([Mode.GENERATE, Mode.PREFILL_ONLY]),
    num_cached=st.integers(0, 4),
    num_kept=st.integers(0, NUM_FULL),
    front=st.none() | st.integers(0, NUM_FULL),
    num_came=st.integers(0, NUM_FULL),
    budget=st.integers(1, 20),
    waits=st.tuples(st.integers(0, 6), st.integers(0, 12)),
    end=st.none() | st.tuples(st.sampled_from(["cancel", "fault", "expire"]), st.integers(0, 14)),
    beside=st.booleans(),
    async_scheduling=st.sampled_from(SWITCH),
)
def test_tokens_are_those_of_an_undisturbed_run(
    mode: Mode,
    num_cached: int,
    num_kept: int,
    front: int | None,
    num_came: int,
    budget: int,
    waits: tuple[int, int],
    end: tuple[str, int] | None,
    beside: bool,
    async_scheduling: str,
) -> None:
    """Whatever is cached, kept, computed from the front and brought from the back, in whatever order."""
    store = store_of(PROMPT)
    for block_hash in list(store.kept)[num_kept:]:
        del store.kept[block_hash]
    bench = Bench(store=store, max_num_batched_tokens=budget, async_scheduling=async_scheduling)
    if num_cached:
        store_was, store.kept = store.kept, {}
        bench.generate(request("first", PROMPT[: num_cached * BLOCK_SIZE], max_tokens=1))
        bench.save(kept=False)
        store.kept = store_was
    bench.submit(request("r", PROMPT, mode, deadline_s=1e6))
    if beside:
        bench.submit(request("beside", range(500, 530), max_tokens=12))
    for turn in range(200):
        if end is not None and turn == end[1]:
            disturb(bench, end[0])
        heard = bench.heard["r"]
        if heard.awaiting:
            assert heard.reserved is not None
            num_reserved = len(heard.reserved.block_ids)
            if turn == waits[0] and front is not None and not heard.front_end:
                bench.proceed("r", min(front, num_reserved) * BLOCK_SIZE)
            if turn >= sum(waits):
                bench.bring("r", min(num_came, num_reserved))
                bench.resume("r", min(num_came, num_reserved) * BLOCK_SIZE)
        bench.save()
        if not bench.step() and turn > sum(waits) and heard.over:
            break
    heard = bench.heard["r"]
    assert heard.over
    expected = continuation(PROMPT, 1 if mode is Mode.PREFILL_ONLY else 4)
    assert heard.tokens == (expected if heard.error is None else expected[: len(heard.tokens)])
    bench.run()
    if mode is Mode.PREFILL_ONLY:
        bench.check_exported("r")
        bench.release("r")
    bench.save()
    load = bench.core.load()
    assert (bench.busy_blocks, load.num_importing, load.num_offered_blocks, load.waiting_tokens) == (0, 0, 0, 0)
    store.kept.clear()
    bench.runner.fault = None
    assert bench.generate(request("again", PROMPT)).tokens == continuation(PROMPT, 4), "what is cached is right"


def disturb(bench: Bench, how: str) -> None:
    if how == "cancel":
        bench.cancel("r")
    elif how == "expire":
        bench.clock.advance(2e6)
    else:
        left = 1

        def fault(_: StepPlan) -> StepResult | None:
            nonlocal left
            left -= 1
            if left >= 0:
                raise RuntimeError("the device hiccups")
            return None

        bench.runner.fault = fault
