"""Keeper: the one task that writes to the index, off every request's path.

A round: look whether this is still the server that we know, register where needed, beat and read the members when it is time,
publish a batch, compare a sample now and then, sweep a slice of a dead owner. While the server is away, rounds become rare;
when it is another one, or has lost its data, everything is published anew from a snapshot of the store, at a bounded pace.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from redis.exceptions import ResponseError

from kv_store.index.breaker import Breaker
from kv_store.index.chunk_book import ChunkBook
from kv_store.index.drift import DriftCheck
from kv_store.index.keys import Keyspace
from kv_store.index.members import Owner
from kv_store.index.membership import Membership
from kv_store.index.news import News
from kv_store.index.publisher import Publisher
from kv_store.index.seal import Seal
from kv_store.index.server import UNREACHABLE, RedisServer, cause_of
from kv_store.index.settings import IndexSettings
from kv_store.index.state import IndexCounters
from kv_store.index.sweeper import Sweeper
from kv_store.tiers import StoredBlock
from runtime.clock import Clock

log = logging.getLogger(__name__)

BETWEEN_BATCHES_S = 0.005
"""Lets news gather."""

BETWEEN_SLICES_S = 0.001
"""While there is more to do than fits into one round: leaves the server to its readers. A round is some milliseconds of work for
this process, and for the server scripts of a fraction of a millisecond, between which it serves others."""

SWEEP_EVERY_S = 0.01
SWEEP_WHILE_BUSY_S = 0.1
"""How often a slice is swept, and how often where there is news to publish: that goes first, however much is dead."""

AFTER_REFUSAL_S = 5.0
SOONEST_REFRESH_S = 0.1


class Keeper:
    """`run` until cancelled, then `leave`. On one event loop."""

    def __init__(
        self,
        settings: IndexSettings,
        keys: Keyspace,
        owner: Owner,
        seal: Seal,
        publisher: Publisher,
        membership: Membership,
        book: ChunkBook,
        news: News,
        snapshot: Callable[[], Sequence[StoredBlock]],
        counters: IndexCounters,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._server = RedisServer(settings)
        self._seal = seal
        self._publisher = publisher
        self._membership = membership
        self._book = book
        self._news = news
        self._snapshot = snapshot
        self._counters = counters
        self._clock = clock
        self._breaker = Breaker(clock)
        self._sweeper = Sweeper(keys, owner.worker_id, counters)
        self._drift = DriftCheck(keys, owner, publisher, counters)
        self._run_id: str | None = None
        self._resync = True
        self._away = False
        self._trouble = ""
        self._told: set[str] = set()
        self._strangers_told = False
        self._beat_at = clock.now()
        self._refreshed_at = clock.now()
        self._drift_at = clock.now() + settings.drift_check_s
        self._publish_at = clock.now()
        self._sweep_at = clock.now()
        self._behind_since: float | None = None

    @property
    def lag_s(self) -> float:
        """The age of the oldest news that is not in the index; 0 if there is none."""
        return 0.0 if self._behind_since is None else self._clock.now() - self._behind_since

    @property
    def trouble(self) -> str:
        """Why nothing is published at present; "" where something is."""
        if self._trouble or self._publisher.life is not None:
            return self._trouble
        return "another process has this worker's id" if self._publisher.fenced else "not registered yet"

    def refresh_soon(self) -> None:
        """Somebody met an owner that is not known."""
        if self._clock.now() - self._refreshed_at >= SOONEST_REFRESH_S:
            self._beat_at = self._clock.now()
            self._news.wake()

    async def run(self) -> None:
        """Until cancelled. Nothing that the server answers ends it."""
        while True:
            busy = False
            attempt = self._breaker.admit() or self._breaker.probe()
            if attempt is not None:
                try:
                    busy = await self._round()
                except Exception as error:  # noqa: BLE001 - a reply is untrusted: whoever wrote it may break any step with it
                    self._breaker.failed(attempt)
                    self._fail(error)
                else:
                    self._breaker.succeeded(attempt)
                    self._away = False
                    self._trouble = ""
                    self._told.clear()
            self._measure_lag()
            behind = busy and (self._book.num_marked > 0 or not self._sweeper.idle)
            await asyncio.sleep(BETWEEN_SLICES_S if behind else BETWEEN_BATCHES_S)
            if not busy:
                await self._news.wait(self._idle_s())

    async def leave(self) -> None:
        """Tell the index that we are gone, if it listens, and close. Never raises because of the server."""
        try:
            if not self._away:
                await self._publisher.leave(self._server)
        except Exception as error:  # noqa: BLE001 - as in `run`; our record expires in a moment anyway
            log.debug("could not leave the index: %s", cause_of(error))
        finally:
            await self._server.close()

    async def _round(self) -> bool:
        """Whether there is more to do at once."""
        await self._meet()
        await self._hear()
        await self._register()
        if self._clock.now() >= self._beat_at:
            self._refreshed_at = self._clock.now()
            self._beat_at = self._refreshed_at + self._settings.heartbeat_s
            await self._publisher.beat(self._server)
            if not await self._membership.refresh(self._server, self._publisher.entry):
                self._publisher.retire()  # somebody has deleted or changed who we are
            self._tell_strangers()
        published = await self._publish()
        return await self._sweep(published) or published

    async def _meet(self) -> None:
        """A server that answers after silence may be another one."""
        if self._server.is_open:
            return
        run_id = await self._server.inspect()
        if run_id is None or run_id != self._run_id:
            self._publisher.retire()
        self._run_id = run_id

    async def _hear(self) -> None:
        if self._news.overflowed():
            self._counters.overflows += not self._resync
            self._resync = True
        if self._resync:
            await self._start_over()
            self._resync = False
            self._counters.resyncs += 1
        for item in self._news.take():
            self._book.stored(item.stored)
            self._book.removed(item.removed)

    async def _start_over(self) -> None:
        """Take all that the store holds. That can be seconds' work: on a thread, and we stay alive meanwhile."""
        working = asyncio.ensure_future(asyncio.to_thread(lambda: self._book.replace(self._snapshot())))
        while not (await asyncio.wait({working}, timeout=self._settings.heartbeat_s))[0]:
            if self._publisher.life is not None:
                await self._publisher.beat(self._server)
        await working

    async def _register(self) -> None:
        """An owner that finds itself fenced off yields to the one that has its name, for as long as that one lives."""
        if self._publisher.life is not None:
            return
        if self._publisher.fenced and await self._publisher.superseded(self._server):
            return
        again = self._counters.registrations > 0
        await self._publisher.register(self._server)
        self._beat_at = self._clock.now()
        if again:
            self._resync = True

    async def _publish(self) -> bool:
        """A refusal (out of memory, no permission) must not keep us from beating."""
        if self._clock.now() < self._publish_at:
            return False
        try:
            if self._clock.now() >= self._drift_at:
                self._drift_at = self._clock.now() + self._settings.drift_check_s
                await self._drift.check(self._server)
            return await self._publisher.flush(self._server)
        except ResponseError as error:
            self._counters.refused += 1
            self._publish_at = self._clock.now() + AFTER_REFUSAL_S
            log.warning("the index server refuses what is published: %s", error)
            return False

    async def _sweep(self, busy: bool) -> bool:
        if busy and self._clock.now() < self._sweep_at + SWEEP_WHILE_BUSY_S:
            return False
        dead = self._membership.dead_for(self._settings.record_ttl_s)
        if not dead and self._sweeper.idle:
            return False
        await asyncio.sleep(self._sweep_at - self._clock.now())
        self._sweep_at = self._clock.now() + SWEEP_EVERY_S
        life = await self._sweeper.step(self._server, dead)
        if life is not None:
            self._membership.swept(life)
        return not self._sweeper.idle

    def _fail(self, error: Exception) -> None:
        self._counters.outages += not self._away
        self._away = True
        self._trouble = cause_of(error)
        kind = type(error).__name__
        if kind not in self._told:
            self._told.add(kind)
            log.warning(
                "the index is out of reach; going on with what this node has: %s",
                self._trouble,
                extra={"server": self._settings.shown_url},
                exc_info=None if isinstance(error, UNREACHABLE) else error,
            )

    def _tell_strangers(self) -> None:
        count = self._membership.num_strangers
        if count and not self._strangers_told:
            log.warning("%d owners in the index are not believed: %s", count, self._seal.stranger)
        self._strangers_told = count > 0

    def _measure_lag(self) -> None:
        if not self._book.num_marked and not self._news.num_queued:
            self._behind_since = None
        elif self._behind_since is None:
            self._behind_since = self._clock.now()

    def _idle_s(self) -> float:
        if self._breaker.state == "open":
            return max(BETWEEN_BATCHES_S, self._breaker.retry_in_s)
        return max(BETWEEN_BATCHES_S, min(self._settings.heartbeat_s, self._beat_at - self._clock.now()))
