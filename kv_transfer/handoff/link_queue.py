"""LinkQueue: whose blocks move next over one link, and how many at once. Without I/O; event loop only.

    Lane     one hand-off's share of the link:  add -> (start -> ended)* -> leave

Bytes in flight are bounded, so that what cannot be taken back stays small, and move in pieces, so that nobody waits for a
giant. Hand-offs whose prefill is done come first, in the order in which they were done: a client waits for nothing else.
Those that still compute share what is left, each getting as many blocks as any other. Within a hand-off blocks move in
the order of its context.

With blocks and bounds the queue decides alone when a piece starts; `start` is told how many blocks and moves them.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from runtime.clock import Clock

MAX_PIECE_BYTES = 8 << 20

Start = Callable[[int], None]
"""Begin to move the next so many blocks of a lane. Must not raise, and returns before the piece has ended."""


@dataclass(frozen=True, slots=True)
class QueueStats:
    """`waited_s`: seconds that hand-offs had something to move and nothing moving, summed over all of them."""

    num_waiting_blocks: int
    num_blocks_in_flight: int
    waited_s: float


class LinkQueue:
    """At most `max_blocks` in flight, in pieces of at most `max_piece_blocks`."""

    def __init__(self, max_blocks: int, max_piece_blocks: int, clock: Clock) -> None:
        assert 1 <= max_piece_blocks <= max_blocks
        self._max_blocks = max_blocks
        self._max_piece_blocks = max_piece_blocks
        self._clock = clock
        self._lanes: dict[Lane, None] = {}
        self._urgent: dict[Lane, None] = {}
        self._num_in_flight = 0
        self._share = 0
        self._starting = False
        self._waited_s = 0.0
        self._counted_at = clock.now()

    @classmethod
    def of_bytes(cls, max_bytes: int, block_bytes: int, max_piece_blocks: int, clock: Clock) -> "LinkQueue":
        """With bounds in bytes, and pieces of no more than so many blocks; at least one block may always move."""
        max_blocks = max(1, max_bytes // block_bytes)
        return cls(max_blocks, min(max_blocks, max_piece_blocks, max(1, MAX_PIECE_BYTES // block_bytes)), clock)

    @property
    def idle(self) -> bool:
        """Nobody uses it, and nothing that it started is under way."""
        return not self._lanes and not self._num_in_flight

    def stats(self) -> QueueStats:
        self._count_waiting()
        return QueueStats(sum(lane.num_waiting for lane in self._lanes), self._num_in_flight, self._waited_s)

    def enter(self, start: Start) -> "Lane":
        lane = Lane(self, start)
        self._lanes[lane] = None
        return lane

    # Called by lanes.

    def add(self, lane: "Lane", num_blocks: int) -> None:
        self._count_waiting()
        if not lane.num_waiting:
            lane.share = max(lane.share, self._share)  # what it did not use while it had nothing to move is gone
        lane.num_waiting += num_blocks
        self._start_pieces()

    def hasten(self, lane: "Lane") -> None:
        if lane in self._lanes:
            self._urgent[lane] = None
            self._start_pieces()

    def ended(self, lane: "Lane", num_blocks: int) -> None:
        self._count_waiting()
        lane.num_in_flight -= num_blocks
        self._num_in_flight -= num_blocks
        assert lane.num_in_flight >= 0, "a piece ended twice"
        self._start_pieces()

    def leave(self, lane: "Lane") -> None:
        self._count_waiting()
        lane.num_waiting = 0
        self._lanes.pop(lane, None)
        self._urgent.pop(lane, None)
        self._start_pieces()

    def _start_pieces(self) -> None:
        if self._starting:
            return  # a lane changed something while it was told to start
        self._starting = True
        while (lane := self._next()) is not None:
            num_blocks = min(lane.num_waiting, self._max_piece_blocks)
            if self._num_in_flight and self._num_in_flight + num_blocks > self._max_blocks:
                break
            lane.num_waiting -= num_blocks
            lane.num_in_flight += num_blocks
            self._num_in_flight += num_blocks
            self._share = lane.share
            lane.share += num_blocks
            lane.start(num_blocks)
        self._starting = False

    def _next(self) -> "Lane | None":
        """The urgent in their order, then whoever has had least."""
        for lane in self._urgent:
            if lane.num_waiting:
                return lane
        waiting = (lane for lane in self._lanes if lane.num_waiting)
        return min(waiting, key=lambda lane: lane.share, default=None)

    def _count_waiting(self) -> None:
        now = self._clock.now()
        stuck = sum(1 for lane in self._lanes if lane.num_waiting and not lane.num_in_flight)
        self._waited_s += stuck * (now - self._counted_at)
        self._counted_at = now


class Lane:
    """Made by LinkQueue.enter. `share` is how much it has had, in blocks, as far as turns are concerned."""

    def __init__(self, queue: LinkQueue, start: Start) -> None:
        self._queue = queue
        self.start = start
        self.num_waiting = 0
        self.num_in_flight = 0
        self.share = 0

    def add(self, num_blocks: int) -> None:
        """So many more blocks may move. They may start before this returns."""
        self._queue.add(self, num_blocks)

    def hasten(self) -> None:
        """Its prefill is done: from now on it goes before all that are not, and behind those that were earlier."""
        self._queue.hasten(self)

    def ended(self, num_blocks: int) -> None:
        """A piece has ended, or was given up."""
        self._queue.ended(self, num_blocks)

    def leave(self) -> None:
        """Nothing more starts. Pieces under way still end. Idempotent."""
        self._queue.leave(self)


class LinkQueues:
    """The queues of one process that initiates transfers: one for each peer and transport, while it is used."""

    def __init__(self, max_bytes: int, block_bytes: int, max_piece_blocks: int, clock: Clock) -> None:
        self._max_bytes = max_bytes
        self._block_bytes = block_bytes
        self._max_piece_blocks = max_piece_blocks
        self._clock = clock
        self._queues: dict[Hashable, LinkQueue] = {}
        self._waited_s = 0.0

    def of(self, key: Hashable) -> LinkQueue:
        """The queue of the link that `key` names, to be entered before anything else is asked here."""
        for other in [other for other, queue in self._queues.items() if queue.idle and other != key]:
            self._waited_s += self._queues.pop(other).stats().waited_s
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = LinkQueue.of_bytes(
                self._max_bytes, self._block_bytes, self._max_piece_blocks, self._clock
            )
        return queue

    def stats(self) -> QueueStats:
        """Of all links together; `waited_s` since the start."""
        each = [queue.stats() for queue in self._queues.values()]
        return QueueStats(
            num_waiting_blocks=sum(stats.num_waiting_blocks for stats in each),
            num_blocks_in_flight=sum(stats.num_blocks_in_flight for stats in each),
            waited_s=self._waited_s + sum(stats.waited_s for stats in each),
        )
