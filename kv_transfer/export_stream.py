"""What the reader of an export gets to hear: its frames, from the first block that it lacks to the end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from kv_transfer.export import Export
from protocol.transfer import BlocksReady, HandoffMessage
from protocol.wire import encode_frame
from runtime.clock import Clock


async def tell(export: Export, cursor: int, clock: Clock, sign_of_life_s: float) -> AsyncIterator[bytes]:
    """Announcements from block `cursor` on, as they come, and then the end: of the hand-off, or of the export.

    With nothing to say it says so, by an empty announcement every `sign_of_life_s` seconds. A push that is under way when
    the export ends is waited for as long, so that the reader need not ask after it.
    """
    while True:
        if export.ended and export.writing:
            await _written_within(export, sign_of_life_s)
        export.changed.clear()
        news = _news(export, cursor, clock.now())
        if news:
            yield b"".join(map(encode_frame, news))
            if not isinstance(news[-1], BlocksReady):
                return
            cursor += sum(len(ready.block_ids) for ready in news if isinstance(ready, BlocksReady))
        elif export.ended:
            return
        elif not await _set_within(export.changed, sign_of_life_s):
            yield encode_frame(BlocksReady(cursor, (), ()))


def _news(export: Export, cursor: int, now: float) -> list[HandoffMessage]:
    """All that there is to say, to be sent in one write: each write wakes the reader once."""
    news: list[HandoffMessage] = []
    while (message := export.next_message(cursor, now)) is not None:
        news.append(message)
        if not isinstance(message, BlocksReady):
            break
        cursor += len(message.block_ids)
    return news


async def _written_within(export: Export, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while export.writing:
                export.changed.clear()
                await export.changed.wait()


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
