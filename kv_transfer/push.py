"""Push: one export's blocks on their way into its reader's arena, written by us, the owner. Event loop only.

    offered (final, staged) -> in turn on the link -> written -> landed, which the reader is told

As with a read, what has been started is never cut short: `writing` stays true until the last write has ended, also one that
was given up, and until then the blocks at both ends are not to be used for anything else.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kv_transfer.handoff_timeline import HandoffTimeline
from kv_transfer.link_queue import LinkQueue
from kv_transfer.prefix import Prefix
from kv_transfer.quarantine import Quarantine
from kv_transfer.transport import Link, TransferAbandoned
from protocol.errors import PeerLost, TransferError
from protocol.transfer import TransportKind
from runtime.clock import Clock

RECONNECT_PAUSE_S = 0.05
"""Before a new link to a reader: one that died is noticed by then, and the library loses a socket for each that it tries
to connect to."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PushContext:
    """What the pushes of one owner share."""

    tasks: asyncio.TaskGroup
    quarantine: Quarantine
    clock: Clock
    timeout_s: float


@dataclass(frozen=True, slots=True)
class PushEvents:
    """`landed`: more of the leading blocks have. `failed`: no more will. `settled`: `writing` has become false."""

    landed: Callable[[], None]
    failed: Callable[[TransferError], None]
    settled: Callable[[], None]


class PushLinks(Protocol):
    """Who an owner can push to: readers that have introduced themselves (kv_transfer.pushers)."""

    async def link(self, worker: str, incarnation: str, kind: TransportKind) -> Link:
        """Raises TransferError."""
        ...

    def forget(self, worker: str, incarnation: str, kind: TransportKind) -> None:
        """That link is broken. The next use connects anew."""
        ...


@dataclass(frozen=True, slots=True)
class PushPath:
    """The way to one reader."""

    links: PushLinks
    worker: str
    incarnation: str
    kind: TransportKind

    async def link(self) -> Link:
        return await self.links.link(self.worker, self.incarnation, self.kind)

    async def link_instead_of(self, broken: Link) -> Link:
        """Of many writes that a link broke under, the first forgets it; all share the new one."""
        link = await self.link()
        if link is not broken:
            return link
        self.links.forget(self.worker, self.incarnation, self.kind)
        return await self.link()


class Push:
    """`remote_ids`: the reader's blocks for the context from `first_block` on."""

    def __init__(
        self,
        context: PushContext,
        path: PushPath,
        queue: LinkQueue,
        first_block: int,
        remote_ids: Sequence[int],
        events: PushEvents,
    ) -> None:
        self._context = context
        self._path = path
        self._first_block = first_block
        self._remote_ids = tuple(remote_ids)
        self._events = events
        self._wire_ids: list[int] = []
        self._num_started = 0
        self._num_writing = 0
        self._landed = Prefix(first_block)
        self._stopped = False
        self._lane = queue.enter(self._start)
        self.timeline = HandoffTimeline(context.clock)

    @property
    def num_landed(self) -> int:
        """Leading blocks of the context that the reader has, those that it had before included."""
        return self._landed.end

    @property
    def num_offered(self) -> int:
        """Leading blocks of the context that are offered, or that the reader had before."""
        return self._first_block + len(self._wire_ids)

    @property
    def writing(self) -> bool:
        return self._num_writing > 0

    def offer(self, wire_ids: Sequence[int]) -> None:
        """The next blocks of the context are final and staged."""
        self._wire_ids.extend(wire_ids)
        if wire_ids:
            self._lane.add(len(wire_ids))

    def hasten(self) -> None:
        """The prefill is done."""
        self._lane.hasten()

    def stop(self) -> None:
        """Nothing more is written, apart from what is under way. Idempotent."""
        self._stopped = True
        self._lane.leave()

    def _start(self, num_blocks: int) -> None:
        start = self._num_started
        self._num_started += num_blocks
        self._num_writing += 1
        self._context.tasks.create_task(self._write(start, num_blocks), name="kv-push")

    async def _write(self, start: int, num_blocks: int) -> None:
        """Raises nothing: the group that it runs in is everybody's."""
        wire_ids = self._wire_ids[start : start + num_blocks]
        remote_ids = self._remote_ids[start : start + num_blocks]
        try:
            with self.timeline.moving():
                await self._write_or_again(wire_ids, remote_ids)
            self._landed.add(self._first_block + start, num_blocks)
            self._events.landed()
        except TransferAbandoned as error:
            self._context.quarantine.hold(error.settled, self._write_ended)
            self._fail(error)
            return
        except TransferError as error:
            self._fail(error)
        except Exception:
            log.exception("pushing KV failed")
            self._fail(TransferError("pushing KV failed; see the owner's log"))
        finally:
            self._lane.ended(num_blocks)
        self._write_ended()

    async def _write_or_again(self, wire_ids: Sequence[int], remote_ids: Sequence[int]) -> None:
        """Once more, over a new link, if this one is broken and the reader still listens."""
        timeout_s = self._context.timeout_s
        link = await self._path.link()
        try:
            await link.write(wire_ids, remote_ids, timeout_s)
        except PeerLost as error:
            log.info("the link that a push used broke: %s", error.message)
            await asyncio.sleep(RECONNECT_PAUSE_S)
            if self._stopped:
                self._path.links.forget(self._path.worker, self._path.incarnation, self._path.kind)
                raise
            link = await self._path.link_instead_of(link)
            await link.write(wire_ids, remote_ids, timeout_s)

    def _fail(self, error: TransferError) -> None:
        self.stop()
        self._events.failed(error)

    def _write_ended(self) -> None:
        self._num_writing -= 1
        if not self._num_writing:
            self._events.settled()
