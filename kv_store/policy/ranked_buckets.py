"""RankedBuckets: stretches with blocks to give, by class and bin of age; the bucket whose room is worth least comes first.

A stretch grows older by moving to the next bin when that is due. Every stretch of a bucket is worth the same; where
room becomes more valuable with age the youngest goes first, else the oldest.
"""

import heapq
from itertools import count
from math import inf

import numpy as np

from kv_store.policy.reuse_model import NUM_AGES, ReuseModel
from kv_store.policy.stretches import NUM_CLASSES, Stretch


class RankedBuckets:
    def __init__(self, model: ReuseModel) -> None:
        self._model = model
        self._buckets: list[dict[Stretch, None]] = [{} for _ in range(NUM_CLASSES * NUM_AGES)]
        self._due: list[tuple[float, int, Stretch]] = []  # one for each stretch that is on time, hardly more in all
        self._order = count()
        self._by_rank: list[int] = []
        self._rank_of: list[int] = []
        self._is_rising: list[bool] = []
        self._ranks: list[int] = []
        self._is_queued: list[bool] = []
        self.rank()

    def rank(self) -> None:
        """Order the buckets by the model's index, as it is now."""
        index = self._model.index
        self._by_rank = np.argsort(index.ravel(), kind="stable").tolist()
        self._rank_of = [0] * len(self._by_rank)
        for rank, bucket in enumerate(self._by_rank):
            self._rank_of[bucket] = rank
        rising = np.zeros_like(index, dtype=bool)
        rising[:, :-1] = index[:, 1:] > index[:, :-1]
        self._is_rising = rising.ravel().tolist()
        self._is_queued = [bool(members) for members in self._buckets]
        self._ranks = sorted(self._rank_of[bucket] for bucket, members in enumerate(self._buckets) if members)

    def place(self, stretch: Stretch, now: float) -> None:
        """Into the bucket of its class and age, out of any other."""
        self.take_out(stretch)
        edges = self._model.edges
        age_bin = self._model.bin_of(now - stretch.last_wanted)
        while age_bin + 1 < NUM_AGES and stretch.last_wanted + edges[age_bin + 1] <= now:
            age_bin += 1  # rounding: it would be due at once, for ever
        self._put(stretch, stretch.class_id * NUM_AGES + age_bin)
        if age_bin + 1 < NUM_AGES:
            stretch.due = stretch.last_wanted + edges[age_bin + 1]
            if stretch.due < stretch.next_look:
                self._look_again(stretch)
        else:
            stretch.due = inf

    def take_out(self, stretch: Stretch) -> None:
        if stretch.bucket >= 0:
            del self._buckets[stretch.bucket][stretch]
            stretch.bucket = -1

    def grow_older(self, now: float, at_most: int | None = None) -> None:
        """Everything that is due, or so much of it."""
        for _ in count() if at_most is None else range(at_most):
            if not self._due or self._due[0][0] > now:
                break
            looked_at, _, stretch = heapq.heappop(self._due)
            if stretch.next_look != looked_at:
                continue  # it has been looked at sooner
            stretch.next_look = inf
            if stretch.bucket < 0:
                continue
            if stretch.due <= now:
                self.place(stretch, now)
            elif stretch.due < inf:
                self._look_again(stretch)

    def first(self) -> Stretch | None:
        """The stretch whose room is worth least."""
        while self._ranks:
            bucket = self._by_rank[self._ranks[0]]
            members = self._buckets[bucket]
            if members:
                return next(reversed(members)) if self._is_rising[bucket] else next(iter(members))
            heapq.heappop(self._ranks)
            self._is_queued[bucket] = False
        return None

    def _put(self, stretch: Stretch, bucket: int) -> None:
        if not self._is_queued[bucket]:
            heapq.heappush(self._ranks, self._rank_of[bucket])
            self._is_queued[bucket] = True
        self._buckets[bucket][stretch] = None
        stretch.bucket = bucket

    def _look_again(self, stretch: Stretch) -> None:
        stretch.next_look = stretch.due
        heapq.heappush(self._due, (stretch.due, next(self._order), stretch))
