"""KVEventLog: what this process's caches gained and lost since somebody last asked, for the routers' index.

The prefix cache is the tier "device"; a store behind it tells of its own. Written and read from any thread. Bounded: when
more has piled up than a reader could want, it is dropped and the next `take` describes everything instead. Events get their
numbers when they are taken, so what was dropped leaves no gap.
"""

import threading
from collections.abc import Iterator, Sequence
from itertools import islice

from protocol.ids import BlockHash, Incarnation
from protocol.kv_events import (
    MAX_EVENT_BLOCKS,
    AllBlocksCleared,
    BlocksRemoved,
    BlocksStored,
    KVEvent,
    KVEventBatch,
    StorageTier,
)

MAX_PENDING_BLOCKS = 1 << 15
MAX_KNOWN_BLOCKS = 1 << 18
"""Of one tier. A router knows twice as many of a worker."""

_Kind = type[BlocksStored | BlocksRemoved]


class KVEventLog:
    """`max_pending_blocks` bounds the addresses kept for the next `take`, and with them the events; `max_known_blocks` those
    of each tier: of a larger one, readers hear that what was stored first is gone."""

    def __init__(
        self,
        incarnation: Incarnation,
        max_pending_blocks: int = MAX_PENDING_BLOCKS,
        max_known_blocks: int = MAX_KNOWN_BLOCKS,
    ) -> None:
        self._incarnation = incarnation
        self._max_pending_blocks = max_pending_blocks
        self._max_known_blocks = max_known_blocks
        self._lock = threading.Lock()
        # Of each tier in the order of storing, parents before children.
        self._known: dict[StorageTier, dict[BlockHash, None]] = {"device": {}, "host": {}, "disk": {}}
        self._pending: list[tuple[_Kind, StorageTier, list[BlockHash]]] = []
        self._num_pending_blocks = 0
        self._starts_over = False
        self._next_event = 0

    def stored(self, block_hashes: Sequence[BlockHash], tier: StorageTier = "device") -> None:
        with self._lock:
            known = self._known[tier]
            known.update(dict.fromkeys(block_hashes))
            self._note(BlocksStored, tier, block_hashes)
            if len(known) > self._max_known_blocks:
                self._remove(tier, [*islice(known, len(known) - self._max_known_blocks)])

    def removed(self, block_hashes: Sequence[BlockHash], tier: StorageTier = "device") -> None:
        """Those that are not known are left out."""
        with self._lock:
            self._remove(tier, block_hashes)

    def cleared(self) -> None:
        """The device has forgotten everything; other tiers have not."""
        with self._lock:
            self._known["device"].clear()
            self._start_over()

    def num_held(self, block_hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of this chain are in one tier or another, as far as is known here."""
        with self._lock:
            tiers = tuple(self._known.values())
            for index, block_hash in enumerate(block_hashes):
                if not any(block_hash in known for known in tiers):
                    return index
        return len(block_hashes)

    def take(self) -> KVEventBatch | None:
        """What happened since the last `take` or `snapshot`; None if nothing did."""
        with self._lock:
            if self._starts_over:
                return self._number([*self._whole()])
            if not self._pending:
                return None
            return self._number([kind(tuple(hashes), tier) for kind, tier, hashes in self._pending])

    def snapshot(self) -> KVEventBatch:
        """All of all tiers. Replaces what is pending."""
        with self._lock:
            return self._number([*self._whole()])

    def _remove(self, tier: StorageTier, block_hashes: Sequence[BlockHash]) -> None:
        known = self._known[tier]
        gone = [
            block_hash for block_hash in block_hashes if known.pop(block_hash, False) is None
        ]  # False: was not there
        self._note(BlocksRemoved, tier, gone)

    def _note(self, kind: _Kind, tier: StorageTier, block_hashes: Sequence[BlockHash]) -> None:
        if self._starts_over or not block_hashes:
            return
        self._num_pending_blocks += len(block_hashes)
        if self._num_pending_blocks > self._max_pending_blocks:
            self._start_over()
        elif self._pending and self._pending[-1][0] is kind and self._pending[-1][1] == tier:
            self._pending[-1][2].extend(block_hashes)
        else:
            self._pending.append((kind, tier, list(block_hashes)))

    def _start_over(self) -> None:
        self._starts_over = True
        self._pending.clear()

    def _whole(self) -> Iterator[KVEvent]:
        yield AllBlocksCleared()
        for tier, known in self._known.items():
            hashes = tuple(known)
            for start in range(0, len(hashes), MAX_EVENT_BLOCKS):
                yield BlocksStored(hashes[start : start + MAX_EVENT_BLOCKS], tier)

    def _number(self, events: list[KVEvent]) -> KVEventBatch:
        batch = KVEventBatch(self._incarnation, self._next_event, tuple(events))
        self._next_event += len(events)
        self._pending.clear()
        self._num_pending_blocks = 0
        self._starts_over = False
        return batch
