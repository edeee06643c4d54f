"""A copy plan moves each block exactly once, in as few pieces as the ids allow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.transports.plan import CopyRun, coalesce


@given(st.data())
def test_each_block_is_written_exactly_once_with_the_right_bytes(data: st.DataObject) -> None:
    local = data.draw(st.lists(st.integers(0, 50), unique=True, max_size=30))
    remote = data.draw(st.lists(st.integers(0, 50), min_size=len(local), max_size=len(local)))
    written: dict[int, int] = {}
    for run in coalesce(remote, local):
        for offset in range(run.num_blocks):
            assert run.destination + offset not in written
            written[run.destination + offset] = run.source + offset
    assert written == dict(zip(local, remote, strict=True))


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 100), st.randoms())
def test_blocks_that_are_consecutive_on_both_sides_are_one_piece(remote: int, local: int, count: int, random) -> None:
    pairs = [(remote + offset, local + offset) for offset in range(count)]
    random.shuffle(pairs)
    assert coalesce([r for r, _ in pairs], [n for _, n in pairs]) == [CopyRun(remote, local, count)]


def test_nothing_to_move_is_an_empty_plan() -> None:
    assert coalesce([], []) == []


@pytest.mark.parametrize(("remote", "local"), [([1], []), ([1, 2], [3, 3]), ([-1], [0]), ([0], [-1])])
def test_impossible_plans_are_refused(remote: list[int], local: list[int]) -> None:
    with pytest.raises(ValueError, match=r"blocks|negative"):
        coalesce(remote, local)
