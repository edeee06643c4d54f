"""Quarantine: blocks that nobody may use before the transfer that was given up on them has ended. Event loop only.

One per process that initiates transfers. What never settles stays here until the process ends, and is counted.
"""

import asyncio
from collections.abc import Callable


class Quarantine:
    """`tasks` is the group that the waiting runs in; close this before it."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._held: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Transfers that have not settled."""
        return len(self._held)

    def hold(self, settled: asyncio.Event, release: Callable[[], None]) -> None:
        """Call `release` when `settled` is set; not at all if that does not happen before the close."""
        task = self._tasks.create_task(_release_after(settled, release), name="kv-quarantine")
        self._held.add(task)
        task.add_done_callback(self._held.discard)

    def close(self) -> None:
        for task in self._held:
            task.cancel()


async def _release_after(settled: asyncio.Event, release: Callable[[], None]) -> None:
    await settled.wait()
    release()
