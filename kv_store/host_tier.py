"""HostTier: slots of host memory under one lock, and everybody who is to hear what they hold.

Questions come from any thread; what changes a tier comes from the event loop alone, so listeners hear of changes in order.
Each call holds the lock for as long as it takes to look up a few hundred blocks, and does no I/O. It lives as long as its
store; the memory is somebody else's.
"""

import copy
import logging
import threading
from collections.abc import Iterable, Sequence

from kv_store.admission import Admission
from kv_store.clean_blocks import CleanBlocks
from kv_store.clears import Clears
from kv_store.directory import TierDirectory
from kv_store.entries import Entry, Occupancy, Reservation
from kv_store.load_choice import LoadableBlocks
from kv_store.observer import Move, NoObserver, StoreObserver
from kv_store.policy.policy import EvictionPolicy, steps_of
from kv_store.quotas import Quotas
from kv_store.rates import Rates
from kv_store.stats import Counters
from kv_store.tier_events import TierEvents
from kv_store.tiers import BlockDisk, BlockMemory, StoredBlock
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, Tenant
from runtime.clock import Clock

log = logging.getLogger(__name__)


class HostTier:
    """`num_slots` slots, the first ones of `memory`; `rates` and `counters` are the whole store's, under the same lock. What is evicted and not on `disk`, where there is one, is a demotion that was dropped."""

    def __init__(
        self,
        memory: BlockMemory,
        num_slots: int,
        policy: EvictionPolicy,
        *,
        clock: Clock,
        admission: Admission,
        events: TierEvents,
        quotas: Quotas | None = None,
        observer: StoreObserver | None = None,
        disk: BlockDisk | None = None,
    ) -> None:
        self.memory = memory
        self.num_slots = num_slots
        self.quotas = quotas or Quotas()
        self.lock = threading.Lock()
        self.counters = Counters()
        self.rates = Rates()
        self.admission = admission
        self._clock = clock
        self._disk = disk
        self._observer: StoreObserver = observer or NoObserver()
        self._directory = TierDirectory(
            num_slots, policy, clock=clock, quotas=self.quotas, tier="host", observer=self._observer
        )
        self._events = events
        self._clean = CleanBlocks()
        self._clears = Clears()
        self._logged: set[tuple[Move, type[BaseException]]] = set()

    # Questions

    def num_ready(self, block_hashes: Sequence[bytes]) -> int:
        with self.lock:
            return self._directory.num_ready(block_hashes)

    def are_ready(self, block_hashes: Sequence[bytes]) -> list[bool]:
        with self.lock:
            return [self._directory.is_ready(block_hash) for block_hash in block_hashes]

    def are_pinned(self, block_hashes: Sequence[bytes]) -> list[bool]:
        with self.lock:
            return [self._directory.is_pinned(block_hash) for block_hash in block_hashes]

    def are_here(self, block_hashes: Iterable[bytes]) -> list[bool]:
        """Ready, or on their way."""
        with self.lock:
            return [block_hash in self._directory for block_hash in block_hashes]

    def short_of(self, count: int, tenant: Tenant | None = None) -> int:
        """How many of `count` new blocks (of one tenant, if given) have neither a free slot nor a clean block's."""
        with self.lock:
            lacking = count - self._directory.num_free if tenant is None else self._directory.over(tenant, count)
            return lacking - self._clean.count(tenant)

    def occupancy(self) -> Occupancy:
        with self.lock:
            return self._directory.occupancy()

    def slots_by_tenant(self) -> dict[Tenant, int]:
        with self.lock:
            return self._directory.slots_by_tenant()

    def snapshot(self) -> list[StoredBlock]:
        """All that was ready at some moment of the call; listeners hear of what changes meanwhile. Long, but for the lock."""
        with self.lock:
            entries = self._directory.snapshot()
        return [entry.stored("host") for entry in entries if entry.ready]

    def by_value(self) -> list[BlockHash]:
        """All that is ready, the most valuable first. Long, and holds the lock: for when nobody else is left."""
        with self.lock:
            return self._directory.by_value()

    # Writing

    def requested(self, blocks: Sequence[CachedBlock]) -> None:
        """From any thread. The lock is taken for a few hundred blocks at a time: the engine's thread waits for it."""
        for step in steps_of(blocks):
            with self.lock:
                self.admission.requested(step, self._clock.now())
        steps, done = self._directory.requested(blocks), False
        while not done:
            with self.lock:
                done = next(steps, True) is True

    def mark(self) -> int:
        """Of a job that begins now, for `reserve`."""
        with self.lock:
            return self._clears.mark

    def reserve(self, blocks: Sequence[CachedBlock], begun: int | None = None) -> Reservation:
        """`begun`: the job's mark, if it is not only beginning."""
        with self.lock:
            gone = self._give_up_clean(blocks)
            reservation = self._directory.reserve(blocks)
            for entry in reservation.entries:
                entry.begun = self._clears.mark if begun is None else begun
            gone += reservation.evicted
            self._count_evicted(gone)
            self.counters.refused_without_room += reservation.num_without_room
            if reservation.num_over_quota:
                given = {entry.block.block_hash for entry in reservation.entries}
                tenant = next(Tenant(block.tenant) for block in blocks if block.block_hash not in given)
                self.counters.over_quota(tenant, reservation.num_over_quota)
        self._tell_removed(gone)
        return reservation

    def commit(self, entries: Sequence[Entry], checksums: Sequence[int], *, held: bool = False) -> list[Entry]:
        """Those that are kept: all, but for what was cleared since its job began."""
        with self.lock:
            cleared = [self._clears.since(entry.begun, entry.block.tenant) for entry in entries]
            kept = [entry for entry, is_cleared in zip(entries, cleared, strict=True) if not is_cleared]
            self._directory.abort(entry for entry, is_cleared in zip(entries, cleared, strict=True) if is_cleared)
            right = [value for value, is_cleared in zip(checksums, cleared, strict=True) if not is_cleared]
            self._directory.commit(kept, right, held=held)
            self.counters.stored_host += len(kept)
        self._events.stored([entry.stored("host") for entry in kept])
        return kept

    def abort(self, entries: Sequence[Entry]) -> None:
        with self.lock:
            self._directory.abort(entries)

    def lost_from_disk(self, blocks: Sequence[StoredBlock]) -> None:
        """The disk has given these up."""
        now = self._clock.now()
        with self.lock:
            for stored in blocks:
                self.admission.evicted(self.admission.was_wanted_twice(stored.block), now)

    def quarantined(self, num_slots: int) -> None:
        """Bytes may still land in so many slots that are being written."""
        with self.lock:
            self.counters.quarantined += num_slots

    def settled(self, entries: Sequence[Entry]) -> None:
        """No more bytes can land in slots that were quarantined."""
        with self.lock:
            self.counters.quarantined -= len(entries)
            self._directory.abort(entries)

    # Reading

    def hold(self, block_hashes: Sequence[bytes]) -> list[Entry]:
        with self.lock:
            return self._directory.hold(block_hashes)

    def hold_each(self, block_hashes: Sequence[bytes]) -> list[Entry]:
        """Those of the blocks that are ready."""
        with self.lock:
            return [entry for block_hash in block_hashes for entry in self._directory.hold([block_hash])]

    def used(self, entries: Sequence[Entry]) -> None:
        with self.lock:
            self._directory.used(entries)
            self._keep(entries)
            self.counters.read_host += len(entries)

    def let_go(self, entries: Sequence[Entry]) -> None:
        with self.lock:
            self._directory.let_go(entries)

    # Going

    def leave(self, count: int, tenant: Tenant | None = None) -> list[Entry]:
        """Chosen to go next, and held for whoever writes them to disk, until `written`."""
        with self.lock:
            entries = self._directory.leave(count, tenant)
            self._directory.hold_these(entries)
            return entries

    def written(self, entries: Sequence[Entry]) -> int:
        """Those that are on disk now, and that nobody has used meanwhile, are clean; how many. The others stay."""
        with self.lock:
            self._directory.let_go(entries)
            clean = [e for e in entries if e.leaving and self._disk is not None and e.block.block_hash in self._disk]
            self._directory.stay(set(entries).difference(clean))
            for entry in clean:
                self._clean.add(entry)
            return len(clean)

    def nothing_leaves(self) -> None:
        """What was to go next stays."""
        with self.lock:
            self._keep(self._clean.take(self.num_slots))

    def clear_begins(self, tenant: Tenant | None) -> None:
        """Of all tenants or one, what is being written is not kept."""
        with self.lock:
            self._clears.note(tenant)

    def drop_damaged(self, entry: Entry) -> None:
        """Its bytes are not what they were. Counted once, however many readers find out."""
        with self.lock:
            gone = self._directory.drop([entry])
            self._clean.discard(gone)
            self.counters.checksum_failures += len(gone)
        if gone:
            log.warning("a KV block in host memory has changed since it was stored; it is dropped")
            self._tell_removed(gone)

    def forget(self, block_hashes: Iterable[bytes]) -> int:
        with self.lock:
            gone = self._directory.forget(block_hashes)
            self._clean.discard(gone)
        self._tell_removed(gone)
        return len(gone)

    def pin(self, block_hashes: Sequence[bytes], ttl_s: float) -> int:
        with self.lock:
            return self._directory.pin(block_hashes, ttl_s)

    def unpin(self, block_hashes: Sequence[bytes] | None) -> int:
        with self.lock:
            return self._directory.unpin(block_hashes)

    # Counting

    def looked_up(self, num_blocks: int, found: LoadableBlocks) -> None:
        """A request asked for a chain of so many blocks."""
        with self.lock:
            counters = self.counters
            counters.lookups += 1
            counters.hits += found.total > 0
            counters.found_host += found.host
            counters.found_disk += found.disk
            counters.missed_blocks += num_blocks - found.total

    def moved(self, move: Move, num_blocks: int, seconds: float) -> None:
        with self.lock:
            num_bytes = num_blocks * self.memory.block_bytes
            self.rates.note(move, num_blocks, seconds, self._clock.now())
            self.counters.moved(move, num_blocks, num_bytes, seconds)
            self._observer.moved(move, num_blocks, num_bytes, seconds)

    def read_counters(self) -> Counters:
        """As they are now, and stay."""
        with self.lock:
            return copy.deepcopy(self.counters)

    def failed(self, move: Move, error: BaseException) -> None:
        """Logged once a cause: a device or disk that fails once will fail a thousand times."""
        with self.lock:
            self.counters.failed(move)
            first = (move, type(error)) not in self._logged
            self._logged.add((move, type(error)))
        if first:
            log.error("KV store: %s failed (%s: %s); such blocks are misses", move, type(error).__name__, error)

    def _give_up_clean(self, blocks: Sequence[CachedBlock]) -> list[Entry]:
        """As many clean ones as these blocks lack slots; those that are being read or pinned stay."""
        gone: list[Entry] = []
        for count, tenant in self._directory.lacking(blocks):
            lacking = count
            while lacking > 0 and (chosen := self._clean.take(lacking, tenant)):
                taken = self._directory.take_out(chosen)
                gone += taken
                lacking -= len(taken)
        return gone

    def _keep(self, entries: Sequence[Entry]) -> None:
        self._directory.stay(entries)
        self._clean.discard(entries)

    def _count_evicted(self, entries: Sequence[Entry]) -> None:
        now = self._clock.now()
        for entry in entries:
            if self._disk is None or entry.block.block_hash not in self._disk:
                self.admission.evicted(entry.num_uses > 0, now)
                self.counters.dropped_demotions += self._disk is not None
            if entry.num_uses:
                self.counters.evicted_used += 1
            else:
                self.counters.evicted_unused += 1

    def _tell_removed(self, entries: Sequence[Entry]) -> None:
        self._events.removed([entry.stored("host") for entry in entries])
