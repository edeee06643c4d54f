"""KVEventLog: what the prefix cache gained and lost since somebody last asked, for the routers' index.

Written by the engine's thread, read from any. Bounded: when more has piled up than a reader could want, it is dropped
and the next `take` describes the whole cache instead. Events get their numbers when they are taken, so what was dropped
leaves no gap.
"""

import threading
from collections.abc import Iterator, Sequence

from protocol.ids import BlockHash, Incarnation
from protocol.kv_events import MAX_EVENT_BLOCKS, AllBlocksCleared, BlocksRemoved, BlocksStored, KVEvent, KVEventBatch

MAX_PENDING_BLOCKS = 1 << 15


class KVEventLog:
    """`max_pending_blocks` bounds the addresses kept for the next `take`, and with them the events."""

    def __init__(self, incarnation: Incarnation, max_pending_blocks: int = MAX_PENDING_BLOCKS) -> None:
        self._incarnation = incarnation
        self._max_pending_blocks = max_pending_blocks
        self._lock = threading.Lock()
        self._known: dict[BlockHash, None] = {}  # in the order of storing, parents before children
        self._pending: list[tuple[type[BlocksStored | BlocksRemoved], list[BlockHash]]] = []
        self._num_pending_blocks = 0
        self._starts_over = False
        self._next_event = 0

    def stored(self, block_hashes: Sequence[BlockHash]) -> None:
        with self._lock:
            self._known.update(dict.fromkeys(block_hashes))
            self._note(BlocksStored, block_hashes)

    def removed(self, block_hashes: Sequence[BlockHash]) -> None:
        with self._lock:
            for block_hash in block_hashes:
                del self._known[block_hash]
            self._note(BlocksRemoved, block_hashes)

    def cleared(self) -> None:
        with self._lock:
            self._known.clear()
            self._start_over()

    def take(self) -> KVEventBatch | None:
        """What happened since the last `take` or `snapshot`; None if nothing did."""
        with self._lock:
            if self._starts_over:
                return self._number([*self._whole()])
            if not self._pending:
                return None
            return self._number([kind(tuple(hashes)) for kind, hashes in self._pending])

    def snapshot(self) -> KVEventBatch:
        """The whole cache. Replaces what is pending."""
        with self._lock:
            return self._number([*self._whole()])

    def _note(self, kind: type[BlocksStored | BlocksRemoved], block_hashes: Sequence[BlockHash]) -> None:
        if self._starts_over or not block_hashes:
            return
        self._num_pending_blocks += len(block_hashes)
        if self._num_pending_blocks > self._max_pending_blocks:
            self._start_over()
        elif self._pending and self._pending[-1][0] is kind:
            self._pending[-1][1].extend(block_hashes)
        else:
            self._pending.append((kind, list(block_hashes)))

    def _start_over(self) -> None:
        self._starts_over = True
        self._pending.clear()

    def _whole(self) -> Iterator[KVEvent]:
        yield AllBlocksCleared()
        hashes = tuple(self._known)
        for start in range(0, len(hashes), MAX_EVENT_BLOCKS):
            yield BlocksStored(hashes[start : start + MAX_EVENT_BLOCKS])

    def _number(self, events: list[KVEvent]) -> KVEventBatch:
        batch = KVEventBatch(self._incarnation, self._next_event, tuple(events))
        self._next_event += len(events)
        self._pending.clear()
        self._num_pending_blocks = 0
        self._starts_over = False
        return batch
