"""InprocTransport: owner and reader in one process. For tests of everything above the seam, with faults to inject.

Faults are set on a transport and act on every transfer out of its arena.
"""

import asyncio
import functools
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kv_transfer.memory.arena import HostArena
from kv_transfer.transport import Capabilities, MayRead, TransportStats, check_block_ids, lends, make_endpoint
from kv_transfer.transports.memory_copy import copy_runs
from kv_transfer.transports.plan import CopyRun, coalesce
from kv_transfer.transports.read_log import LinkUse, ReadLog, bounded
from protocol.errors import LeaseExpired, PeerLost, TransferError
from protocol.ids import TicketId
from protocol.transfer import Endpoint, Introduction, TransportKind

_open_transports: dict[bytes, "InprocTransport"] = {}
"""The wire of this transport: payload -> the owner's end."""


@dataclass(frozen=True, slots=True)
class Course:
    """How one transfer goes, block by block, in the time of the event loop.

    pauses_s: before the block of the same index. failure: raised instead of moving block `fails_at`. flips: block and bit,
    of bits that arrive wrong.
    """

    pauses_s: Sequence[float] = ()
    fails_at: int = 0
    failure: TransferError | None = None
    flips: Sequence[tuple[int, int]] = ()


@dataclass
class Faults:
    """delay_s: before each copy. fail: raised instead of copying. corrupt: flip a bit of the first block copied.
    stall: nothing is copied before this event is set. course: of the next transfer, which is of so many blocks; the others
    mean nothing then."""

    delay_s: float = 0.0
    fail: TransferError | None = None
    corrupt: bool = False
    stall: threading.Event | None = None
    course: Callable[[int], Course] | None = None


class InprocTransport:
    kind: TransportKind = "inproc"
    capabilities = Capabilities(
        directions=("pull", "push"),
        one_sided=True,
        needs_peer_progress=False,
        crosses_hosts=False,
        device_memory=False,
        owner_checks_lease=True,
        may_abandon=True,
        notices_death=True,
        best_piece_bytes=1,
    )

    def __init__(self, arena: HostArena, may_read: MayRead) -> None:
        self.arena = arena
        self.may_read = may_read
        self.faults = Faults()
        self.log = ReadLog()
        self.executor = ThreadPoolExecutor(4, thread_name_prefix="kv-inproc")
        self.closed = False
        self._name = secrets.token_bytes(16)
        _open_transports[self._name] = self

    def endpoint(self) -> Endpoint:
        return make_endpoint(self.kind, self._name)

    async def connect(self, peer: Introduction, endpoint: Endpoint) -> "InprocLink":
        return InprocLink(self, endpoint.payload, peer.worker)

    def stats(self) -> TransportStats:
        return self.log.stats()

    async def close(self) -> None:
        self.closed = True
        _open_transports.pop(self._name, None)
        self.executor.shutdown(wait=False)


class InprocLink:
    def __init__(self, initiator: InprocTransport, peer_name: bytes, peer: str) -> None:
        self._initiator = initiator
        self._peer_name = peer_name
        self._peer = peer
        self._target()
        self._use = LinkUse(initiator.log, peer)

    async def read(
        self, ticket_id: TicketId, remote_block_ids: Sequence[int], local_block_ids: Sequence[int], timeout_s: float
    ) -> None:
        runs = coalesce(remote_block_ids, local_block_ids)
        with self._use.transfer(len(local_block_ids) * self._initiator.arena.block_bytes, len(runs)):
            target = self._target()
            self._check(target, remote_block_ids, local_block_ids)
            if not lends(target.arena, target.may_read, ticket_id, [(block_id, 1) for block_id in remote_block_ids]):
                raise LeaseExpired(f"{self._peer} does not lend these blocks to this ticket")
            await self._copy(target, self._initiator, runs, timeout_s)

    async def write(self, local_block_ids: Sequence[int], remote_block_ids: Sequence[int], timeout_s: float) -> None:
        runs = coalesce(local_block_ids, remote_block_ids)
        with self._use.transfer(len(local_block_ids) * self._initiator.arena.block_bytes, len(runs), "push"):
            target = self._target()
            self._check(target, remote_block_ids, local_block_ids)
            await self._copy(self._initiator, target, runs, timeout_s)

    async def close(self) -> None:
        await self._use.close()

    def _target(self) -> InprocTransport:
        target = _open_transports.get(self._peer_name)
        if target is None:
            raise PeerLost(f"{self._peer} is gone")
        return target

    def _check(self, target: InprocTransport, remote_ids: Sequence[int], local_ids: Sequence[int]) -> None:
        check_block_ids(remote_ids, target.arena.num_wire_blocks, f"{self._peer}'s")
        check_block_ids(local_ids, self._initiator.arena.num_wire_blocks, "our")

    async def _copy(
        self, source: InprocTransport, destination: InprocTransport, runs: list[CopyRun], timeout_s: float
    ) -> None:
        loop = asyncio.get_running_loop()
        copied: asyncio.Future[None]
        if source.faults.course is not None:
            course = source.faults.course(sum(run.num_blocks for run in runs))
            copied = loop.create_task(_follow(course, source, destination.arena, runs))
            copied.add_done_callback(_heard)
        else:
            copy = functools.partial(_copy, source, destination.arena, runs)
            copied = loop.run_in_executor(self._initiator.executor, copy)
        await bounded(copied, timeout_s, self._peer)


def _copy(source: InprocTransport, destination: HostArena, runs: list[CopyRun]) -> None:
    faults = source.faults
    if faults.stall is not None:
        faults.stall.wait()
    if faults.delay_s:
        time.sleep(faults.delay_s)
    if faults.fail is not None:
        raise faults.fail
    copy_runs(source.arena.address, destination, runs)
    if faults.corrupt and runs:
        destination.block(runs[0].destination)[0] ^= 1


def _heard(copied: asyncio.Future[None]) -> None:
    """It may fail when nobody is left who waits for it."""
    if not copied.cancelled():
        copied.exception()


async def _follow(course: Course, source: InprocTransport, destination: HostArena, runs: list[CopyRun]) -> None:
    blocks = [CopyRun(run.source + i, run.destination + i, 1) for run in runs for i in range(run.num_blocks)]
    for index, block in enumerate(blocks):
        if index < len(course.pauses_s):
            await asyncio.sleep(course.pauses_s[index])
        if course.failure is not None and index == course.fails_at:
            raise course.failure
        if source.closed:
            raise PeerLost("the process that has the blocks is gone")
        copy_runs(source.arena.address, destination, [block])
        for flipped, bit in course.flips:
            if flipped == index:
                destination.block(block.destination)[bit // 8] ^= 1 << bit % 8
