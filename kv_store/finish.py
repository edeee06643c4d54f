"""What a thread has begun is waited for, also by who has been cancelled: until it ends, bytes may land."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")

ABANDON_ROUNDS = 4
ABANDONED_WITHIN_S = 0.5


def _nothing() -> None:
    """A last job."""


async def finish(future: asyncio.Future[T]) -> T:
    """Its result, or what it raises. A cancel is heard when it has ended, and not before."""
    cancel: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancel = error
    if cancel is not None:
        if not future.cancelled():
            future.exception()  # nobody else will look at it
        raise cancel
    return future.result()


async def end(thread: Executor, last: Callable[[], None] = _nothing) -> None:
    """Of one thread: when what it was asked for is done, and then `last`. Returns at once if it was abandoned."""
    with contextlib.suppress(RuntimeError):
        await finish(asyncio.get_running_loop().run_in_executor(thread, last))
    thread.shutdown(wait=False)


async def finish_or_abandon(work: asyncio.Task[None], timeout_s: float, abandon: Callable[[], int]) -> int:
    """Wait so long for it to end, then for as long as it takes to end when what it waits for is abandoned. How many jobs were.
    Raises what `work` does."""
    num_jobs = 0
    await asyncio.wait((work,), timeout=timeout_s)
    for _ in range(ABANDON_ROUNDS):
        if work.done():
            break
        num_jobs += abandon()  # which may lead to a next job, that hangs as well
        await asyncio.wait((work,), timeout=ABANDONED_WITHIN_S)
    work.cancel()
    if work.done():
        work.result()
    return num_jobs
