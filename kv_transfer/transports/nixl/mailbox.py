"""Mailbox: calls that other threads leave for the one thread that is to make them.

queue.SimpleQueue would do, but its get() in CPython 3.11 was seen to ignore a timeout of tens of microseconds and to wait
for the next put instead: once in some thousands of transfers on a busy machine, which then stood still.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable

Call = Callable[[], None]


class Mailbox:
    """Any thread puts, one thread takes. Calls are taken in the order in which they were put."""

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._bell = threading.Lock()  # free while it rings
        self._bell.acquire()

    def put(self, call: Call) -> None:
        self._calls.append(call)
        with contextlib.suppress(RuntimeError):  # it rings already
            self._bell.release()

    def take(self, timeout_s: float | None) -> list[Call]:
        """All calls that are there. Where there are none it waits `timeout_s` seconds for one (None: without end), and
        may return nothing sooner."""
        if not self._calls and timeout_s != 0:
            self._bell.acquire(timeout=-1 if timeout_s is None else timeout_s)
        taken: list[Call] = []
        while self._calls:
            taken.append(self._calls.popleft())
        return taken
