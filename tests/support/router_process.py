"""A router inside the test's own event loop, with real sockets on loopback."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from router.config import RouterConfig
from router.main import serve
from router.prompts import TextModel
from runtime.life import ProcessLife


@dataclass(frozen=True)
class RunningRouter:
    url: str
    control_url: str
    life: ProcessLife
    served: asyncio.Task[None]


@asynccontextmanager
async def running_router(model: TextModel, **settings: object) -> AsyncIterator[RunningRouter]:
    config = RouterConfig(port=0, control_port=0, heartbeat_interval_s=0.05, drain_timeout_s=5, **settings)  # type: ignore[arg-type]
    life = ProcessLife()
    urls: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
    served = asyncio.create_task(serve(config, model, life, urls.set_result))
    try:
        await asyncio.wait({served, urls}, return_when=asyncio.FIRST_COMPLETED)
        public, control = urls.result() if urls.done() else (served.result(), "")
        yield RunningRouter(str(public), control, life, served)
    finally:
        life.stop("the test is over")
        await served
