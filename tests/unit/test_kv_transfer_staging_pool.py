"""StagingPool: nothing is lost or lent twice, and neither side can take the last quarter from the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.memory.staging_pool import Side, StagingPool

STEPS = st.lists(st.tuples(st.sampled_from(["owner", "reader"]), st.booleans(), st.integers(0, 20)), max_size=60)


@given(st.integers(4, 40), STEPS)
def test_blocks_are_free_or_of_one_side(num_blocks: int, steps: list[tuple[Side, bool, int]]) -> None:
    pool = StagingPool(num_blocks)
    lent: dict[Side, list[tuple[int, ...]]] = {"owner": [], "reader": []}
    for side, takes, number in steps:
        if takes:
            ids = pool.take(side, min(number, pool.max_blocks))
            if ids is not None:
                lent[side].append(ids)
        elif lent[side]:
            pool.give_back(side, lent[side].pop(number % len(lent[side])))
        taken = [block_id for side in lent for ids in lent[side] for block_id in ids]
        assert len(taken) == len(set(taken)) == num_blocks - pool.num_free
        assert all(pool.num_taken(side) == sum(map(len, lent[side])) for side in lent)


@given(st.integers(4, 40), st.permutations(["owner", "reader"]))
def test_a_side_can_always_have_a_quarter(num_blocks: int, sides: list[Side]) -> None:
    greedy, modest = sides
    pool = StagingPool(num_blocks)
    while pool.take(greedy, 1):
        pass
    assert pool.take(modest, pool.max_blocks) is not None


def test_consecutive_blocks_are_preferred_from_the_shortest_run_that_holds_them() -> None:
    pool = StagingPool(16)
    first, second, third = (pool.take("owner", 4) for _ in range(3))
    assert (first, second, third) == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))
    pool.give_back("owner", (1, 2, 5))
    assert pool.take("reader", 2) == (1, 2)
    assert pool.take("reader", 1) == (5,)
    pool.give_back("owner", (0, 3, 8))
    pool.give_back("reader", (1, 2))
    assert pool.take("owner", 4) == (0, 1, 2, 3)
    pool.give_back("owner", (1, 3))
    assert pool.take("reader", 4) == (12, 13, 14, 15)
    assert pool.take("reader", 3) == (1, 3, 8)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="3 staging blocks are too few"):
        StagingPool(3)
    pool = StagingPool(8)
    with pytest.raises(ValueError, match="3 staging blocks at once, of 2"):
        pool.take("owner", 3)
    ids = pool.take("owner", 2)
    assert ids is not None
    with pytest.raises(AssertionError, match="is not the reader's"):
        pool.give_back("reader", ids)
