"""Receiving: blocks that another node puts here, fetched straight into host slots.

Whoever fetches knows transports; what is known here is that a fetch which was given up may still write. Its slots stay out
of use until it has settled, however long that takes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from kv_store.entries import Entry
from kv_store.host_tier import HostTier
from kv_store.mover import Mover
from protocol.kv_blocks import CachedBlock

Fetch = Callable[[Sequence[CachedBlock], Sequence[int]], Awaitable[int]]
"""`fetch(blocks, slots)`: bring these blocks into these slots, one each; how many leading ones are right. It raises only when no more bytes can land, or FetchUnsettled."""


class FetchUnsettled(Exception):
    """Bytes may still land: not before `settled` is set are the slots used for anything else. The first `num_valid` of them are
    right all the same. Raised instead of a cancel, it stands for that cancel too."""

    def __init__(self, settled: asyncio.Event, num_valid: int = 0) -> None:
        super().__init__("a fetch was given up, and its bytes may still land")
        self.settled = settled
        self.num_valid = num_valid


class Receiver:
    """Of one store, on its event loop."""

    def __init__(self, host: HostTier, mover: Mover) -> None:
        self._host = host
        self._mover = mover
        self._quarantines: set[asyncio.Task[None]] = set()

    async def receive(self, blocks: Sequence[CachedBlock], fetch: Fetch) -> int:
        """How many of these blocks, none of which is here, are kept. Raises whatever `fetch` does, except
        FetchUnsettled."""
        entries = self._host.reserve(blocks).entries
        if not entries:
            return 0
        num_cancels = _num_cancels()
        begin = time.perf_counter()
        try:
            num_valid = await fetch([entry.block for entry in entries], [entry.slot for entry in entries])
        except FetchUnsettled as unsettled:
            num_valid = unsettled.num_valid
            self._quarantine(entries[num_valid:], unsettled.settled)
            if _num_cancels() > num_cancels:
                self._host.abort(entries[:num_valid])
                raise asyncio.CancelledError from unsettled
        except BaseException:
            self._host.abort(entries)
            raise
        else:
            self._host.abort(entries[num_valid:])
        return await self._keep(entries[:num_valid], begin)

    async def close(self) -> None:
        """Leaves unsettled slots as they are."""
        for task in self._quarantines:
            task.cancel()
        if self._quarantines:
            await asyncio.wait(self._quarantines)

    async def _keep(self, entries: Sequence[Entry], begin: float) -> int:
        if not entries:
            return 0
        try:
            checksums = await self._mover.checksums([entry.slot for entry in entries])
        except BaseException:
            self._host.abort(entries)
            raise
        self._host.moved("receive", len(entries), time.perf_counter() - begin)
        return len(self._host.commit(entries, checksums))

    def _quarantine(self, entries: Sequence[Entry], settled: asyncio.Event) -> None:
        if not entries:
            return

        async def wait() -> None:
            await settled.wait()
            self._host.settled(entries)

        self._host.quarantined(len(entries))
        task = asyncio.get_running_loop().create_task(wait())
        self._quarantines.add(task)
        task.add_done_callback(self._quarantines.discard)


def _num_cancels() -> int:
    """Of the running task: those by the timeouts that it is in as well."""
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()
