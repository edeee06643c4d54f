"""BlockPool: conservation under any sequence of operations, and the order in which free blocks are used again."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import EVICTED_AHEAD, BlockPool


def test_a_fresh_pool_hands_out_neighbours() -> None:
    pool = BlockPool(8, on_reuse=lambda _: None)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]
    assert pool.num_free == 3


def test_blocks_that_come_back_join_their_neighbours() -> None:
    pool = BlockPool(12, on_reuse=lambda _: None)
    tables = [pool.allocate(1) for _ in range(12)]
    for block_id in (5, 3, 9, 4, 6, 0):
        pool.release(tables[block_id])
    assert pool.allocate(3) == [3, 4, 5], "the only run that holds them"
    assert pool.allocate(3) == [0, 6, 9]


def test_the_shortest_run_that_is_long_enough() -> None:
    pool = BlockPool(100, on_reuse=lambda _: None)
    table = pool.allocate(100)
    for start, end in ((0, 3), (10, 50), (60, 66)):
        pool.release(table[start:end])
    assert pool.allocate(5) == [60, 61, 62, 63, 64]
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(42) == [2, *range(10, 50), 65], "no run is long enough"


def test_a_table_grows_in_place_while_its_neighbour_is_free() -> None:
    pool = BlockPool(16, on_reuse=lambda _: None)
    one, two = pool.allocate(4), pool.allocate(4)
    assert pool.allocate(1, after=two[-1]) == [8]
    assert pool.allocate(1, after=one[-1]) == [9]
    pool.release(two)
    assert pool.allocate(2, after=one[-1]) == [4, 5]
    assert pool.allocate(1, after=15) == [6], "nothing follows the last block"


def test_a_little_more_is_evicted_than_needed_in_the_order_of_use() -> None:
    reused: list[int] = []
    pool = BlockPool(64, on_reuse=reused.append)
    tables = [pool.allocate(8) for _ in range(8)]
    for table in tables:
        for block_id in table:
            pool.mark_cached(block_id)
        pool.release(table)
    assert pool.allocate(6) == [0, 1, 2, 3, 4, 5]
    assert reused == [7, 6, 5, 4, 3, 2, 1, 0], "two more than wanted: a thirty-second of all"
    pool.share([8])
    assert pool.num_free == 64 - 6 - 1


def test_worthless_blocks_first_then_cached_ones_tail_first_oldest_first() -> None:
    reused: list[int] = []
    pool = BlockPool(8, on_reuse=reused.append)
    older, newer = pool.allocate(3), pool.allocate(3)
    for block_id in older + newer:
        pool.mark_cached(block_id)
    pool.release(older)
    pool.release(newer)
    pool.share(older[:1])
    pool.release(older[:1])  # used again: now the most recent of all
    assert pool.allocate(2) == [6, 7]
    assert reused == []
    for _ in range(6):
        pool.allocate(1)
    assert reused == [2, 1, 5, 4, 3, 0]
    assert pool.num_cached == 0


def test_a_free_cached_block_can_be_taken_back() -> None:
    reused: list[int] = []
    pool = BlockPool(3, on_reuse=reused.append)
    taken = pool.allocate(2)
    pool.mark_cached(taken[0])
    pool.release(taken)
    pool.share(taken[:1])
    assert (pool.num_free, pool.num_held) == (2, 1)
    pool.allocate(2)
    assert reused == []


def test_uncached_while_free_means_used_next() -> None:
    pool = BlockPool(3, on_reuse=lambda _: None)
    taken = pool.allocate(3)
    for block_id in taken:
        pool.mark_cached(block_id)
    pool.release(taken)
    pool.mark_uncached(1)
    assert pool.allocate(1) == [1]


def cached_pool(num_blocks: int) -> BlockPool:
    """All blocks hold something and are free, the last of them least recently used."""
    pool = BlockPool(num_blocks, on_reuse=lambda _: None)
    taken = pool.allocate(num_blocks)
    for block_id in taken:
        pool.mark_cached(block_id)
    pool.release(taken)
    return pool


def test_a_survey_comes_to_each_block_once_from_the_cold_end() -> None:
    pool = cached_pool(6)
    assert pool.survey(2) == [5, 4]
    assert pool.survey(3) == [3, 2, 1]
    assert (pool.num_surveyed, pool.is_surveyed(1), pool.is_surveyed(0)) == (5, True, False)
    pool.share([4])
    pool.release([4])
    assert pool.survey(6) == [0, 4], "who was used again is looked at again"
    assert pool.survey(6) == []


def test_what_comes_back_cold_is_reused_behind_what_else_was_surveyed() -> None:
    pool = cached_pool(6)
    held = pool.survey(2)[::-1]
    pool.survey(1)
    pool.share(held)
    assert (pool.num_surveyed, pool.num_free) == (1, 4)
    pool.release(held, cold=True)
    assert pool.num_surveyed == 3
    assert [pool.allocate(1)[0] for _ in range(6)] == [3, 5, 4, 2, 1, 0]


def test_a_block_that_lost_its_address_comes_back_empty_however_cold() -> None:
    pool = cached_pool(3)
    pool.share([1])
    pool.mark_uncached(1)
    pool.release([1], cold=True)
    assert (pool.num_empty, pool.num_surveyed, pool.survey(3)) == (1, 0, [2, 0])


class PoolMachine(RuleBasedStateMachine):
    """A model with plain dicts and a list in LRU order beside the real thing."""

    @initialize(num_blocks=st.integers(1, 12) | st.integers(32, 100))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, on_reuse=self.on_reuse)
        self.tables: list[list[int]] = []
        self.cached: set[int] = set()
        self.free_cached: list[int] = []
        self.num_surveyed = 0
        self.reused: list[int] = []

    def on_reuse(self, block_id: int) -> None:
        self.reused.append(block_id)

    def references(self, block_id: int) -> int:
        return sum(table.count(block_id) for table in self.tables)

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        num_worthless = self.pool.num_free - len(self.free_cached)
        self.reused.clear()
        taken = self.pool.allocate(count)
        num_wanted = max(0, count - num_worthless)
        num_ahead = int(self.pool.num_blocks * EVICTED_AHEAD) if num_wanted else 0
        expected = self.free_cached[: num_wanted + num_ahead]
        assert self.reused == expected, "least recently used first, and none while there are others"
        del self.free_cached[: len(expected)]
        self.num_surveyed = max(0, self.num_surveyed - len(expected))
        self.cached.difference_update(expected)
        assert taken == sorted(set(taken))
        assert all(self.references(block_id) == 0 for block_id in taken)
        self.tables.append(taken)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        block_id = data.draw(st.sampled_from(table))
        self.pool.mark_cached(block_id)
        self.cached.add(block_id)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.cached)), unique=True))
        self.pool.share(chosen)
        self.not_free(chosen)
        self.tables.append(chosen)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def uncache(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.cached)))
        self.pool.mark_uncached(block_id)
        self.cached.discard(block_id)
        self.not_free([block_id])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        cold = data.draw(st.booleans())
        self.pool.release(table, cold=cold)
        back = [b for b in reversed(table) if b in self.cached and self.references(b) == 0]
        place = self.num_surveyed if cold else len(self.free_cached)
        self.free_cached[place:place] = back
        self.num_surveyed += len(back) if cold else 0

    @rule(count=st.integers(0, 8))
    def survey(self, count: int) -> None:
        expected = self.free_cached[self.num_surveyed :][:count]
        assert self.pool.survey(count) == expected
        self.num_surveyed += len(expected)

    def not_free(self, block_ids: list[int]) -> None:
        surveyed = self.free_cached[: self.num_surveyed]
        self.num_surveyed -= len(set(surveyed) & set(block_ids))
        self.free_cached = [block_id for block_id in self.free_cached if block_id not in block_ids]

    @invariant()
    def conserves(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = {block_id for table in self.tables for block_id in table}
        assert self.pool.num_held == len(held)
        assert self.pool.num_free + self.pool.num_held == self.pool.num_blocks
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_empty == self.pool.num_free - len(self.free_cached)
        assert self.pool.num_surveyed == self.num_surveyed
        surveyed = {block_id for block_id in range(self.pool.num_blocks) if self.pool.is_surveyed(block_id)}
        assert surveyed == set(self.free_cached[: self.num_surveyed])
        for block_id in range(self.pool.num_blocks):
            assert self.pool.num_references(block_id) == self.references(block_id)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for table in self.tables:
            self.pool.release(table)
        assert self.pool.allocate(self.pool.num_blocks) == list(range(self.pool.num_blocks)), "every block is reachable"


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
