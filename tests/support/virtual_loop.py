"""VirtualLoop: an asyncio event loop whose time is a number. Nothing sleeps: when nothing is ready, the clock jumps to the
next timer. What worker threads do happens on the loop, at an instant within `work_s` of being asked for, in order for an
executor of one thread; so a run with the same random numbers takes the same course each time.

For code without real input and output. An await that nothing can ever end raises Stuck instead of waiting.
"""

import asyncio
import math
import random
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class Stuck(RuntimeError):
    """Nothing is ready, no timer is set, and no other thread exists: what is awaited will never come."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """`unhandled` collects what would have gone to the loop's exception handler."""

    def __init__(self, rng: random.Random, work_s: float = 0.0) -> None:
        self._now = 0.0
        self._rng = rng
        self._work_s = work_s
        self._last_job: WeakKeyDictionary[Executor, float] = WeakKeyDictionary()
        super().__init__(_JumpingSelector(self._jump))
        self.unhandled: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.unhandled.append(context))

    def time(self) -> float:
        return self._now

    def run_in_executor(  # type: ignore[override]  # a future of this loop, not one that a thread completes
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        at = self._now + self._rng.random() * self._work_s
        if executor is not None and getattr(executor, "_max_workers", 1) == 1:
            after = math.nextafter(self._last_job.get(executor, 0.0), math.inf)  # timers of one instant have no order
            at = self._last_job[executor] = max(at, after)
        self.call_at(at, _run, future, func, args)
        return future

    def _jump(self, seconds: float) -> None:
        self._now += seconds


def _run(future: asyncio.Future[T], func: Callable[..., T], args: tuple[Any, ...]) -> None:
    """A thread's work is not undone by whoever stopped waiting for it."""
    try:
        result = func(*args)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the future's
        if not future.done():
            future.set_exception(error)
    else:
        if not future.done():
            future.set_result(result)


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for files, lets time pass."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck("nothing is ready and no timer is set")
        if timeout > 0:
            self._jump(timeout)
        return []
