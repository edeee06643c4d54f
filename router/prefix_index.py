"""PrefixIndex: which worker's caches hold which KV blocks.

Fed by the workers' KV events, numbered without gaps within an incarnation: after a gap, or a new incarnation, a worker's
entries are void until it sends a snapshot. Between a prompt's dispatch and the heartbeat that reports its blocks, they are
*expected* there for a few seconds, so that prompts that follow at once find their prefix; a worker that has never
reported a block is not believed to cache any.

Bounded: per worker, and for expectations in number and time. Losing an entry costs a cache hit, nothing else.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from protocol.ids import BlockHash, Incarnation
from protocol.kv_events import AllBlocksCleared, BlocksRemoved, BlocksStored, KVEventBatch, StorageTier
from protocol.store_admin import TIER_BITS
from runtime.clock import Clock

MAX_BLOCKS_PER_WORKER = 1 << 19
MAX_EXPECTED = 1 << 16
EXPECTED_TTL_S = 3.0


class _WorkerBlocks:
    """One worker's blocks (address -> bits of the tiers that hold it) and the number of the next event."""

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.tiers: dict[bytes, int] = {}
        self.in_tier = dict.fromkeys(TIER_BITS.values(), 0)
        self.next_event: int | None = None
        self.caches = False

    def set_tiers(self, block_hash: bytes, tiers: int) -> None:
        """Where a block is from now on. 0: nowhere."""
        changed = self.tiers.get(block_hash, 0) ^ tiers
        if tiers:
            self.tiers[block_hash] = tiers
        else:
            self.tiers.pop(block_hash, None)
        for bit in self.in_tier:
            if changed & bit:
                self.in_tier[bit] += 1 if tiers & bit else -1


