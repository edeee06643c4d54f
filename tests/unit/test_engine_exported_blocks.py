"""Prefills that fail while others read their blocks: the blocks stay, as they were, until nobody does."""

from collections.abc import Callable

import pytest
from engine_bench import BLOCK_SIZE, Bench, request

from engine.request import Mode
from engine.runner import StepPlan, StepResult
from protocol.errors import Cancelled, DeadlineExceeded, Draining, InternalError, PeerLost

PROMPT = range(3, 43)
NUM_BLOCKS = 16
DEADLINE_S = 100.0


def cancel(bench: Bench) -> None:
    bench.cancel("p")


def expire(bench: Bench) -> None:
    bench.clock.advance(DEADLINE_S)
    bench.step()


def stumble(bench: Bench) -> None:
    def fault(plan: StepPlan) -> StepResult:
        raise RuntimeError("the device hiccups")

    bench.runner.fault = fault
    bench.step()
    bench.runner.fault = None


ENDS = [(cancel, Cancelled), (expire, DeadlineExceeded), (stumble, InternalError)]


def half_computed(async_scheduling: str, num_batched_tokens: int = 8) -> Bench:
    """`p` has some of its blocks announced, and with asynchronous scheduling a step in flight."""
    bench = Bench(NUM_BLOCKS, max_num_batched_tokens=num_batched_tokens, async_scheduling=async_scheduling)
    bench.submit(request("p", PROMPT, Mode.PREFILL_ONLY, deadline_s=DEADLINE_S))
    bench.step()
    bench.step()
    return bench


def fill_the_rest(bench: Bench) -> None:
    """Others want every block there is."""
    for name, start in (("x", 200), ("y", 300)):
        bench.submit(request(name, range(start, start + 4 * BLOCK_SIZE)))
    bench.run()
    bench.check_exported("p")


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
@pytest.mark.parametrize(("end", "error"), ENDS)
def test_announced_blocks_stay_until_they_are_released(
    async_scheduling: str, end: Callable[[Bench], None], error: type[Exception]
) -> None:
    bench = half_computed(async_scheduling)
    end(bench)
    assert bench.heard["p"].block_ids
    assert isinstance(bench.heard["p"].error, error)
    fill_the_rest(bench)
    cancel(bench)
    assert (bench.core.load().num_held, bench.busy_blocks) == (1, len(PROMPT) // BLOCK_SIZE)
    assert bench.core.take_departed() == ["x", "y"]
    bench.release("p")
    assert bench.busy_blocks == 0
    assert bench.core.take_departed() == ["p"]


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
@pytest.mark.parametrize(("end", "error"), ENDS)
def test_what_was_released_before_the_end_is_freed_by_it(
    async_scheduling: str, end: Callable[[Bench], None], error: type[Exception]
) -> None:
    bench = half_computed(async_scheduling)
    bench.release("p")
    end(bench)
    bench.run()
    assert isinstance(bench.heard["p"].error, error)
    assert bench.busy_blocks == 0


def test_what_was_never_announced_is_freed_at_once_and_released_to_no_effect() -> None:
    bench = half_computed("off", num_batched_tokens=1)
    cancel(bench)
    assert not bench.heard["p"].block_ids
    assert bench.busy_blocks == 0
    bench.release("p")
    assert bench.core.take_departed() == ["p"]


def test_blocks_that_are_released_while_a_step_writes_wait_for_that() -> None:
    bench = half_computed("on")
    assert bench.core.in_flight
    cancel(bench)
    bench.release("p")
    assert bench.busy_blocks == len(PROMPT) // BLOCK_SIZE
    bench.run()
    assert bench.busy_blocks == 0


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("ending", ["cancelled", "abandoned"])
def test_a_prefix_that_was_awaited_does_not_free_what_was_announced_before(ending: str, released: bool) -> None:
    """The cached beginning is announced at once; what follows is awaited from elsewhere."""
    bench = Bench(NUM_BLOCKS)
    bench.generate(request("earlier", PROMPT[: 2 * BLOCK_SIZE]))
    bench.submit(request("p", PROMPT, Mode.PREFILL_ONLY, import_tokens=6 * BLOCK_SIZE))
    bench.step()
    assert len(bench.heard["p"].block_ids) == 2
    if ending == "cancelled":
        cancel(bench)
    if released:
        bench.release("p")
    if ending == "cancelled":
        bench.resume("p", 2 * BLOCK_SIZE)
    else:
        bench.abandon("p", 2 * BLOCK_SIZE, PeerLost("the lender died"))
    assert bench.heard["p"].error is not None
    assert (bench.core.load().num_importing, bench.core.load().num_held) == (0, 0 if released else 1)
    fill_the_rest(bench)
    bench.release("p")
    assert bench.busy_blocks == 0


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
def test_the_end_of_the_engine_frees_them_all(async_scheduling: str) -> None:
    bench = half_computed(async_scheduling)
    bench.submit(request("q", PROMPT[: 4 * BLOCK_SIZE], Mode.PREFILL_ONLY))
    cancel(bench)
    bench.step()
    bench.step()
    bench.core.close(Draining("the node is stopping"))
    bench.listen()
    assert bench.busy_blocks == 0
    assert sorted(bench.core.take_departed()) == ["p", "q"]
