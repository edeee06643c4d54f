"""Admission: what is remembered, when pressure is felt, and who gets in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store.admission import MIN_EVICTIONS, QUIET_S, Admission, Pressure, TouchCounts
from tests.support.store_parts import blocks_of


def test_touches_are_counted_and_carried_from_one_generation_to_the_next() -> None:
    touches = TouchCounts(remembered=2)
    assert [touches.touch(b"a", 0.0) for _ in range(3)] == [0, 1, 2]
    touches.touch(b"b", 0.0)
    touches.touch(b"c", 0.0)
    assert touches.touch(b"a", 0.0) == 3, "from the older generation"
    assert (touches.count(b"a"), touches.count(b"b"), touches.count(b"x")) == (4, 1, 0)


def test_what_was_long_ago_is_forgotten() -> None:
    touches = TouchCounts(horizon_s=10.0)
    touches.touch(b"a", 1.0)
    touches.touch(b"b", 12.0)
    assert touches.count(b"a") == 1
    touches.touch(b"b", 23.0)
    assert touches.count(b"a") == 0
    touches.touch(b"c", 99.0)
    assert touches.count(b"b") == 0


@given(st.lists(st.binary(min_size=1, max_size=2)), st.integers(1, 20))
def test_memory_is_bounded_and_never_counts_too_much(addresses: list[bytes], remembered: int) -> None:
    touches = TouchCounts(remembered)
    for index, address in enumerate(addresses):
        assert touches.touch(address, 0.0) <= addresses[:index].count(address)
        assert len(touches) <= 2 * remembered


def test_pressure_needs_many_evictions_in_vain_and_ends_with_them() -> None:
    pressure = Pressure()
    for _ in range(MIN_EVICTIONS - 1):
        pressure.evicted(False, 1.0)
    assert not pressure.is_on(1.0)
    pressure.evicted(False, 1.0)
    assert pressure.is_on(1.0)
    assert pressure.is_on(1.0 + QUIET_S)
    assert not pressure.is_on(1.1 + QUIET_S)


def test_pressure_has_hysteresis() -> None:
    pressure = Pressure()
    for index in range(2 * MIN_EVICTIONS):
        pressure.evicted(index % 3 == 0, 1.0)
    assert not pressure.is_on(1.0), "two thirds in vain do not turn it on"
    for _ in range(3 * MIN_EVICTIONS):
        pressure.evicted(False, 1.0)
    assert pressure.is_on(1.0)
    for index in range(3 * MIN_EVICTIONS):
        pressure.evicted(index % 3 == 0, 1.0)
    assert pressure.is_on(1.0), "and do not turn it off"
    for _ in range(3 * MIN_EVICTIONS):
        pressure.evicted(True, 1.0)
    assert not pressure.is_on(1.0)


@pytest.mark.parametrize(("mode", "first", "second"), [("all", True, True), ("second-touch", False, True)])
def test_modes(mode: str, first: bool, second: bool) -> None:
    admission = Admission(mode)  # type: ignore[arg-type]  # one of its literals
    block = blocks_of("a", 1)[0]
    assert admission.admits(block, 0.0) is first
    assert admission.admits(block, 0.0) is second


def test_auto_becomes_choosy_under_pressure_and_remembers_what_came_before_it() -> None:
    admission = Admission("auto")
    early, late = blocks_of("early", 1)[0], blocks_of("late", 1)[0]
    assert admission.admits(early, 0.0)
    for _ in range(MIN_EVICTIONS):
        admission.evicted(False, 1.0)
    assert admission.second_touch(1.0)
    assert admission.admits(early, 1.0)
    assert not admission.admits(late, 1.0)
    admission.requested([late], 1.0)
    admission.requested([late], 2.0)
    assert admission.admits(late, 2.0)
