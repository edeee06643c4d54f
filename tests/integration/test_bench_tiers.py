"""The benchmarks of tiers and moves, at sizes that take no time: they measure what they say, and predict by what was measured."""

from argparse import Namespace

import pytest

from benchmarks.bench_moves import measure_peers, peer_table
from benchmarks.bench_tiers import COMPUTED, PLACES, Bandwidths, Outcome, Outcomes, build_report


def test_a_peers_blocks_arrive_right_beside_a_memcpy() -> None:
    moves = measure_peers(8192, 4, 1, ("shm",))
    assert [(move.name, move.verified) for move in moves] == [("memcpy", True), ("shm", True)]
    assert all(move.best_rate >= move.median_rate > 0 for move in moves)
    assert len(peer_table(moves)) == 4


def test_the_slower_of_two_moves_that_follow_each_other_is_predicted() -> None:
    bandwidths = Bandwidths(copy=10e9, disk=1e9, peer=5e9)
    assert bandwidths.seconds("device", 10**9) == 0
    assert bandwidths.seconds("host memory", 10**9) == pytest.approx(0.1)
    assert bandwidths.seconds("disk", 10**9) == pytest.approx(1.0)
    assert bandwidths.seconds("store node", 10**9) == pytest.approx(0.21)


def test_a_report_sets_every_place_beside_computing_and_counts_what_was_missed() -> None:
    outcomes = {place: Outcomes([Outcome(0.5, 1000)]) for place in PLACES}
    outcomes = {COMPUTED: Outcomes([Outcome(2.0, 0)])} | outcomes | {"disk": Outcomes(num_missed=2)}
    bandwidths = Bandwidths(copy=10e9, disk=1e9, peer=5e9)
    report = build_report(Namespace(prompt_tokens=1000, rounds=1), outcomes, bandwidths, 0.1, 10**9)
    rows = {line.split(" | ")[0].strip("| "): line for line in report.splitlines() if line.startswith("| ")}
    assert rows["host memory"].endswith("| 199 | 500 | 500 | 0.250 |")
    assert "0 (2 missed)" in rows["disk"]
    assert set(rows) == {"from", "---", COMPUTED, *PLACES}
