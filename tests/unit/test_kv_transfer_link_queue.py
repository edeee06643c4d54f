"""Bounded, fair, the urgent first, nothing lost: whatever hand-offs come, are done computing, and leave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.handoff.link_queue import Lane, LinkQueue, LinkQueues
from runtime.clock import ManualClock


class Link:
    """Moves nothing; remembers what was started, in order."""

    def __init__(self, max_blocks: int, max_piece_blocks: int) -> None:
        self.clock = ManualClock()
        self.queue = LinkQueue(max_blocks, max_piece_blocks, self.clock)
        self.started: list[tuple[str, int]] = []
        self.in_flight: list[tuple[str, int]] = []
        self.lanes: dict[str, Lane] = {}

    def enter(self, name: str) -> Lane:
        def start(num_blocks: int) -> None:
            self.started.append((name, num_blocks))
            self.in_flight.append((name, num_blocks))

        self.lanes[name] = self.queue.enter(start)
        return self.lanes[name]

    def end(self, index: int = 0) -> None:
        name, num_blocks = self.in_flight.pop(index)
        self.lanes[name].ended(num_blocks)

    def end_all(self) -> None:
        while self.in_flight:
            self.end()

    def moved(self, name: str) -> int:
        return sum(count for other, count in self.started if other == name)


def test_a_giant_moves_in_pieces_within_the_bound() -> None:
    link = Link(max_blocks=10, max_piece_blocks=4)
    link.enter("a").add(100)
    assert link.started == [("a", 4), ("a", 4)]
    assert link.queue.stats().num_blocks_in_flight == 8
    link.end()
    assert link.started == [("a", 4)] * 3
    link.end_all()
    assert link.moved("a") == 100
    assert link.queue.stats() == type(link.queue.stats())(0, 0, 0.0)


def test_those_that_compute_share_evenly() -> None:
    link = Link(max_blocks=4, max_piece_blocks=4)
    link.enter("giant").add(400)
    link.enter("small").add(4)
    link.enter("other").add(8)
    for _ in range(6):
        link.end()
    assert link.started[:6] == [("giant", 4), ("small", 4), ("other", 4), ("giant", 4), ("other", 4), ("giant", 4)]


def test_a_pause_saves_up_nothing() -> None:
    link = Link(max_blocks=2, max_piece_blocks=2)
    late = link.enter("late")
    link.enter("busy").add(200)
    for _ in range(20):
        link.end()
    late.add(40)
    for _ in range(10):
        link.end()
    assert 8 <= link.moved("late") <= 12


def test_those_whose_prefill_is_done_go_first_oldest_first() -> None:
    link = Link(max_blocks=2, max_piece_blocks=2)
    for name in ("a", "b", "c"):
        link.enter(name).add(6)
    link.lanes["c"].hasten()
    link.lanes["b"].hasten()
    link.end_all()
    assert [name for name, _ in link.started] == ["a", "c", "c", "c", "b", "b", "b", "a", "a"]


def test_who_leaves_waits_no_more_and_what_moves_still_counts() -> None:
    link = Link(max_blocks=4, max_piece_blocks=4)
    link.enter("a").add(8)
    link.enter("b").add(4)
    link.lanes["a"].leave()
    assert link.started == [("a", 4)]
    link.end()
    assert link.started == [("a", 4), ("b", 4)]
    link.end_all()
    link.lanes["b"].leave()
    assert link.queue.idle


def test_a_block_larger_than_the_bound_still_moves() -> None:
    queue = LinkQueue.of_bytes(1000, 5000, 9, ManualClock())
    started: list[int] = []
    lane = queue.enter(started.append)
    lane.add(3)
    assert started == [1]
    lane.ended(1)
    assert started == [1, 1]


def test_only_those_that_wait_for_their_turn_count_as_waiting() -> None:
    link = Link(max_blocks=2, max_piece_blocks=2)
    link.enter("a").add(4)
    link.enter("b").add(2)
    link.clock.advance(2.0)
    assert link.queue.stats().waited_s == 2.0
    link.end()
    link.clock.advance(3.0)
    assert link.queue.stats().waited_s == 5.0


def test_queues_come_with_their_links_and_their_waits_stay_counted() -> None:
    clock = ManualClock()
    queues = LinkQueues(8, 1, 8, clock)
    first = queues.of("a").enter(lambda _: None)
    assert queues.of("a") is queues.of("a")
    second = queues.of("a").enter(lambda _: None)
    first.add(8)
    second.add(1)
    clock.advance(1.0)
    for lane in (first, second):
        lane.ended(lane.num_in_flight)
        lane.leave()
    second.ended(second.num_in_flight)
    queues.of("b")
    assert queues.stats().waited_s == 1.0
    assert queues.stats().num_blocks_in_flight == 0


@pytest.mark.filterwarnings("error")
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_nothing_is_lost_or_starved_and_the_bound_holds(bound: int, piece: int, data: st.DataObject) -> None:
    link = Link(bound, min(piece, bound))
    names = ["a", "b", "c", "d"]
    added = dict.fromkeys(names, 0)
    left: set[str] = set()
    for name in names:
        link.enter(name)
    for action in data.draw(st.lists(st.sampled_from(["add", "hasten", "leave", "end"]), max_size=30)):
        name = data.draw(st.sampled_from(names))
        match action:
            case "add" if name not in left:
                count = data.draw(st.integers(1, 20))
                added[name] += count
                link.lanes[name].add(count)
            case "hasten":
                link.lanes[name].hasten()
            case "leave":
                link.lanes[name].leave()
                left.add(name)
            case "end" if link.in_flight:
                link.end(data.draw(st.integers(0, len(link.in_flight) - 1)))
        in_flight = sum(count for _, count in link.in_flight)
        waiting = sum(lane.num_waiting for lane in link.lanes.values())
        stats = link.queue.stats()
        assert (stats.num_blocks_in_flight, stats.num_waiting_blocks) == (in_flight, waiting)
        assert in_flight <= bound
        assert in_flight or not waiting, "the link is idle while somebody waits"
    link.end_all()
    for name in names:
        if name not in left:
            assert link.moved(name) == added[name]
        assert link.moved(name) <= added[name]
