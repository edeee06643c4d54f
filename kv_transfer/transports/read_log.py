"""What all transports need around a transfer: totals (ReadLog, one per transport), a link that closes only when no transfer
is in flight (LinkUse, one per link), and giving up on one that takes too long (bounded). Event loop only.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from kv_transfer.transport import Moved, TransferAbandoned, TransportStats
from protocol.errors import PeerLost, TransferError
from protocol.transfer import Direction

REMEMBERED_S = 900.0
"""How long totals by peer outlive the last link to it."""

T = TypeVar("T")

_probing: ContextVar[bool] = ContextVar("kv_probing", default=False)


@contextmanager
def uncounted() -> Iterator[None]:
    """Transfers of this task within do not count: they are probes, and move nobody's KV."""
    token = _probing.set(True)
    try:
        yield
    finally:
        _probing.reset(token)


@dataclass(slots=True)
class _Totals:
    num_transfers: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    num_copies: int = 0
    seconds: float = 0.0
    abandoned: set[asyncio.Event] = field(default_factory=set)

    def moved(self) -> Moved:
        self.abandoned = {settled for settled in self.abandoned if not settled.is_set()}
        return Moved(
            num_transfers=self.num_transfers,
            num_failed=self.num_failed,
            num_bytes=self.num_bytes,
            num_copies=self.num_copies,
            seconds=self.seconds,
            num_quarantined=len(self.abandoned),
        )


class ReadLog:
    """Totals of a transport since it was made, and by peer."""

    def __init__(self) -> None:
        self._all = _Totals()
        self._by_peer: dict[tuple[str, Direction], _Totals] = {}
        self._num_links: dict[str, int] = {}
        self._unlinked_at: dict[str, float] = {}

    def linked(self, peer: str) -> None:
        self._num_links[peer] = self._num_links.get(peer, 0) + 1
        self._unlinked_at.pop(peer, None)

    def unlinked(self, peer: str) -> None:
        self._num_links[peer] -= 1
        if not self._num_links[peer]:
            del self._num_links[peer]
            self._unlinked_at[peer] = time.monotonic()

    def completed(self, peer: str, direction: Direction, num_bytes: int, num_copies: int, seconds: float) -> None:
        for totals in (self._all, self._of(peer, direction)):
            totals.num_transfers += 1
            totals.num_bytes += num_bytes
            totals.num_copies += num_copies
            totals.seconds += seconds

    def failed(self, peer: str, direction: Direction, error: TransferError) -> None:
        for totals in (self._all, self._of(peer, direction)):
            totals.num_failed += 1
            if isinstance(error, TransferAbandoned):
                totals.abandoned.add(error.settled)

    def stats(self) -> TransportStats:
        """Forgets peers that have gone for REMEMBERED_S seconds."""
        now = time.monotonic()
        gone = {peer for peer, since in self._unlinked_at.items() if now - since >= REMEMBERED_S}
        for peer in gone:
            del self._unlinked_at[peer]
        self._by_peer = {key: totals for key, totals in self._by_peer.items() if key[0] not in gone}
        moved = self._all.moved()
        return TransportStats(
            num_transfers=moved.num_transfers,
            num_failed=moved.num_failed,
            num_bytes=moved.num_bytes,
            num_copies=moved.num_copies,
            seconds=moved.seconds,
            num_quarantined=moved.num_quarantined,
            by_peer={key: totals.moved() for key, totals in self._by_peer.items()},
        )

    def _of(self, peer: str, direction: Direction) -> _Totals:
        return self._by_peer.setdefault((peer, direction), _Totals())


class LinkUse:
    """Transfers in flight on one link: refuses new ones once it is closed, and tells when the last one has ended."""

    def __init__(self, log: ReadLog, peer: str) -> None:
        self._log = log
        self._peer = peer
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.closed = False
        log.linked(peer)

    @contextmanager
    def transfer(self, num_bytes: int, num_copies: int, direction: Direction = "pull") -> Iterator[None]:
        """Around one transfer. Raises PeerLost on a closed link."""
        if self.closed:
            raise PeerLost(f"the link to {self._peer} is closed")
        counted = not _probing.get()
        started = time.perf_counter()
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        except TransferError as error:
            if counted:
                self._log.failed(self._peer, direction, error)
            raise
        else:
            if counted:
                self._log.completed(self._peer, direction, num_bytes, num_copies, time.perf_counter() - started)
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def close(self) -> None:
        """Refuse further transfers and wait for those in flight. Idempotent."""
        if not self.closed:
            self.closed = True
            self._log.unlinked(self._peer)
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
