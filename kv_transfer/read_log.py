"""What all transports need around a read: totals (ReadLog, one per transport), a link that closes only when no read is
in flight (LinkUse, one per link), and giving up on one that takes too long (bounded). Event loop only.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from kv_transfer.transport import TransferAbandoned, TransportStats
from protocol.errors import PeerLost, TransferError

T = TypeVar("T")


class ReadLog:
    """Totals of a transport since it was made."""

    def __init__(self) -> None:
        self._num_transfers = 0
        self._num_failed = 0
        self._num_bytes = 0
        self._num_copies = 0
        self._seconds = 0.0
        self._abandoned: set[asyncio.Event] = set()

    def completed(self, num_bytes: int, num_copies: int, seconds: float) -> None:
        self._num_transfers += 1
        self._num_bytes += num_bytes
        self._num_copies += num_copies
        self._seconds += seconds

    def failed(self, error: TransferError) -> None:
        self._num_failed += 1
        if isinstance(error, TransferAbandoned):
            self._abandoned.add(error.settled)

    def stats(self) -> TransportStats:
        self._abandoned = {settled for settled in self._abandoned if not settled.is_set()}
        return TransportStats(
            num_transfers=self._num_transfers,
            num_failed=self._num_failed,
            num_bytes=self._num_bytes,
            num_copies=self._num_copies,
            seconds=self._seconds,
            num_quarantined=len(self._abandoned),
        )


class LinkUse:
    """Reads in flight on one link: refuses new ones once it is closed, and tells when the last one has ended."""

    def __init__(self, log: ReadLog, peer: str) -> None:
        self._log = log
        self._peer = peer
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.closed = False

    @contextmanager
    def transfer(self, num_bytes: int, num_copies: int) -> Iterator[None]:
        """Around one transfer. Raises PeerLost on a closed link."""
        if self.closed:
            raise PeerLost(f"the link to {self._peer} is closed")
        started = time.perf_counter()
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        except TransferError as error:
            self._log.failed(error)
            raise
        else:
            self._log.completed(num_bytes, num_copies, time.perf_counter() - started)
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def close(self) -> None:
        """Refuse further reads and wait for those in flight."""
        self.closed = True
        await self._idle.wait()


async def bounded(landing: asyncio.Future[T], timeout_s: float, peer: str) -> T:
    """The outcome of a read that cannot be stopped. If it is not there in time, raise TransferAbandoned, whose `settled` is
    set when `landing` is done."""
    await asyncio.wait({landing}, timeout=timeout_s)
    if landing.done():
        return landing.result()
    settled = asyncio.Event()

    def settle(late: asyncio.Future[T]) -> None:
        if not late.cancelled():
            late.exception()  # nobody is left to be told
        settled.set()

    landing.add_done_callback(settle)
    raise TransferAbandoned(f"{peer} did not let a read end in {timeout_s:g} s", settled)
