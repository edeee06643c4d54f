"""What to load and what to compute, by measured rates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store.load_choice import (
    LOAD_OVERHEAD_S,
    NOTHING,
    PROBE_BLOCKS,
    LoadableBlocks,
    LoadPlan,
    load_seconds,
    plan_load,
)
from kv_store.rates import STALE_AFTER_S, Rates

COSTS = st.floats(1e-6, 1.0)


def test_without_measurements_everything_is_loaded() -> None:
    loadable = LoadableBlocks(3, 4)
    assert plan_load(loadable, load_s=None, promote_s=None, compute_s=1.0) == LoadPlan(0, 7)
    assert plan_load(loadable, load_s=0.1, promote_s=None, compute_s=0.01) == LoadPlan(0, 7)
    assert plan_load(loadable, load_s=0.1, promote_s=0.1, compute_s=None) == LoadPlan(0, 7)


@pytest.mark.parametrize(("policy", "plan"), [("always", LoadPlan(0, 5)), ("never", NOTHING), ("auto", NOTHING)])
def test_policies(policy: str, plan: LoadPlan) -> None:
    loadable = LoadableBlocks(5, 0)
    assert plan_load(loadable, load_s=1.0, promote_s=None, compute_s=0.1, policy=policy) == plan  # type: ignore[arg-type]  # one of its literals


def test_much_faster_loads_bring_everything_and_similar_ones_meet_in_the_middle() -> None:
    loadable = LoadableBlocks(100, 0)
    assert plan_load(loadable, load_s=0.001, promote_s=None, compute_s=0.1) == LoadPlan(0, 100)
    assert plan_load(loadable, load_s=0.05, promote_s=None, compute_s=0.1) == LoadPlan(33, 67)
    assert plan_load(LoadableBlocks(0, 100), load_s=0.001, promote_s=0.05, compute_s=0.1) == LoadPlan(33, 67)


@given(host=st.integers(0, 2000), disk=st.integers(0, 2000), load_s=COSTS, promote_s=COSTS, compute_s=COSTS)
def test_a_plan_covers_all_and_is_never_slower_than_computing(
    host: int, disk: int, load_s: float, promote_s: float, compute_s: float
) -> None:
    loadable = LoadableBlocks(host, disk)
    plan = plan_load(loadable, load_s=load_s, promote_s=promote_s, compute_s=compute_s)
    seconds = load_seconds(loadable, load_s, promote_s)
    assert seconds is not None
    if plan == NOTHING:
        assert not loadable.total or LOAD_OVERHEAD_S + seconds >= loadable.total * compute_s
        return
    assert plan.compute_first_blocks + plan.load_blocks == loadable.total
    loading = plan.load_blocks * seconds / loadable.total
    assert plan.compute_first_blocks * compute_s <= loading + compute_s, "the engine does not wait for nothing"
    assert loading < loadable.total * compute_s


def test_rates_follow_what_is_measured() -> None:
    rates = Rates()
    assert rates.seconds_per_block("load") is None
    rates.note("load", 0, 5.0, 1.0)
    assert rates.seconds_per_block("load") is None
    rates.note("load", 10, 1.0, 1.0)
    assert rates.seconds_per_block("load") == pytest.approx(0.1)
    for _ in range(50):
        rates.note("load", 10, 2.0, 1.0)
    assert rates.seconds_per_block("load") == pytest.approx(0.2, rel=0.01)
    assert rates.seconds_per_block("save") is None


def test_what_was_slow_is_tried_again_after_a_while() -> None:
    rates = Rates()
    assert not rates.is_stale("load", 1e6), "never measured is not stale"
    rates.note("load", 10, 1.0, 5.0)
    assert not rates.is_stale("load", 5.0)
    assert rates.is_stale("load", 5.0 + STALE_AFTER_S)
    slow = plan_load(LoadableBlocks(100, 0), load_s=1.0, promote_s=None, compute_s=0.1, stale=True)
    assert slow == LoadPlan(0, PROBE_BLOCKS)
