"""Flight: one round trip of lookups, and whether the server or our own event loop makes it late.

    connecting ──▶ being written ──▶ under way ──▶ landed: answered, or failed

A loop that is late reads late what came in time, and writes late what was asked in time. So the server's time begins when the
questions are surely written, and it is over only when the loop has looked after that time and found no reply. A reply that
has arrived by then is in time, however late it is read.
"""

import asyncio
from typing import Any, Self

from runtime.clock import Clock

_GRACE_TURNS = 6
"""Turns of the event loop in which a reply that lies in the socket reaches whoever waits for it: it is read, parsed, gathered
from the nodes of a cluster, and told."""

_WRITE_TURNS = 3
"""Turns after which the driver has written what it was given: it does so in a task of its own, in a cluster in one a node."""


async def in_time(future: asyncio.Future[Any], budget_s: float) -> bool:
    """Whether it is done within the budget, or what makes it so has arrived by then and is yet to be read."""
    await asyncio.wait((future,), timeout=budget_s)
    for _ in range(_GRACE_TURNS):
        if future.done():
            return True
        await asyncio.sleep(0)
    return future.done()


class Flight:
    """On one event loop. Used as `with Flight(clock) as flight:` around the round trip; leaving it without an error means that
    the server has answered."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._begun_at = clock.now()
        self._open = False
        self._written_at: float | None = None
        self._written = asyncio.Event()
        self._answered: asyncio.Future[bool] = self._loop.create_future()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._answered.set_result(kind is None)
        self._written.set()

    def opened(self) -> None:
        """The connection is open, and the questions are given to the driver."""
        self._open = True
        self._loop.call_soon(self._after_turns, _WRITE_TURNS - 1)

    def is_connecting(self, longer_than_s: float) -> bool:
        """For so long, up to now."""
        return not self._open and self._clock.now() - self._begun_at > longer_than_s

    def is_overdue(self, budget_s: float) -> bool:
        """Whether there is no reply though the server has had so long. To be asked when the loop has just looked."""
        if self._answered.done() or self._written_at is None:
            return False
        return self._clock.now() - self._written_at >= budget_s

    async def was_slow(self, budget_s: float) -> bool:
        """Whether the server leaves the questions unanswered for longer than the budget, or for good. Returns when that is known:
        with the reply, or as soon as the server has had its time."""
        await self._written.wait()
        if self._written_at is not None:
            await in_time(self._answered, max(0.0, self._written_at + budget_s - self._clock.now()))
        return not self._answered.done() or not self._answered.result()

    def _after_turns(self, turns_left: int) -> None:
        if turns_left:
            self._loop.call_soon(self._after_turns, turns_left - 1)
        elif not self._written.is_set():
            self._written_at = self._clock.now()
            self._written.set()
