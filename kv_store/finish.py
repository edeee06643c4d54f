"""What a thread has begun is waited for, also by who has been cancelled: until it ends, bytes may land."""

import asyncio
from typing import TypeVar

T = TypeVar("T")


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
