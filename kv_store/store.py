"""KVStore: the KV blocks that one process keeps beside its device: in slots of host memory, and on disk.

    device ──save──▶ host slots ──demotion──▶ disk           a put from another node: receive ──▶ host slots
    device ◀──load── host slots ◀─promotion── disk           a reader on another node: hold ──▶ let_go

The engine's thread asks (`num_loadable`, `wanted`, `eager`) and is answered from memory. Everything else happens on the node's
event loop, with copies and files on threads of the store's own. Bytes are moved, their checksum is taken, the block is
ready, and then listeners hear of it, in this order. Every read is verified; what cannot be read, kept or moved is a miss,
counted, and no reason to fail.

It is made when the memory is there, and closed before the memory goes. Used as `async with`.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Self

from kv_store.admission import Admission
from kv_store.clearing import clear
from kv_store.demotion import Demoter, DiskLosses
from kv_store.disk_worker import DiskWorker
from kv_store.entries import BlockPlaces, Entry, Held
from kv_store.finish import finish_or_abandon
from kv_store.host_tier import HostTier
from kv_store.inspection import inspect
from kv_store.load_choice import LoadableBlocks, LoadPlan, load_seconds, plan_load
from kv_store.mover import Mover
from kv_store.observer import StoreObserver
from kv_store.policy.policy import EvictionPolicy
from kv_store.promotion import Promoter
from kv_store.readout import read_stats
from kv_store.receiving import Fetch, Receiver
from kv_store.settings import StoreSettings
from kv_store.stats import StoreStats
from kv_store.tier_events import TierEvents
from kv_store.tiers import BlockCopier, BlockDisk, BlockMemory, OnLoaded, StoredBlock, Tier
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, Tenant
from runtime.clock import Clock, MonotonicClock

log = logging.getLogger(__name__)

BATCH_BYTES = 32 << 20
MAX_BATCH_BLOCKS = 64
"""A batch is what one job of a thread moves: long enough for the hand-over between threads to cost nothing beside it, short
enough for a load to wait no longer than a few milliseconds behind a save."""

CLOSE_TIMEOUT_S = 10.0
"""After that a device, a disk or a sender that does not answer is left behind."""


class KVStore:
    """`memory`: its first `num_slots` blocks are the host tier's alone. `copier` None: of a node without a device. `disk`
    is the store's from now on, and closed with it; what it evicts it tells to the same `events`."""

    def __init__(
        self,
        memory: BlockMemory,
        num_slots: int,
        policy: EvictionPolicy,
        settings: StoreSettings,
        *,
        copier: BlockCopier | None,
        disk: BlockDisk | None = None,
        clock: Clock | None = None,
        observer: StoreObserver | None = None,
        events: TierEvents | None = None,
    ) -> None:
        self._settings = settings
        self.quotas = settings.quotas
        """Of each tier."""
        self._clock = clock or MonotonicClock()
        self.events = events or TierEvents()
        """Where to listen."""
        self._admission = Admission(settings.admission)
        self._host = HostTier(
            memory,
            num_slots,
            policy,
            clock=self._clock,
            admission=self._admission,
            events=self.events,
            quotas=settings.quotas,
            observer=observer,
            disk=disk,
        )
        self._batch = max(1, min(MAX_BATCH_BLOCKS, BATCH_BYTES // memory.block_bytes, max(1, num_slots // 4)))
        self._mover = Mover(memory, copier)
        self._receiver = Receiver(self._host, self._mover)
        self._disk = disk
        self._worker: DiskWorker | None = None
        self._demoter: Demoter | None = None
        self._promoter: Promoter | None = None
        if disk is not None:
            self._worker = DiskWorker(disk, self._host, self.events)
            self.events.add(DiskLosses(self._host))
            self._demoter = Demoter(self._host, self._worker, self._batch)
            self._promoter = Promoter(self._host, self._worker, self._demoter, self._batch)
        self._closed = False
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def block_bytes(self) -> int:
        return self._host.memory.block_bytes

    # The engine's questions, from its own thread (an engine.backing.BackingStore)

    @property
    def eager(self) -> bool:
        return self._settings.write_through

    def num_loadable(self, block_hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are worth bringing; 0 where computing them is faster."""
        loadable = self.match(block_hashes)
        self._host.looked_up(len(block_hashes), loadable)
        plan = self._plan(loadable)
        return plan.compute_first_blocks + plan.load_blocks

    def wanted(self, blocks: Sequence[CachedBlock]) -> list[bool]:
        """Which of these are neither here nor on their way, and would be kept."""
        hashes = [block.block_hash for block in blocks]
        here = self._host.are_here(hashes)
        if self._disk is not None:
            disk = self._disk
            here = [held or block_hash in disk for held, block_hash in zip(here, hashes, strict=True)]
        now = self._clock.now()
        with self._host.lock:
            admitted = [not held and self._admission.admits(b, now) for held, b in zip(here, blocks, strict=True)]
            self._host.counters.refused_by_admission += len(blocks) - sum(here) - sum(admitted)
        return admitted

    def requested(self, blocks: Sequence[CachedBlock]) -> None:
        """A request with this chain has come, from its very first block on: what eviction and admission learn from. From any
        thread, once a request. A request that nobody reports counts when its blocks are loaded."""
        self._host.requested(blocks)

    def match(self, block_hashes: Sequence[BlockHash]) -> LoadableBlocks:
        """The leading blocks that are in either tier. From any thread."""
        host = self._host.num_ready(block_hashes)
        if self._disk is None or host == len(block_hashes):
            return LoadableBlocks(host, 0)
        disk = 0
        ready = self._host.are_ready(block_hashes[host:])
        for is_ready, block_hash in zip(ready, block_hashes[host:], strict=True):
            if not is_ready and block_hash not in self._disk:
                break
            host, disk = host + is_ready, disk + (not is_ready)
        return LoadableBlocks(host, disk)

    def plan(self, block_hashes: Sequence[BlockHash]) -> LoadPlan:
        """How many blocks to compute while the others are loaded. From any thread."""
        return self._plan(self.match(block_hashes))

    def estimate_load_s(self, block_hashes: Sequence[BlockHash]) -> float | None:
        """How long bringing what is here of this chain to the device takes, as measured; None before it has been."""
        loadable = self.match(block_hashes)
        with self._host.lock:
            rates = self._host.rates
            return load_seconds(loadable, rates.seconds_per_block("load"), rates.seconds_per_block("promote"))

    # Moving blocks, on the event loop

    async def save(self, blocks: Sequence[CachedBlock], block_ids: Sequence[int]) -> int:
        """Blocks of the device, which nobody changes meanwhile, into host slots. How many are kept; blocks that are here
        already are not copied and not counted. Raises nothing but its own cancel, which is heard between batches."""
        kept = 0
        async with self._running() as open_:
            begun = self._host.mark()
            for first in range(0, len(blocks) if open_ else 0, self._batch):
                batch = slice(first, first + self._batch)
                async with self._mover.turn:
                    kept += await self._save_batch(blocks[batch], block_ids[batch], begun)
        return kept

    async def load(
        self, block_hashes: Sequence[BlockHash], block_ids: Sequence[int], on_loaded: OnLoaded = lambda _: None
    ) -> int:
        """Leading blocks to the device, verified. How many of `block_ids` hold theirs; `on_loaded` is told of so many more with each
        batch. Nothing is written any more when this ends, and it raises nothing but its own cancel."""
        done = 0
        async with self._running() as open_, contextlib.aclosing(self._held_batches(block_hashes)) as batches:
            if not open_:
                return 0
            async for entries in batches:
                right = await self._load_batch(entries, block_ids[done : done + len(entries)])
                done += right
                on_loaded(right)
                if right < len(entries):
                    break
        return done

    async def hold(self, block_hashes: Sequence[BlockHash]) -> Held:
        """The longest prefix that is here, promoted from disk if need be, for a reader that verifies what it reads."""
        entries: list[Entry] = []
        async with self._running() as open_:
            try:
                while open_ and len(entries) < len(block_hashes):
                    more = await self._hold_some(block_hashes[len(entries) :])
                    if not more:
                        break
                    entries += more
            except BaseException:
                self._host.let_go(entries)
                raise
        self._host.used(entries)
        return Held(
            blocks=tuple(entry.block for entry in entries),
            slots=tuple(entry.slot for entry in entries),
            checksums=tuple(entry.checksum for entry in entries),
            entries=tuple(entries),
        )

    def let_go(self, held: Held) -> None:
        self._host.let_go(held.entries)

    async def inspect(self, block_hashes: Sequence[BlockHash]) -> int:
        """Verify those that are in host memory, and forget the ones whose bytes have changed. How many."""
        async with self._running() as open_:
            return await inspect(self._host, self._mover, block_hashes, self._batch) if open_ else 0

    async def receive(self, blocks: Sequence[CachedBlock], fetch: Fetch) -> int:
        """A put from another node. `fetch(blocks, slots)` brings these blocks into these slots and answers how many
        leading ones are right; they are the first run of `blocks` that are not here yet. How many are kept. `fetch`
        raises only when no more bytes can land, or FetchUnsettled; what else it raises is raised here."""
        async with self._running() as open_:
            here = self._host.are_here([block.block_hash for block in blocks])
            if not open_ or False not in here:
                return 0
            first = here.index(False)
            end = here.index(True, first) if True in here[first:] else len(here)
            kept = await self._receiver.receive(blocks[first:end], fetch)
            if self._demoter is not None:
                self._demoter.keep_ahead(blocks[first:end])
            return kept

    # Management

    def locate(self, block_hashes: Sequence[BlockHash]) -> list[BlockPlaces]:
        """Where each of these is. From any thread."""
        host, pinned = self._host.are_ready(block_hashes), self._host.are_pinned(block_hashes)
        disk = [self._disk is not None and block_hash in self._disk for block_hash in block_hashes]
        return [BlockPlaces(*places) for places in zip(host, disk, pinned, strict=True)]

    async def pin(self, block_hashes: Sequence[BlockHash], ttl_s: float) -> int:
        """Keep the leading blocks in host memory for so long, from disk if need be. How many it is: at most half of the
        tier is pinned."""
        held = await self.hold(block_hashes)
        try:
            return self._host.pin(block_hashes[: len(held.slots)], ttl_s)
        finally:
            self.let_go(held)

    def unpin(self, block_hashes: Sequence[BlockHash] | None = None) -> int:
        """How many of these, or of all, were pinned."""
        return self._host.unpin(block_hashes)

    async def clear(self, tier: Tier | None = None, tenant: Tenant | None = None) -> int:
        """Forget blocks, of all tiers or one, of all tenants or one, pinned or not, those on their way included. How many."""
        async with self._running() as open_:
            return await clear(self._host, self._worker, self._promoter, tier, tenant) if open_ else 0

    def snapshot(self) -> list[StoredBlock]:
        """All blocks of all tiers; a block that is in two is listed twice. From any thread."""
        return self._host.snapshot() + (self._disk.stored() if self._disk is not None else [])

    def stats(self) -> StoreStats:
        """From any thread."""
        return read_stats(self._host, self._disk, self._clock.now())

    async def drain(self, deadline_s: float) -> None:
        """Before a planned end: what is in host memory alone goes to disk, most valuable first, heads before tails, in time."""
        async with self._running() as open_:
            if open_ and self._demoter is not None:
                await self._demoter.drain(deadline_s)

    async def close(self) -> None:
        """From now on nothing is kept or found by loads. Waits for what is under way and for the threads, but not for ever.
        Slots that a fetch has not settled are left to whoever owns the memory."""
        if self._closed:
            return
        self._closed = True
        if num_jobs := await finish_or_abandon(asyncio.create_task(self._end()), CLOSE_TIMEOUT_S, self._abandon):
            log.error("KV store: %d jobs of a device or disk that does not answer are given up", num_jobs)

    # How

    async def _end(self) -> None:
        await self._idle.wait()
        for part in (self._promoter, self._demoter):
            if part is not None:
                await part.idle()
        self._host.nothing_leaves()
        await self._receiver.close()
        await self._mover.close()
        if self._worker is not None:
            await self._worker.close()

    def _abandon(self) -> int:
        return sum(thread.abandon() for thread in (self._mover, self._worker) if thread is not None)

    async def _save_batch(self, blocks: Sequence[CachedBlock], block_ids: Sequence[int], begun: int) -> int:
        entries = self._host.reserve(blocks, begun).entries
        if not entries:
            return 0
        id_of = dict(zip((block.block_hash for block in blocks), block_ids, strict=True))
        ids = [id_of[entry.block.block_hash] for entry in entries]
        try:
            checksums, seconds = await self._mover.save(ids, [entry.slot for entry in entries])
        except asyncio.CancelledError:
            self._host.abort(entries)
            raise
        except Exception as error:  # noqa: BLE001  # whatever a copier raises, these blocks are not kept and the node goes on
            self._host.abort(entries)
            self._host.failed("save", error)
            return 0
        self._host.moved("save", len(entries), seconds)
        kept = self._host.commit(entries, checksums)
        if self._demoter is not None:
            self._demoter.keep_ahead(blocks)
        return len(kept)

    async def _load_batch(self, entries: Sequence[Entry], block_ids: Sequence[int]) -> int:
        slots, checksums = [entry.slot for entry in entries], [entry.checksum for entry in entries]
        try:
            right, seconds = await self._mover.load(slots, checksums, block_ids)
        except Exception as error:  # noqa: BLE001  # whatever a copier raises, these blocks are misses and the node goes on
            self._host.failed("load", error)
            return 0
        self._host.moved("load", right, seconds)
        self._host.used(entries[:right])
        if right < len(entries):
            self._host.drop_damaged(entries[right])
        return right

    async def _held_batches(self, block_hashes: Sequence[BlockHash]) -> AsyncGenerator[list[Entry], None]:
        """A chain piece by piece, each held while the consumer is at it, and the next on its way."""
        loop = asyncio.get_running_loop()
        done = 0
        coming = loop.create_task(self._hold_some(block_hashes[: self._batch]))
        try:
            while True:
                await asyncio.wait((coming,))
                entries = coming.result()
                if not entries:
                    return
                done += len(entries)
                coming = loop.create_task(self._hold_some(block_hashes[done : done + self._batch]))
                try:
                    yield entries
                finally:
                    self._host.let_go(entries)
        finally:
            coming.cancel()
            coming.add_done_callback(self._let_go_unused)

    def _let_go_unused(self, coming: asyncio.Task[list[Entry]]) -> None:
        if not coming.cancelled() and coming.exception() is None:
            self._host.let_go(coming.result())

    async def _hold_some(self, block_hashes: Sequence[BlockHash]) -> list[Entry]:
        """Some leading blocks, held; none if there is no first one to be had."""
        return await self._promoter.hold(block_hashes) if self._promoter else self._host.hold(block_hashes)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[bool]:
        """Around whatever `close` waits for. False if the store is closed: then nothing is to be begun."""
        self._num_running += 1
        self._idle.clear()
        try:
            yield not self._closed
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    def _plan(self, loadable: LoadableBlocks) -> LoadPlan:
        tokens_per_s, now = self._settings.prefill_tokens_per_s(), self._clock.now()
        with self._host.lock:
            rates = self._host.rates
            load_s, promote_s = rates.seconds_per_block("load"), rates.seconds_per_block("promote")
            stale = rates.is_stale("load", now) or (loadable.disk > 0 and rates.is_stale("promote", now))
        return plan_load(
            loadable,
            load_s=load_s,
            promote_s=promote_s,
            compute_s=self._settings.block_size / tokens_per_s if tokens_per_s else None,
            policy=self._settings.load,
            stale=stale,
        )
