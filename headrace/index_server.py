"""IndexServer: the index's own server, kept running beside a cluster's processes.

Used as `async with`; `url` stays the same when the server dies and is started again, and the nodes find it there and fill it
anew. It ends with this process, however that ends.
"""

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from headrace.status_view import StatusView
from kv_store.index.embedded import EmbeddedServer
from protocol.errors import ConfigError

NAME = "index"
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 15.0


class IndexServer:
    """Raises ConfigError where the server is missing or does not start for the first time."""

    def __init__(self, view: StatusView) -> None:
        self._view = view
        self._stack = AsyncExitStack()
        self._folder: Path | None = None
        self._server: EmbeddedServer | None = None
        self.url = ""

    async def __aenter__(self) -> Self:
        self._view.update(NAME, "starting")
        async with AsyncExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-index-")))
            self._server = await EmbeddedServer(folder=self._folder).__aenter__()
            self.url = self._server.url
            keeping = asyncio.create_task(self._keep(), name="keep:index")
            stack.push_async_callback(_end, keeping)
            self._stack = stack.pop_all()
        self._view.update(NAME, "ready", self.url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        self._view.update(NAME, "ended")

    async def _keep(self) -> None:
        pause_s = FIRST_PAUSE_S
        try:
            while True:
                if self._server is not None:
                    await self._server.wait()
                    await self._leave()
                self._view.update(NAME, "died", f"starting again in {pause_s:g} s; requests go on without it")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                try:
                    self._server = await EmbeddedServer(folder=self._folder).__aenter__()
                except ConfigError as error:
                    self._view.say(f"{NAME} | {error.message}")
                else:
                    self._view.update(NAME, "ready", self.url)
        finally:
            await self._leave()

    async def _leave(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.__aexit__(None, None, None)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
