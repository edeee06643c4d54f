"""How much lies together in a block pool after long random use, and what it costs to keep it so.

    python -m benchmarks.bench_block_pool

Sequences of 1 to 200 blocks come at random, grow one block at a time, and go in random order, at 80 % occupancy. With
"cached", all blocks that are released stay in the prefix cache, so that every new one takes the place of an old one.
"""

import random
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

from engine.block_pool import BlockPool

MAX_BLOCKS = 200
OCCUPANCY = 0.8
GROWTHS_PER_SEQUENCE = 20
TIMED_BLOCKS = 128


class Load:
    """A pool in use. `step` is one sequence's worth of it."""

    def __init__(self, num_blocks: int, *, cached: bool) -> None:
        self._rng = random.Random(1)
        self._cached = cached
        self.pool = BlockPool(num_blocks, on_reuse=lambda _: None)
        self._tables: list[list[int]] = []
        self.fresh_runs: list[tuple[int, int]] = []
        self.final_runs: list[tuple[int, int]] = []

    def step(self) -> None:
        """Admit up to the occupancy, grow, and let one go."""
        pool = self.pool
        while pool.num_held < OCCUPANCY * pool.num_blocks:
            table = pool.allocate(min(pool.num_free, self._rng.randint(1, MAX_BLOCKS)))
            self.fresh_runs.append((len(table), num_runs(table)))
            self._tables.append(table)
        for _ in range(min(GROWTHS_PER_SEQUENCE, pool.num_free)):
            table = self._rng.choice(self._tables)
            table += pool.allocate(1, after=table[-1])
        table = self._tables.pop(self._rng.randrange(len(self._tables)))
        self.final_runs.append((len(table), num_runs(table)))
        for block_id in table if self._cached else ():
            pool.mark_cached(block_id)
        pool.release(table)


def num_runs(block_ids: Sequence[int]) -> int:
    return 1 + sum(block_id != before + 1 for before, block_id in pairwise(block_ids))


def mean_run(runs: Sequence[tuple[int, int]]) -> float:
    """Blocks per run, of the later half."""
    late = runs[len(runs) // 2 :]
    return sum(blocks for blocks, _ in late) / sum(count for _, count in late)


def measure(num_blocks: int, *, cached: bool, steps: int = 6000) -> str:
    load = Load(num_blocks, cached=cached)
    for _ in range(steps):
        load.step()
    allocate_us, release_us = [], []
    for _ in range(500):
        load.step()
        begun_at = time.perf_counter()
        table = load.pool.allocate(min(TIMED_BLOCKS, load.pool.num_free))
        allocated_at = time.perf_counter()
        load.pool.release(table)
        release_us.append((time.perf_counter() - allocated_at) * 1e6)
        allocate_us.append((allocated_at - begun_at) * 1e6)
    return (
        f"{num_blocks:>7} {cached!s:>6} {mean_run(load.fresh_runs):>10.1f} {mean_run(load.final_runs):>10.1f}"
        f" {statistics.median(allocate_us):>12.0f} {statistics.median(release_us):>11.0f}"
    )


def main() -> None:
    print(f"{'blocks':>7} {'cached':>6} {'run, new':>10} {'run, grown':>10} {'allocate, us':>12} {'release, us':>11}")
    for num_blocks in (4096, 32768):
        for cached in (False, True):
            print(measure(num_blocks, cached=cached))


if __name__ == "__main__":
    main()
