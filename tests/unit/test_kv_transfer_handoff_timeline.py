"""The parts of an exposed hand-off add up to the whole, however pieces overlap."""

from contextlib import AbstractContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.handoff.timeline import HandoffTimeline
from protocol.phases import HandoffPhases
from runtime.clock import ManualClock


def test_what_comes_before_the_prefill_ended_counts_for_nothing() -> None:
    clock = ManualClock(100.0)
    timeline = HandoffTimeline(clock)
    clock.advance(1)
    with timeline.moving():
        clock.advance(2)
        computed_at = clock.now()
        clock.advance(3)
    with timeline.verifying():
        clock.advance(4)
    clock.advance(5)
    assert timeline.exposed(computed_at, clock.now()) == HandoffPhases(queue_s=5, wire_s=3, verify_s=4)
    assert timeline.exposed(90.0, clock.now()) == HandoffPhases(queue_s=16, wire_s=5, verify_s=4)
    assert timeline.exposed(clock.now(), clock.now()) == HandoffPhases()


def test_while_bytes_move_nothing_else_counts() -> None:
    clock = ManualClock()
    timeline = HandoffTimeline(clock)
    with timeline.verifying():
        clock.advance(1)
        with timeline.moving():
            clock.advance(2)
        clock.advance(4)
    assert timeline.exposed(0.0, clock.now()) == HandoffPhases(wire_s=2, verify_s=5)


@given(
    st.lists(st.tuples(st.sampled_from(["move", "verify", "end"]), st.integers(0, 9)), max_size=20), st.integers(0, 99)
)
def test_the_parts_add_up(changes: list[tuple[str, int]], computed_at: int) -> None:
    clock = ManualClock()
    timeline = HandoffTimeline(clock)
    under_way: list[AbstractContextManager[None]] = []
    for action, seconds in changes:
        if action == "end" and under_way:
            under_way.pop(seconds % len(under_way)).__exit__(None, None, None)
        elif action != "end":
            under_way.append(timeline.moving() if action == "move" else timeline.verifying())
            under_way[-1].__enter__()
        clock.advance(seconds)
    whole = max(0.0, clock.now() - computed_at)
    assert timeline.exposed(computed_at, clock.now()).total_s == pytest.approx(whole)
