"""Pushers: the readers that have introduced themselves to this owner, and the links by which it pushes into their memory.

A reader introduces itself at POST /kv/connect; a link is made when the first push needs it. It goes when the reader
introduces itself in another life, when it is forgotten after an error, or when nothing was heard of the reader for a
while: a reader that is still there meets us again when it is told so.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Self

from kv_transfer.meeting.link_probe import push_samples
from kv_transfer.transport import Link, close_link, find_endpoint
from kv_transfer.transports.transport_set import TransportSet
from protocol.errors import PeerLost, TransferError
from protocol.ids import WorkerId
from protocol.transfer import Introduction, ProbePush, ProbeResult, TransportKind
from runtime.clock import Clock

READER_IDLE_S = 900.0
MAX_READERS = 1024
TIDY_INTERVAL_S = 30.0
PROBE_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)

_Connecting = asyncio.Task[Link | TransferError]


@dataclass(slots=True)
class KnownReader:
    """`links` are connected or being so."""

    introduction: Introduction
    heard_at: float
    links: dict[TransportKind, _Connecting] = field(default_factory=dict)


class Pushers:
    """One per owner, `async with Pushers(...) as pushers:` for its whole life, inside its transports. Event loop only."""

    def __init__(self, transports: TransportSet, clock: Clock) -> None:
        self._transports = transports
        self._clock = clock
        self._readers: dict[WorkerId, KnownReader] = {}
        self._tasks = asyncio.TaskGroup()
        self._tidying: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._tidying = self._tasks.create_task(self._tidy(), name="kv-readers")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Closes every link, each when what it has in flight has ended."""
        assert self._tidying is not None
        self._tidying.cancel()
        for worker in list(self._readers):
            self._drop(worker)
        await self._tasks.__aexit__(None, None, None)

    @property
    def known(self) -> list[KnownReader]:
        return list(self._readers.values())

    def introduce(self, reader: Introduction) -> None:
        """Remember a reader, of our layout and with a transport of ours. An earlier life of it, or what it said of itself
        before, is over."""
        worker = WorkerId(reader.worker)
        known = self._readers.get(worker)
        if known is not None and known.introduction == reader:
            known.heard_at = self._clock.now()
            return
        self._drop(worker)
        if len(self._readers) >= MAX_READERS:
            self._drop(min(self._readers, key=lambda known: self._readers[known].heard_at))
        self._readers[worker] = KnownReader(reader, self._clock.now())

    def reader(self, worker: str, incarnation: str) -> Introduction:
        """What a reader said of itself. Raises PeerLost if it did not, in this life: it has to meet us first."""
        return self._known(worker, incarnation).introduction

    async def link(self, worker: str, incarnation: str, kind: TransportKind) -> Link:
        """The way into a reader's memory, for `Link.write`. Raises TransferError."""
        known = self._known(worker, incarnation)
        connecting = known.links.get(kind)
        if connecting is None:
            connecting = self._tasks.create_task(self._connect(known.introduction, kind), name=f"kv-push:{worker}")
            known.links[kind] = connecting
            connecting.add_done_callback(partial(_drop_failed, known, kind))
        outcome = await asyncio.shield(connecting)
        if isinstance(outcome, TransferError):
            raise outcome
        return outcome

    def forget(self, worker: str, incarnation: str, kind: TransportKind) -> None:
        """A link is broken: close it. The next use connects anew."""
        known = self._readers.get(WorkerId(worker))
        if known is not None and known.introduction.incarnation == incarnation:
            self._close(known.links.pop(kind, None))

    async def probe(self, message: ProbePush) -> ProbeResult:
        """Push samples to a reader. Returns or raises TransferError when no more bytes move."""
        reader = self.reader(message.reader, message.incarnation)
        landing = range(reader.num_blocks + reader.num_scratch_blocks // 2, reader.num_wire_blocks)
        if any(block_id not in landing for block_id in message.block_ids):
            raise TransferError("a probe may end in the second half of the reader's scratch blocks only")
        link = await self.link(message.reader, message.incarnation, message.transport)
        return await push_samples(link, self._transports.scratch, message.block_ids, PROBE_TIMEOUT_S)

    def _known(self, worker: str, incarnation: str) -> KnownReader:
        known = self._readers.get(WorkerId(worker))
        if known is None or known.introduction.incarnation != incarnation:
            raise PeerLost(f"{worker} has not introduced itself in this life; it has to meet this node again")
        known.heard_at = self._clock.now()
        return known

    async def _connect(self, reader: Introduction, kind: TransportKind) -> Link | TransferError:
        """Never raises what a peer can cause: this runs in a group that others depend on."""
        transport = self._transports.get(kind)
        if transport is None or "push" not in transport.capabilities.directions:
            return TransferError(f"this node does not push by {kind}")
        try:
            return await transport.connect(reader, find_endpoint(reader, kind))
        except TransferError as error:
            log.warning("cannot push KV to %s: %s", reader.worker, error.message)
            return error
        except Exception:
            log.exception("connecting to %s failed", reader.worker)
            return TransferError(f"connecting to {reader.worker} failed; see this process's log")

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_INTERVAL_S)
            self.tidy()

    def tidy(self) -> None:
        """Drop readers that nothing was heard of for READER_IDLE_S."""
        now = self._clock.now()
        for worker in [worker for worker, known in self._readers.items() if now - known.heard_at >= READER_IDLE_S]:
            self._drop(worker)

    def _drop(self, worker: WorkerId) -> None:
        known = self._readers.pop(worker, None)
        if known is not None:
            for connecting in known.links.values():
                self._close(connecting)

    def _close(self, connecting: _Connecting | None) -> None:
        if connecting is not None:
            self._tasks.create_task(_close(connecting), name="kv-push-goodbye")


def _drop_failed(known: KnownReader, kind: TransportKind, connecting: _Connecting) -> None:
    """Whether or not anybody is still waiting for it: else the next to ask would hear of an old failure."""
    failed = connecting.cancelled() or isinstance(connecting.result(), TransferError)
    if failed and known.links.get(kind) is connecting:
        del known.links[kind]


async def _close(connecting: _Connecting) -> None:
    outcome = await connecting
    if not isinstance(outcome, TransferError):
        await close_link(outcome)
