"""News: what the store has said and nobody has published yet. Any thread adds, the event loop takes. Bounded: what does not fit
is dropped, and a snapshot of the store makes up for it."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kv_store.tiers import StoredBlock


@dataclass(frozen=True, slots=True)
class Item:
    """What was stored, or what was removed."""

    stored: Sequence[StoredBlock]
    removed: Sequence[StoredBlock]


class News:
    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._lock = threading.Lock()
        self._items: list[Item] = []
        self._num_queued = 0
        self._overflowed = True  # whatever was there before we listened
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived = asyncio.Event()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def detach(self) -> None:
        """The event loop does not listen any more; nothing is kept from now on."""
        with self._lock:
            self._loop = None
            self._items.clear()
            self._num_queued = 0

    @property
    def num_queued(self) -> int:
        """Blocks."""
        return self._num_queued

    def add(self, stored: Sequence[StoredBlock] = (), removed: Sequence[StoredBlock] = ()) -> None:
        with self._lock:
            if self._loop is None or self._overflowed:
                return
            self._num_queued += len(stored) + len(removed)
            if self._num_queued > self._max_blocks:
                self._overflowed = True
                self._items.clear()
                self._num_queued = 0
            else:
                self._items.append(Item(tuple(stored), tuple(removed)))
            self._loop.call_soon_threadsafe(self._arrived.set)

    def overflowed(self) -> bool:
        """Whether something was dropped since the last call. If so, what comes from now on is kept again: the snapshot is
        to be taken after this call, and the news applied to it."""
        with self._lock:
            overflowed, self._overflowed = self._overflowed, False
            return overflowed

    def take(self) -> list[Item]:
        """In the order in which it came."""
        with self._lock:
            items, self._items = self._items, []
            self._num_queued = 0
            self._arrived.clear()
            return items

    def wake(self) -> None:
        """On the event loop."""
        self._arrived.set()

    async def wait(self, timeout_s: float) -> None:
        """Until something comes, or the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._arrived.wait()
        except TimeoutError:
            return
