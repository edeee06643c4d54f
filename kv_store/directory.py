"""TierDirectory: which block is in which slot of a tier, who reads it, who has pinned it, and who goes next.

    free ──reserve──▶ writing ──commit──▶ ready ──evicted, forgotten──▶ free
      ▲                  │                  │
      └──────abort───────┘                  └──forgotten while it is read──▶ doomed ──let_go──▶ free

Each slot is in exactly one of these states: free + writing + ready + doomed = all. A ready block may be *leaving*: chosen to
be evicted, still found and read until its bytes are elsewhere (`leave`, then `take_out`). What somebody reads or has pinned
is not evicted. Book-keeping only: no bytes, no locks, no time of its own. It lives as long as its tier.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence

from kv_store.entries import Entry, Occupancy, Reservation
from kv_store.observer import NoObserver, StoreObserver
from kv_store.policy.policy import EvictionPolicy, steps_of
from kv_store.policy.tenant_orders import TenantOrders
from kv_store.quotas import Quotas
from kv_store.tiers import Tier
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, Tenant
from runtime.clock import Clock

log = logging.getLogger(__name__)

MAX_PINNED_SHARE = 1 / 2
"""Of a tier: whatever is pinned, as much again is left for everybody else."""


class TierDirectory:
    def __init__(
        self,
        num_slots: int,
        policy: EvictionPolicy,
        *,
        clock: Clock,
        quotas: Quotas | None = None,
        tier: Tier = "host",
        observer: StoreObserver | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.tier = tier
        self._clock = clock
        self._quotas = quotas or Quotas()
        self._orders = TenantOrders(policy, self._is_limited)
        self._observer: StoreObserver = observer or NoObserver()
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: dict[bytes, Entry] = {}
        self._doomed: dict[int, Entry] = {}
        self._held: set[int] = set()
        self._leaving: set[int] = set()
        self._pinned: dict[bytes, Entry] = {}
        self._slots_of: dict[Tenant, int] = {}
        self._num_writing = 0
        self._policy_failed = False

    # What is here

    def __contains__(self, block_hash: bytes) -> bool:
        """Whether it is ready, or on its way."""
        return block_hash in self._entries

    def num_ready(self, block_hashes: Sequence[bytes]) -> int:
        """How many leading blocks can be read."""
        entries = self._entries
        for index, block_hash in enumerate(block_hashes):
            entry = entries.get(block_hash)
            if entry is None or not entry.ready:
                return index
        return len(block_hashes)

    def is_ready(self, block_hash: bytes) -> bool:
        entry = self._entries.get(block_hash)
        return entry is not None and entry.ready

    @property
    def num_free(self) -> int:
        return len(self._free)

    def slots_by_tenant(self) -> dict[Tenant, int]:
        return dict(self._slots_of)

    def occupancy(self) -> Occupancy:
        self._drop_old_pins()
        return Occupancy(
            free=len(self._free),
            writing=self._num_writing,
            ready=len(self._entries) - self._num_writing,
            doomed=len(self._doomed),
            held=len(self._held),
            pinned=len(self._pinned),
            leaving=len(self._leaving),
        )

    def snapshot(self) -> list[Entry]:
        """All that is ready or on its way, in no order that means anything."""
        return list(self._entries.values())

    def by_value(self) -> list[BlockHash]:
        """All that is ready, what would be evicted last first; so a block comes after the one that it continues."""
        return self._orders.victims(len(self._entries), self._clock.now(), lambda _: True, None)[::-1]

    def over(self, tenant: Tenant, count: int) -> int:
        """How many blocks beyond its quota a tenant would be with `count` more; not above 0 if none."""
        if not self._is_limited(tenant):
            return 0
        return self._slots_of.get(tenant, 0) + count - self._quotas.limit(tenant, self.num_slots)

    # Writing

    def lacking(self, blocks: Sequence[CachedBlock]) -> list[tuple[int, Tenant | None]]:
        """What must be given up before these blocks have room: so many of a tenant's own, so many of anybody's."""
        new = self._new(blocks)
        over = [(over, tenant) for tenant, count in _by_tenant(new).items() if (over := self.over(tenant, count)) > 0]
        room = len(self._free) + sum(count for count, _ in over)
        return [*over, (len(new) - room, None)] if len(new) > room else list(over)

    def reserve(self, blocks: Sequence[CachedBlock]) -> Reservation:
        """Slots to write blocks into. Those that lack room at the end of `blocks` get none: heads are worth more."""
        new = self._new(blocks)
        evicted: list[Entry] = []
        granted = self._within_quotas(new, evicted)
        if len(granted) > len(self._free):
            evicted += self._evict(self._victims(len(granted) - len(self._free)))
        given = granted[: len(self._free)]
        entries = tuple(self._start_writing(block) for block in given)
        return Reservation(
            entries,
            tuple(evicted),
            num_duplicates=len(blocks) - len(new),
            num_over_quota=len(new) - len(granted),
            num_without_room=len(granted) - len(given),
        )

    def commit(self, entries: Sequence[Entry], checksums: Sequence[int], *, held: bool = False) -> None:
        """Their bytes are in their slots. `held`: by the caller, who then lets them go."""
        now = self._clock.now()
        for entry, value in zip(entries, checksums, strict=True):
            assert not entry.ready, "committed twice"
            entry.checksum, entry.ready = value, True
            entry.stored_at = entry.used_at = now
        self._num_writing -= len(entries)
        with self._policy_told():
            self._orders.added([entry.block for entry in entries], now)
        if held:
            self._add_readers(entries)

    def abort(self, entries: Iterable[Entry]) -> None:
        """Nothing of use was written, and nothing will be any more."""
        for entry in entries:
            assert not entry.ready, "aborted after its commit"
            self._num_writing -= 1
            del self._entries[entry.block.block_hash]
            self._give_back(entry)

    # Reading

    def requested(self, blocks: Sequence[CachedBlock]) -> Iterator[None]:
        """A request wants this chain. The policy learns from it, also of what is not here. Happens as it is iterated, to the end:
        a step looks at a few hundred blocks, and anything else may be done between two."""
        num_ready = 0
        for step in steps_of(blocks):
            ready = self.num_ready([block.block_hash for block in step])
            for block in step[:ready]:
                self._entries[block.block_hash].heard = True
            num_ready += ready
            if ready < len(step):
                break
            yield
        yield from self._orders.wanted(blocks, num_ready, self._clock.now())

    def hold(self, block_hashes: Sequence[bytes]) -> list[Entry]:
        """The leading blocks that are ready: none of them is evicted before `let_go`, as often as it was held."""
        entries = [self._entries[block_hash] for block_hash in block_hashes[: self.num_ready(block_hashes)]]
        self._add_readers(entries)
        return entries

    def hold_these(self, entries: Iterable[Entry]) -> None:
        """Ready ones, as `hold` does."""
        self._add_readers(entries)

    def used(self, entries: Sequence[Entry]) -> None:
        """Held blocks have been read."""
        now = self._clock.now()
        unheard = [entry.block for entry in entries if not entry.heard and not entry.doomed]
        if unheard:
            for _ in self._orders.wanted(unheard, len(unheard), now):
                pass
        for entry in entries:
            self._observer.reused(self.tier, now - entry.used_at)
            entry.heard = False
            entry.used_at = now
            entry.num_uses += 1

    def let_go(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            assert entry.num_readers > 0, "let go more often than held"
            entry.num_readers -= 1
            if entry.num_readers == 0:
                self._held.discard(entry.slot)
                if entry.doomed:
                    del self._doomed[entry.slot]
                    self._give_back(entry)

    # Going

    def leave(self, count: int, tenant: Tenant | None = None) -> list[Entry]:
        """Choose up to `count` blocks (of one tenant, if given) to be evicted as soon as they are elsewhere. Each is read
        until then, and in the end either taken out or told to stay."""
        chosen = self._victims(count, tenant)
        for entry in chosen:
            entry.leaving = True
            self._leaving.add(entry.slot)
        return chosen

    def stay(self, entries: Iterable[Entry]) -> None:
        """They do not leave after all."""
        for entry in entries:
            if entry.leaving:
                entry.leaving = False
                self._leaving.discard(entry.slot)

    def take_out(self, entries: Sequence[Entry]) -> list[Entry]:
        """Evict what was to leave, except what somebody reads or has pinned since. Returns those that are gone."""
        self.stay(entries)
        now = self._clock.now()
        return self._evict([entry for entry in entries if _may_go(entry, now)])

    def forget(self, block_hashes: Iterable[bytes]) -> list[Entry]:
        """Nobody finds these any more, pinned or not. Their slots are free when their last reader has let go. Blocks that
        are being written are left alone."""
        found = (self._entries.get(block_hash) for block_hash in dict.fromkeys(block_hashes))
        return self._remove([entry for entry in found if entry is not None])

    def drop(self, entries: Iterable[Entry]) -> list[Entry]:
        """As `forget`, for these very entries: what has been stored anew under the same address stays."""
        return self._remove([entry for entry in entries if self._entries.get(entry.block.block_hash) is entry])

    # Pins

    def pin(self, block_hashes: Sequence[bytes], ttl_s: float) -> int:
        """Keep the leading blocks that are ready for so long; how many it is. Not more than a share of the tier is pinned.
        A later end of an earlier pin stands."""
        self._drop_old_pins()
        until = self._clock.now() + ttl_s
        for index, block_hash in enumerate(block_hashes[: self.num_ready(block_hashes)]):
            entry = self._entries[block_hash]
            if block_hash not in self._pinned and len(self._pinned) >= int(self.num_slots * MAX_PINNED_SHARE):
                return index
            entry.pinned_until = max(entry.pinned_until, until)
            self._pinned[block_hash] = entry
        return self.num_ready(block_hashes)

    def is_pinned(self, block_hash: bytes) -> bool:
        entry = self._pinned.get(block_hash)
        return entry is not None and entry.pinned_until > self._clock.now()

    def unpin(self, block_hashes: Iterable[bytes] | None = None) -> int:
        """How many of them, or of all, were pinned."""
        self._drop_old_pins()
        chosen = list(self._pinned) if block_hashes is None else block_hashes
        entries = [entry for block_hash in chosen if (entry := self._pinned.pop(block_hash, None)) is not None]
        for entry in entries:
            entry.pinned_until = 0.0
        return len(entries)

    def _drop_old_pins(self) -> None:
        now = self._clock.now()
        for block_hash in [key for key, entry in self._pinned.items() if entry.pinned_until <= now]:
            del self._pinned[block_hash]

    # Slots

    def _new(self, blocks: Sequence[CachedBlock]) -> list[CachedBlock]:
        unique = {block.block_hash: block for block in blocks}
        return [block for block in unique.values() if block.block_hash not in self._entries]

    def _is_limited(self, tenant: Tenant) -> bool:
        """A quota of the whole tier is none."""
        return self._quotas.limit(tenant, self.num_slots) < self.num_slots

    def _within_quotas(self, new: Sequence[CachedBlock], evicted: list[Entry]) -> list[CachedBlock]:
        room: dict[str, int] = {}
        for tenant, count in _by_tenant(new).items():
            if (over := self.over(tenant, count)) > 0:
                evicted += self._evict(self._victims(min(over, count), tenant))
            room[tenant] = count - max(0, self.over(tenant, count))
        granted = []
        for block in new:
            if room[block.tenant] > 0:
                room[block.tenant] -= 1
                granted.append(block)
        return granted

    def _start_writing(self, block: CachedBlock) -> Entry:
        entry = Entry(block, self._free.pop())
        self._entries[block.block_hash] = entry
        self._num_writing += 1
        tenant = Tenant(block.tenant)
        self._slots_of[tenant] = self._slots_of.get(tenant, 0) + 1
        return entry

    def _add_readers(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            entry.num_readers += 1
            self._held.add(entry.slot)

    def _victims(self, count: int, tenant: Tenant | None = None) -> list[Entry]:
        if count <= 0:
            return []
        now = self._clock.now()
        # What leaves is as good as gone: it must not shield what it continues, or newer chains would go instead.
        num_looked_at = count + len(self._leaving)
        chosen = self._orders.victims(num_looked_at, now, lambda block_hash: self._may_go(block_hash, now), tenant)
        entries = (self._entries[block_hash] for block_hash in chosen)
        return [entry for entry in entries if not entry.leaving][:count]

    def _evict(self, entries: Sequence[Entry]) -> list[Entry]:
        now = self._clock.now()
        for entry in entries:
            self._observer.evicted(self.tier, now - entry.stored_at, now - entry.used_at, entry.num_uses)
        return self._remove(entries)

    def _remove(self, entries: Iterable[Entry]) -> list[Entry]:
        removed = [entry for entry in entries if entry.ready and not entry.doomed]
        for entry in removed:
            del self._entries[entry.block.block_hash]
            self._pinned.pop(entry.block.block_hash, None)
            self._leaving.discard(entry.slot)
            entry.leaving = False
            entry.doomed = True
            if entry.num_readers:
                self._doomed[entry.slot] = entry
            else:
                self._give_back(entry)
        with self._policy_told():
            self._orders.removed([entry.block for entry in removed])
        return removed

    @contextlib.contextmanager
    def _policy_told(self) -> Iterator[None]:
        """Around what a policy learns of a change that has been made. One that fails is a bug, which must not cost the tier more
        than a worse choice of victims; it is logged once, because this may happen at every block."""
        try:
            yield
        except Exception:
            if not self._policy_failed:
                log.exception("the eviction policy of the %s tier has failed: what it chooses may be worse", self.tier)
            self._policy_failed = True

    def _may_go(self, block_hash: BlockHash, now: float) -> bool:
        """Or goes already. A policy that has failed may name what is gone."""
        entry = self._entries.get(block_hash)
        return entry is not None and (entry.leaving or _may_go(entry, now))

    def _give_back(self, entry: Entry) -> None:
        self._free.append(entry.slot)
        tenant = Tenant(entry.block.tenant)
        self._slots_of[tenant] -= 1
        if not self._slots_of[tenant]:
            del self._slots_of[tenant]


def _may_go(entry: Entry, now: float) -> bool:
    """Whether it is in nobody's way to be evicted."""
    in_use = entry.num_readers > 0 or entry.leaving or entry.pinned_until > now
    return entry.ready and not entry.doomed and not in_use


def _by_tenant(blocks: Iterable[CachedBlock]) -> dict[Tenant, int]:
    counts: dict[Tenant, int] = {}
    for block in blocks:
        tenant = Tenant(block.tenant)
        counts[tenant] = counts.get(tenant, 0) + 1
    return counts
