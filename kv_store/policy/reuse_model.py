"""ReuseModel: how soon blocks of a kind are wanted again, learnt while it goes; and what their room is worth, by their age.

For every class of blocks it keeps two histograms over age, the time since they were last wanted: how many came back at that
age, and how long they were watched there. Their quotient is the hazard h(a), the rate of return. What is still
waiting counts as watched so far, so that slow returns are not taken for none. Room is then worth its Gittins index,

    index(a) = max over T of  P(back within T | not back before age a) / E[time until it is back or T has passed | same]

in hits per block and second: the best rate that any patience T can get out of it (Gittins 1979; ranking what is cached by
hits per room and time is due to Beckmann, Chen and Cidon, "LHD", NSDI 2018, which takes an average where this takes the best
T). Giving up the least index is best as long as room has one price. A return ends the count: what comes
back is in the tier or is computed again, and starts a new life in either case.

Few observations are shrunk: a class to its family (times one factor of its own), a family to "the older, the less".
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FIRST_EDGE_S = 1.0
EDGE_GROWTH = 1.3
NUM_AGES = 36
"""Age bins: 0 to 1 s, then each 1.3 times as long as all before it let on; the last one has no end."""

CLASS_STRENGTH = 8.0
"""Returns that a class must show before its own hazard weighs as much as what its neighbours suggest."""

CLASS_INFLUENCE = 256.0
"""Returns of one class that count towards what its family is like."""

PRIOR_STRENGTH = 1.0
PRIOR_SHAPE = 0.5
"""Where nothing is seen, the hazard is taken to be PRIOR_SHAPE / age, times what all that is seen says of its scale; it weighs
as much as one return in each bin. It ranks as LRU does."""

MEMORY_ENDS = 32_768
"""Lives after whose end old observations are halved, so that the model follows its load."""

STEP_BINS = 12
"""Of the index, worked out in one step."""

_SMOOTHING = np.array([0.25, 0.5, 0.25])


class ReuseModel:
    def __init__(self, families: Sequence[Sequence[int]]) -> None:
        """`families`: the classes 0, 1, ..., divided into those that resemble each other."""
        self._families = [np.array(family) for family in families]
        num_classes = sum(map(len, families))
        edges = [0.0, *(FIRST_EDGE_S * EDGE_GROWTH**i for i in range(NUM_AGES))]
        self.edges: list[float] = edges[:-1]
        """Where each bin of ages begins, in seconds."""
        self._starts: Floats = np.array(edges[:-1])
        self._widths: Floats = np.array([b - a for a, b in pairwise(edges)])
        self._returns: Floats = np.zeros((num_classes, NUM_AGES))
        self._watched_s: Floats = np.zeros((num_classes, NUM_AGES))
        self._num_ends = 0
        self._prior: Floats = PRIOR_SHAPE / (self._starts + 0.5 * self._widths)
        self.index: Floats = np.tile(gittins_index(self._prior[None], self._widths), (num_classes, 1))
        """[class, bin of age]: hits per block and second."""

    def bin_of(self, age_s: float) -> int:
        return max(bisect_right(self.edges, age_s) - 1, 0)

    def ended(self, class_id: int, age_s: float, *, returned: bool) -> None:
        """A life ended at that age: wanted again, or forgotten without."""
        self._watched_s[class_id] += np.clip(age_s - self._starts, 0.0, self._widths)
        if returned:
            self._returns[class_id, self.bin_of(age_s)] += 1
        self._num_ends += 1
        if self._num_ends >= MEMORY_ENDS:
            self._num_ends //= 2
            self._returns *= 0.5
            self._watched_s *= 0.5

    def fit(self, waiting: Iterable[tuple[NDArray[np.int64], Floats]]) -> Iterator[None]:
        """Work the index out anew; given classes and ages of what still waits, a portion at a time. Happens as it is iterated: a
        step costs a portion, or a few hundred microseconds. The index is the old one up to the last step."""
        waited_s = np.zeros_like(self._watched_s)
        for classes, ages_s in waiting:
            waited_s += self._time_in_bins(classes, ages_s)
            yield
        returns = _smooth(self._returns)
        watched = _smooth(self._watched_s + waited_s)
        hazard = np.empty_like(returns)
        for family in self._families:
            hazard[family] = self._shrunk(returns[family], watched[family])
        for index in _gittins_steps(hazard, self._widths):  # noqa: B007  # the last one is all of it
            yield
        self.index = index

    def _shrunk(self, returns: Floats, watched: Floats) -> Floats:
        """The hazards of a family of classes."""
        # Or one head that everybody begins with would speak for all.
        weight = np.minimum(1.0, CLASS_INFLUENCE / np.maximum(returns.sum(axis=1), CLASS_INFLUENCE))
        family_returns, family_watched = weight @ returns, weight @ watched
        prior = self._prior * (family_returns.sum() + 1.0) / (family_watched @ self._prior + 1.0)
        pooled = (family_returns + PRIOR_STRENGTH) / (family_watched + PRIOR_STRENGTH / prior)
        expected = (watched * pooled).sum(axis=1)
        factor = (returns.sum(axis=1) + CLASS_STRENGTH) / (expected + CLASS_STRENGTH)
        base = pooled[None] * factor[:, None]
        shrunk: Floats = (returns + CLASS_STRENGTH) / (watched + CLASS_STRENGTH / base)
        return shrunk

    def _time_in_bins(self, classes: NDArray[np.int64], ages_s: Floats) -> Floats:
        """[class, bin]: how long all of them together were in that bin up to now."""
        bins = np.maximum(np.searchsorted(self._starts, ages_s, side="right") - 1, 0)
        inside_s = np.minimum(ages_s - self._starts[bins], self._widths[bins])
        shape, cells = self._returns.shape, classes * NUM_AGES + bins
        counts = np.bincount(cells, minlength=self._returns.size).reshape(shape)
        passed = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1] - counts
        spent_s = np.bincount(cells, weights=inside_s, minlength=self._returns.size).reshape(shape)
        total_s: Floats = np.asarray(spent_s + passed * self._widths, dtype=np.float64)
        return total_s


def gittins_index(hazard: Floats, widths: Floats) -> Floats:
    """The best of hits per second, from the beginning of each bin on. `hazard`: [classes, bins], above 0, constant within a
    bin; so the best patience ends with a bin."""
    *_, index = _gittins_steps(hazard, widths)
    return index


def _gittins_steps(hazard: Floats, widths: Floats) -> Iterator[Floats]:
    """The index as far as it is: patience of so many bins. What comes last is all of it."""
    returns = -np.expm1(-hazard * widths)
    waits = returns / hazard
    best: Floats = np.zeros_like(hazard)
    alive, hits, time = np.ones_like(hazard), np.zeros_like(hazard), np.zeros_like(hazard)
    for ahead in range(hazard.shape[1]):
        if ahead % STEP_BINS == 0:
            yield best
        rest = hazard.shape[1] - ahead
        hits[:, :rest] += alive[:, :rest] * returns[:, ahead:]
        time[:, :rest] += alive[:, :rest] * waits[:, ahead:]
        alive[:, :rest] *= 1.0 - returns[:, ahead:]
        best[:, :rest] = np.maximum(best[:, :rest], hits[:, :rest] / time[:, :rest])
    yield best


def _smooth(counts: Floats) -> Floats:
    """Each bin with its neighbours, total kept: bins are finer than what a few hundred observations can tell apart."""
    padded = np.pad(counts, ((0, 0), (1, 1)), mode="edge")
    smoothed: Floats = _SMOOTHING[0] * padded[:, :-2] + _SMOOTHING[1] * padded[:, 1:-1] + _SMOOTHING[2] * padded[:, 2:]
    return smoothed