class PrefixIndex:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._workers: dict[Incarnation, _WorkerBlocks] = {}
        self._holders: dict[bytes, int] = {}
        self._expected: OrderedDict[tuple[Incarnation, bytes], float] = OrderedDict()
        self._expected_holders: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Known (worker, block) pairs."""
        return sum(len(worker.tiers) for worker in self._workers.values())

    def add_worker(self, incarnation: Incarnation) -> None:
        if incarnation not in self._workers:
            used = {worker.bit for worker in self._workers.values()}
            bit = next(1 << i for i in range(len(used) + 1) if 1 << i not in used)
            self._workers[incarnation] = _WorkerBlocks(bit)

    def remove_worker(self, incarnation: Incarnation) -> None:
        worker = self._workers.get(incarnation)
        if worker is None:
            return
        self._clear(worker)
        for key in [key for key in self._expected if key[0] == incarnation]:
            self._forget_expected(key)
        del self._workers[incarnation]

    def apply(self, batch: KVEventBatch) -> bool:
        """Take a worker's events in. False: some are missing, and a snapshot is needed."""
        worker = self._workers.get(Incarnation(batch.incarnation))
        if worker is None:
            return False
        starts_over = bool(batch.events) and isinstance(batch.events[0], AllBlocksCleared)
        if not starts_over and batch.first_event != worker.next_event:
            self._clear(worker)
            worker.next_event = None
            return False
        for event in batch.events:
            match event:
                case BlocksStored(block_hashes, tier):
                    self._store(worker, block_hashes, TIER_BITS[tier])
                case BlocksRemoved(block_hashes, tier):
                    self._remove(worker, block_hashes, TIER_BITS[tier])
                case AllBlocksCleared():
                    self._clear(worker)
        worker.next_event = batch.first_event + len(batch.events)
        return True

    def needs_snapshot(self, incarnation: Incarnation) -> bool:
        worker = self._workers.get(incarnation)
        return worker is not None and worker.next_event is None

    def expect(self, incarnation: Incarnation, block_hashes: Iterable[BlockHash]) -> None:
        """These blocks will be there shortly, if the worker caches at all."""
        worker = self._workers.get(incarnation)
        if worker is None or not worker.caches:
            return
        expires_at = self._clock.now() + EXPECTED_TTL_S
        for block_hash in block_hashes:
            key = (incarnation, block_hash)
            self._expected[key] = expires_at
            self._expected.move_to_end(key)
            self._expected_holders[block_hash] = self._expected_holders.get(block_hash, 0) | worker.bit
        while len(self._expected) > MAX_EXPECTED:
            self._forget_expected(next(iter(self._expected)))

    def match(self, block_hashes: Sequence[BlockHash]) -> dict[Incarnation, int]:
        """For each worker, how many leading blocks of this chain it holds. Workers that hold none are left out."""
        self._expire()
        matched: dict[int, int] = {}
        holding = ~0
        length = 0
        for length, block_hash in enumerate(block_hashes):
            holders = self._holders.get(block_hash, 0) | self._expected_holders.get(block_hash, 0)
            _note_dropped(matched, holding & ~holders, length)
            holding &= holders
            if not holding:
                break
        else:
            _note_dropped(matched, holding, len(block_hashes))
        bits = ((incarnation, worker.bit) for incarnation, worker in self._workers.items())
        return {incarnation: count for incarnation, bit in bits if (count := matched.get(bit, 0))}

    def locate(self, incarnation: Incarnation, block_hashes: Sequence[BlockHash]) -> bytes:
        """For each block the TIER_BITS of where that worker said it has it. Nothing that is only expected."""
        worker = self._workers.get(incarnation)
        return b"" if worker is None else bytes(worker.tiers.get(block_hash, 0) for block_hash in block_hashes)

    def num_blocks(self, incarnation: Incarnation, tier: StorageTier) -> int:
        """How many blocks that worker said it has there."""
        worker = self._workers.get(incarnation)
        return 0 if worker is None else worker.in_tier[TIER_BITS[tier]]

    def _expire(self) -> None:
        now = self._clock.now()
        while self._expected:
            key, expires_at = next(iter(self._expected.items()))
            if expires_at > now:
                return
            self._forget_expected(key)

    def _forget_expected(self, key: tuple[Incarnation, bytes]) -> None:
        del self._expected[key]
        _drop_bit(self._expected_holders, key[1], self._workers[key[0]].bit)

    def _store(self, worker: _WorkerBlocks, block_hashes: Sequence[bytes], tier: int) -> None:
        worker.caches = worker.caches or bool(block_hashes)
        for block_hash in block_hashes:
            worker.set_tiers(block_hash, worker.tiers.get(block_hash, 0) | tier)
            self._holders[block_hash] = self._holders.get(block_hash, 0) | worker.bit
        while len(worker.tiers) > MAX_BLOCKS_PER_WORKER:
            oldest = next(iter(worker.tiers))
            worker.set_tiers(oldest, 0)
            _drop_bit(self._holders, oldest, worker.bit)

    def _remove(self, worker: _WorkerBlocks, block_hashes: Iterable[bytes], tier: int) -> None:
        for block_hash in block_hashes:
            held = worker.tiers.get(block_hash, 0)
            worker.set_tiers(block_hash, held & ~tier)
            if held and not held & ~tier:
                _drop_bit(self._holders, block_hash, worker.bit)

    def _clear(self, worker: _WorkerBlocks) -> None:
        for block_hash in worker.tiers:
            _drop_bit(self._holders, block_hash, worker.bit)
        worker.tiers = {}
        worker.in_tier = dict.fromkeys(worker.in_tier, 0)


def _note_dropped(matched: dict[int, int], dropped: int, length: int) -> None:
    """Workers in `dropped` hold exactly `length` blocks. The infinite mask at the start stands for all: none counted."""
    if length == 0:
        return
    while dropped:
        bit = dropped & -dropped
        matched[bit] = length
        dropped ^= bit


def _drop_bit(holders: dict[bytes, int], block_hash: bytes, bit: int) -> None:
    left = holders.get(block_hash, 0) & ~bit
    if left:
        holders[block_hash] = left
    else:
        holders.pop(block_hash, None)
