"""How much of a prefix to load and how much to compute: a pure function of measured rates."""

from dataclasses import dataclass
from typing import Literal

LOAD_OVERHEAD_S = 0.002
"""Beside moving the bytes: an event, a thread, a command, and the step that they wait for."""

WORTH_SPLITTING = 1 / 8
"""Of a load: what computing the front meanwhile must save, because it takes the engine from other requests."""

PROBE_BLOCKS = 8
"""Loaded although that is slower, when it has not been measured lately: otherwise one slow moment would be the last."""

LoadPolicy = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True)
class LoadableBlocks:
    """The leading blocks of a chain that are near: in host memory, or on disk, in whatever order."""

    host: int
    disk: int

    @property
    def total(self) -> int:
        return self.host + self.disk


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Compute the first `compute_first_blocks` of a chain while the `load_blocks` after them are loaded."""

    compute_first_blocks: int
    load_blocks: int


NOTHING = LoadPlan(0, 0)


def load_seconds(loadable: LoadableBlocks, load_s: float | None, promote_s: float | None) -> float | None:
    """What loading takes: from host memory `load_s` a block, from disk the slower of the two ways of which one follows the
    other piece by piece. None while what is needed has not been measured."""
    if load_s is None or (loadable.disk and promote_s is None):
        return None
    return loadable.host * load_s + loadable.disk * max(load_s, promote_s or 0.0)


def plan_load(
    loadable: LoadableBlocks,
    *,
    load_s: float | None,
    promote_s: float | None,
    compute_s: float | None,
    policy: LoadPolicy = "auto",
    stale: bool = False,
) -> LoadPlan:
    """What to do with blocks that are near; each `_s` is measured seconds a block, None if not known; `stale`: of loading, not
    measured lately.

    Without measurements everything is loaded: nothing else would measure. A load that takes longer than computing the same
    blocks is split if that is faster than either: with n blocks, c to compute and l to load one, both ends meet after
    c * k = l * (n - k) seconds, at k = n * l / (c + l). They always meet sooner than either alone would end; but where
    computing alone is faster than loading, the plan computes everything, for then a load that is late costs more than it
    can gain.
    """
    total = loadable.total
    if not total or policy == "never":
        return NOTHING
    seconds = load_seconds(loadable, load_s, promote_s)
    if policy == "always" or seconds is None or compute_s is None:
        return LoadPlan(0, total)
    if LOAD_OVERHEAD_S + seconds >= total * compute_s:
        return LoadPlan(0, min(total, PROBE_BLOCKS)) if stale else NOTHING
    per_block = seconds / total
    first = int(total * per_block / (compute_s + per_block))
    if first < total * WORTH_SPLITTING:
        first = 0
    return LoadPlan(first, total - first)
