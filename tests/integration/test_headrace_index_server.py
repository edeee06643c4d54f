"""The index's own server comes back at the same address when it dies, and leaves nothing behind."""

import asyncio
import os
import signal
from pathlib import Path

from headrace.index_server import IndexServer
from headrace.status_view import LineView
from kv_store.index.embedded import EmbeddedServer


async def answers(path: str) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def test_it_comes_back_at_the_same_address() -> None:
    async with IndexServer(LineView()) as index:
        path, first = index.url.removeprefix("unix://"), index._server
        assert isinstance(first, EmbeddedServer)
        os.kill(first.pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            while index._server is first or index._server is None or not await answers(path):
                await asyncio.sleep(0.02)
        assert index.url == f"unix://{path}"
    assert not Path(path).parent.exists()
