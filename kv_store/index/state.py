"""What the index tells about itself: IndexCounters while it runs, IndexState for metrics and status."""

from dataclasses import dataclass, field

from kv_store.index.breaker import BreakerState


@dataclass(slots=True)
class IndexCounters:
    """Since the start of the process; they only grow. Written on the event loop only.

    `lookups` = `hits` (some source was found) + `misses` + `timeouts` (over budget) + `skipped` (breaker open, or still connecting) +
    `errors`. Of the timeouts, `slow_server` are the server's and `late_loop` those of this process's busy event loop, which the
    breaker does not mind; those of the last moment are yet to be told apart.
    `published`, `withdrawn`: entries written. `crowded`: not written, because others fill the entry. `fenced`: writes refused
    because another process has this worker's id. `refused`: batches that the server would not take (its memory is full, say). `drift`: sampled entries that were not as they should be, and were mended.
    `garbage`: values of others that could not be read. `swept`: places of dead owners taken out. `overflows`: times that news
    was dropped. `pruned`: lives of nobody that were deleted, because there were too many.
    """

    lookups: int = 0
    hits: int = 0
    misses: int = 0
    timeouts: int = 0
    slow_server: int = 0
    late_loop: int = 0
    skipped: int = 0
    errors: int = 0
    published: int = 0
    withdrawn: int = 0
    crowded: int = 0
    fenced: int = 0
    refused: int = 0
    registrations: int = 0
    resyncs: int = 0
    overflows: int = 0
    drift: int = 0
    checked: int = 0
    garbage: int = 0
    swept: int = 0
    outages: int = 0
    pruned: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexState:
    """A moment. `lag_s`: the age of the oldest news that is not published. `queued`: blocks whose news waits. `entries`: of
    this process in the index. `registered` False: nothing can be published at present. `dead_owners`: not yet swept.
    `strangers`: owners that are not believed, at the last look. `why`: why the index is not used, or not all of it, in one line; "" if
    it is."""

    url: str
    breaker: BreakerState
    retry_in_s: float
    registered: bool
    lag_s: float
    queued: int
    entries: int
    members: int
    dead_owners: int
    strangers: int = 0
    why: str = ""
    counters: IndexCounters = field(default_factory=IndexCounters)
