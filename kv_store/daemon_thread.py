"""DaemonThread: an executor of one thread that a hung device or disk cannot make a process wait for.

    submit ──▶ jobs, one after the other ──▶ shutdown: after those that were asked for
                         └──▶ abandon: whoever waits hears of it now, and the thread is left to whatever it hangs in

The thread starts with the first job. Nothing waits for it when the process ends.
"""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, InvalidStateError
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ThreadAbandoned(RuntimeError):
    """What a job hangs in is not waited for any more: whatever it moves may still move."""


class DaemonThread(Executor):
    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._waiting: set[Future[object]] = set()
        self._thread: threading.Thread | None = None
        self._ended = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Raises RuntimeError when the thread was shut down or abandoned."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is the future's
                with contextlib.suppress(InvalidStateError):  # it was abandoned, or cancelled
                    future.set_exception(error)
            else:
                with contextlib.suppress(InvalidStateError):
                    future.set_result(result)

        def begin() -> None:
            with self._lock:
                may_run = not future.done() and future.set_running_or_notify_cancel()
            if may_run:
                work()

        with self._lock:
            if self._ended:
                raise RuntimeError(f"the thread {self._name} has ended")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._waiting.add(future)  # type: ignore[arg-type]  # a set of futures of anything
            self._jobs.put(begin)
        future.add_done_callback(self._waiting.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002  # all are done
        with self._lock:
            if not self._ended:
                self._ended = True
                self._jobs.put(None)
        if wait and self._thread is not None:
            self._thread.join()

    def abandon(self) -> int:
        """Whoever waits for a job gets ThreadAbandoned. How many jobs it was; what runs cannot be stopped. A thread without
        jobs goes on."""
        with self._lock:
            given_up = [future for future in list(self._waiting) if not future.done()]
            if given_up and not self._ended:
                self._ended = True
                self._jobs.put(None)
        for future in given_up:
            with contextlib.suppress(InvalidStateError):  # it has just ended
                future.set_exception(ThreadAbandoned(f"{self._name} does not answer"))
        return len(given_up)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # and with it, whatever memory it looked at
