"""StoreWorld: a whole KVStore on a virtual loop, with everybody who uses one at once, and a disk that misbehaves.

Savers, loaders, readers on other nodes, puts and operators run beside each other; any of them may be cancelled at any
await. Bytes of a block can be worked out, so whoever gets any can tell whether they are right.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence

from kv_store.host_copier import HostCopier
from kv_store.policy.factory import POLICY_NAMES, make_policy
from kv_store.quotas import Quotas
from kv_store.receiving import FetchUnsettled
from kv_store.settings import StoreSettings
from kv_store.store import KVStore
from kv_store.tiers import StoredBlock
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, Tenant
from tests.support.store_parts import FakeDisk, PlainMemory, blocks_of, bytes_of, hashes_of

NUM_SLOTS = 12
CHAIN_BLOCKS = 10
MARK = b"\xa5"


class LoopClock:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()


class Ledger:
    """A listener that believes everything it hears."""

    def __init__(self) -> None:
        self.host: dict[bytes, int] = {}
        self.disk: set[bytes] = set()

    def stored(self, blocks: Sequence[StoredBlock]) -> None:
        for stored in blocks:
            if stored.tier == "host":
                assert stored.block.block_hash not in self.host, "stored twice"
                self.host[stored.block.block_hash] = stored.place
            else:
                self.disk.add(stored.block.block_hash)

    def removed(self, blocks: Sequence[StoredBlock]) -> None:
        for stored in blocks:
            if stored.tier == "host":
                assert self.host.pop(stored.block.block_hash) == stored.place
            else:
                self.disk.discard(stored.block.block_hash)


class FailingCopier(HostCopier):
    """Fails now and then, in the middle of a batch."""

    def __init__(self, cache: PlainMemory, slots: PlainMemory, rng: random.Random, share: float) -> None:
        super().__init__(cache, slots)
        self._rng = rng
        self._share = share

    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        self._maybe_fail(lambda count: HostCopier.copy_out(self, block_ids[:count], slots[:count]), len(slots))

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        self._maybe_fail(lambda count: HostCopier.copy_in(self, slots[:count], block_ids[:count]), len(slots))

    def _maybe_fail(self, copy: Callable[[int], None], count: int) -> None:
        if self._rng.random() < self._share:
            copy(count // 2)
            raise RuntimeError("the device is lost")
        copy(count)


class StoreWorld:
    """`run` once. Device blocks are handed out anew for each job: what lands in one after its job has ended is seen."""

    def __init__(self, rng: random.Random, loop: asyncio.AbstractEventLoop) -> None:
        self.rng = rng
        self.slab = PlainMemory(NUM_SLOTS)
        self.disk = FakeDisk() if rng.random() < 0.8 else None
        self.device = PlainMemory(4096)
        self._next_block = 0
        self._marked: list[int] = []
        self.ledger = Ledger()
        copier = FailingCopier(self.device, self.slab, rng, rng.choice((0.0, 0.2)))
        settings = StoreSettings(16, load="always", quotas=Quotas(rng.choice((1.0, 0.5))))
        policy = make_policy(rng.choice(POLICY_NAMES), NUM_SLOTS)
        self.store = KVStore(
            self.slab, NUM_SLOTS, policy, settings, copier=copier, disk=self.disk, clock=LoopClock(loop)
        )
        self.store.events.add(self.ledger)
        self.chains = [
            blocks_of(name, CHAIN_BLOCKS, tenant) for name in "abc" for tenant in (Tenant("t1"), Tenant("t2"))
        ]
        self.num_flipped = 0
        self.num_loaded = 0

    async def run(self, num_jobs: int) -> None:
        jobs = [self.save, self.load, self.hold, self.receive, self.operate, self.misbehave]
        async with asyncio.TaskGroup() as group:
            for _ in range(num_jobs):
                await asyncio.sleep(self.rng.random() * 0.5)
                task = group.create_task(self.rng.choices(jobs, (4, 5, 3, 2, 1, 1))[0]())
                if self.rng.random() < 0.25:
                    asyncio.get_running_loop().call_later(self.rng.random() * 3, task.cancel)
        await self.store.close()
        self._check_end()

    def _part(self) -> list[CachedBlock]:
        return self.rng.choice(self.chains)[: self.rng.randint(1, CHAIN_BLOCKS)]

    def _take(self, count: int) -> list[int]:
        first, self._next_block = self._next_block, self._next_block + count
        return list(range(first, first + count))

    async def save(self) -> None:
        blocks = self._part()
        wanted = self.store.wanted(blocks)
        blocks = [block for block, is_wanted in zip(blocks, wanted, strict=True) if is_wanted]
        ids = self._take(len(blocks))
        self.device.fill(ids, blocks)
        try:
            assert await self.store.save(blocks, ids) <= len(blocks)
        finally:
            self._mark(ids)

    async def load(self) -> None:
        blocks = self._part()
        if self.rng.random() < 0.5:
            self.store.requested(blocks)
        ids = self._take(len(blocks))
        try:
            count = await self.store.load(hashes_of(blocks), ids)
            assert self.device.right(ids[:count], blocks[:count])
            self.num_loaded += count
        finally:
            self._mark(ids)

    async def hold(self) -> None:
        blocks = self._part()
        held = await self.store.hold(hashes_of(blocks))
        try:
            assert list(held.blocks) == blocks[: len(held.slots)]
            await asyncio.sleep(self.rng.random() * 4)
            if not self.num_flipped:
                assert self.slab.right(held.slots, held.blocks), "what is held does not change"
        finally:
            self.store.let_go(held)

    async def receive(self) -> None:
        blocks = self._part()
        outcome = self.rng.choice(("right", "part", "error", "unsettled"))

        async def fetch(wanted: Sequence[CachedBlock], slots: Sequence[int]) -> int:
            count = len(slots) if outcome == "right" else len(slots) // 2
            for block, slot in zip(wanted[:count], slots[:count], strict=True):
                await asyncio.sleep(self.rng.random() * 0.2)
                self.slab.block(slot)[:] = bytes_of(block)
            if outcome == "error":
                raise ConnectionError("the sender is gone")
            if outcome == "unsettled":
                raise FetchUnsettled(self._land_late(slots[count:]), count)
            return count

        with contextlib.suppress(ConnectionError):
            await self.store.receive(blocks, fetch)

    def _land_late(self, slots: Sequence[int]) -> asyncio.Event:
        settled = asyncio.Event()

        def land() -> None:
            for slot in slots:
                self.slab.block(slot)[:] = MARK * self.slab.block_bytes
            settled.set()

        asyncio.get_running_loop().call_later(self.rng.random() * 5, land)
        return settled

    async def operate(self) -> None:
        hashes = hashes_of(self._part())
        match self.rng.randrange(4):
            case 0:
                await self.store.pin(hashes, self.rng.random() * 10)
            case 1:
                self.store.unpin(hashes)
            case 2:
                await self.store.clear(tenant=self.rng.choice((None, Tenant("t1"))))
            case 3:
                self.store.stats()

    async def misbehave(self) -> None:
        """For a while; or for good, where a byte is flipped."""
        if self.rng.random() < 0.3:
            stored = self.store.snapshot()
            if stored:
                self._flip(self.rng.choice(stored))
        elif self.disk is not None:
            self.disk.failing = self.rng.random() < 0.5
            self.disk.keeps, self.disk.reads = self.rng.choice((0, 1, 99)), self.rng.choice((0, 2, 99))
            await asyncio.sleep(self.rng.random() * 3)
            self.disk.failing, self.disk.keeps, self.disk.reads = False, 99, 99

    def _flip(self, stored: StoredBlock) -> None:
        if stored.tier == "disk":
            assert self.disk is not None
            self.disk.flip(BlockHash(stored.block.block_hash))
        else:
            self.num_flipped += 1
            self.slab.block(stored.place)[0] ^= 1

    def _mark(self, ids: Sequence[int]) -> None:
        for block_id in ids:
            self.device.block(block_id)[:] = MARK * self.device.block_bytes
        self._marked += ids

    def _check_end(self) -> None:
        blank = MARK * self.device.block_bytes
        assert all(self.device.block(block_id) == blank for block_id in self._marked), "bytes landed after a job's end"
        host = self.store.stats().tiers[0]
        assert (host.held, host.leaving) == (0, 0)
        assert host.writing == self.store.stats().quarantined
        here = {stored.block.block_hash: stored.place for stored in self.store.snapshot() if stored.tier == "host"}
        assert here == self.ledger.host, "listeners know what is here"
        assert len(here) + host.writing == host.used
