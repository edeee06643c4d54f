"""RedisIndex: one process's part in the index: publishes what its store holds, finds what the others hold.

Used as `async with RedisIndex(...) as index:`. Entering needs no server: one that is away, slow, or loses its data costs cache hits
and nothing else. It never raises because of the server. Two tasks live inside: one answers lookups, one publishes, beats and sweeps.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

from kv_store.index.breaker import Attempt, Breaker
from kv_store.index.chunk_book import ChunkBook
from kv_store.index.flight import Flight, in_time
from kv_store.index.keeper import Keeper
from kv_store.index.keys import Keyspace
from kv_store.index.lookup import choose_sources
from kv_store.index.members import Member, Owner
from kv_store.index.membership import Membership
from kv_store.index.news import News
from kv_store.index.publisher import Publisher
from kv_store.index.reader import EntryReader
from kv_store.index.seal import Seal
from kv_store.index.server import UNREACHABLE, RedisServer, cause_of
from kv_store.index.settings import IndexSettings
from kv_store.index.state import IndexCounters, IndexState
from kv_store.tiers import StoredBlock
from protocol.ids import BlockHash, WorkerId
from protocol.transfer import KVSource
from runtime.clock import Clock, MonotonicClock

log = logging.getLogger(__name__)

MAX_CHUNKS = 4096
PROBE_EVERY_S = 0.1
NUM_PROBES = 3
PATIENCE = 8
"""Times the reply timeout, after which a probe is given up: more than any answer takes, a failure included."""


class RedisIndex:
    """`snapshot` returns all that the store holds; called from a thread of its own. A TierListener: `stored` and `removed` may
    be called from any thread. Everything else is for the event loop that it was entered on."""

    def __init__(
        self,
        settings: IndexSettings,
        owner: Owner,
        snapshot: Callable[[], Sequence[StoredBlock]],
        clock: Clock | None = None,
    ) -> None:
        clock = clock or MonotonicClock()
        keys = Keyspace(settings.namespace)
        seal = self._seal = Seal(settings.cluster_key, settings.namespace)
        self._settings = settings
        self._owner = owner
        self._counters = IndexCounters()
        self._trouble = ""
        self._news = News(settings.max_queued)
        self._membership = Membership(keys, seal, clock, self._counters)
        self._breaker = Breaker(clock)
        self._reading = RedisServer(settings)
        self._reader = EntryReader(self._reading, keys, clock)
        book = ChunkBook(owner.chunk_blocks, owner.block_size)
        self._publisher = Publisher(keys, owner, seal, book, self._counters, settings.record_ttl_s)
        self._keeper = Keeper(
            settings,
            keys,
            owner,
            seal,
            self._publisher,
            self._membership,
            book,
            self._news,
            snapshot,
            self._counters,
            clock,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._news.attach(asyncio.get_running_loop())
        self._tasks = {
            asyncio.create_task(self._reader.run(), name="kv-index-reader"),
            asyncio.create_task(self._probe(), name="kv-index-probe"),
            asyncio.create_task(self._keeper.run(), name="kv-index-keeper"),
        }
        return self

    async def __aexit__(self, *_: object) -> None:
        """Says good-bye, if the server listens: our entries are void at once."""
        self._news.detach()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._keeper.leave()
        await self._reading.close()

    def stored(self, blocks: Sequence[StoredBlock]) -> None:
        self._news.add(stored=blocks)

    def removed(self, blocks: Sequence[StoredBlock]) -> None:
        self._news.add(removed=blocks)

    async def find(self, block_hashes: Sequence[BlockHash]) -> tuple[KVSource, ...]:
        """Who holds the most of this context, of which these are all full blocks from the first on; the best first, this
        process left out. Hints, in whole chunks. () where nobody does, or nothing has come from the server when the budget
        is over. Never raises."""
        step = self._owner.chunk_blocks
        addresses = block_hashes[step - 1 :: step][:MAX_CHUNKS]
        if not addresses:
            return ()
        counters = self._counters
        counters.lookups += 1
        budget_s = self._settings.budget_s
        attempt = self._breaker.admit()
        flight = self._reader.flight
        if attempt is None or (flight is not None and flight.is_connecting(budget_s)):
            counters.skipped += 1
            return ()
        answer = self._reader.read(addresses)
        try:
            if not await in_time(answer, budget_s):
                self._missed(attempt)
                return ()
            values = answer.result()
        except UNREACHABLE as error:
            counters.errors += 1
            self._trouble = cause_of(error)
            self._breaker.failed(attempt)
            return ()
        finally:
            answer.cancel()
        self._breaker.succeeded(attempt)
        found = choose_sources(
            values, self._membership.by_life, step, self._owner.fingerprint, WorkerId(self._owner.worker_id)
        )
        counters.garbage += found.num_garbage
        if found.strangers:
            self._keeper.refresh_soon()
        if found.sources:
            counters.hits += 1
        else:
            counters.misses += 1
        return found.sources

    def members(self) -> tuple[Member, ...]:
        """Those that were alive at the last look, this process included, by name."""
        return self._membership.members()

    @property
    def owner(self) -> Owner:
        """What this process says of itself."""
        return self._owner

    def state(self) -> IndexState:
        return IndexState(
            url=self._settings.shown_url,
            breaker=self._breaker.state,
            retry_in_s=self._breaker.retry_in_s,
            registered=self._publisher.life is not None,
            lag_s=self._keeper.lag_s,
            queued=self._news.num_queued,
            entries=self._publisher.num_entries,
            members=len(self._membership.by_life),
            dead_owners=self._membership.num_dead,
            strangers=self._membership.num_strangers,
            why=self._why(),
            counters=replace(self._counters),
        )

    def _why(self) -> str:
        if self._breaker.state != "closed":
            return f"not asked: {self._trouble}"
        if self._keeper.trouble:
            return f"nothing can be published: {self._keeper.trouble}"
        if strangers := self._membership.num_strangers:
            return f"{strangers} owners are not believed: {self._seal.stranger}"
        return ""

    def _missed(self, attempt: Attempt) -> None:
        """The budget of a request is over. It is the server's miss if it has had as much time and has not answered, which may
        show only later, or our own loop's."""
        self._counters.timeouts += 1
        flight = self._reader.flight
        if flight is None or flight.is_overdue(self._settings.budget_s):
            self._blame(attempt, slow=flight is not None)
            return
        task = asyncio.create_task(self._judge(attempt, flight), name="kv-index-judge")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _judge(self, attempt: Attempt, flight: Flight) -> None:
        self._blame(attempt, await flight.was_slow(self._settings.budget_s))

    def _blame(self, attempt: Attempt, slow: bool) -> None:
        if slow:
            self._counters.slow_server += 1
            self._trouble = self._too_slow
            self._breaker.failed(attempt)
        else:
            self._counters.late_loop += 1

    async def _probe(self) -> None:
        """Keeps the connection of the lookups open, and asks, while the breaker is open, whether the server is back in time."""
        while True:
            if self._breaker.state == "closed" and not self._reading.is_open:
                await self._answers()
            attempt = self._breaker.probe()
            if attempt is not None:
                if await self._answers():
                    self._breaker.succeeded(attempt)
                    log.info("the index is back", extra={"server": self._settings.shown_url})
                else:
                    self._breaker.failed(attempt)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _answers(self) -> bool:
        """Whether a lookup would be answered within the budget, the connection once open and the loop's lateness apart."""
        budget_s = self._settings.budget_s
        self._trouble = self._too_slow
        for _ in range(1 + NUM_PROBES):
            answer = self._reader.read([bytes(16)])
            try:
                async with asyncio.timeout(PATIENCE * self._settings.reply_timeout_s):
                    slow = False
                    if not await in_time(answer, budget_s) and (flight := self._reader.flight) is not None:
                        slow = await flight.was_slow(budget_s)
                    await answer
            except UNREACHABLE as error:
                self._trouble = cause_of(error)
                return False
            if not slow:
                return True
        return False

    @property
    def _too_slow(self) -> str:
        return f"no answer within the budget of {1000 * self._settings.budget_s:g} ms"
