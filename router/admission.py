"""Admission: how many prompt tokens may wait for their first output token. Counted in tokens, because that is what makes
the others wait."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.errors import Draining, Overloaded

RETRY_AFTER_S = 1.0


class Held:
    """One request's share of the queue, until its prompt is computed."""

    def __init__(self, admission: "Admission", num_tokens: int) -> None:
        self._admission = admission
        self._num_tokens = num_tokens

    def release(self) -> None:
        """Idempotent."""
        self._admission.queued_tokens -= self._num_tokens
        self._num_tokens = 0


class Admission:
    def __init__(self, max_queued_tokens: int) -> None:
        self._max_queued_tokens = max_queued_tokens
        self.queued_tokens = 0
        self.num_requests = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self) -> None:
        """Let nothing more in. Returns when the last request is over."""
        self.draining = True
        await self._idle.wait()

    @contextmanager
    def hold(self, num_tokens: int) -> Iterator[Held]:
        """Raises Draining once the process drains, and Overloaded while the queue is full. A request larger than the
        whole queue is let in when it is empty."""
        if self.draining:
            raise Draining("the router is shutting down and takes no new requests")
        if self.queued_tokens and self.queued_tokens + num_tokens > self._max_queued_tokens:
            raise Overloaded(
                f"{self.queued_tokens} prompt tokens wait already, more than {self._max_queued_tokens} are not queued",
                param="max_queued_tokens",
                retry_after_s=RETRY_AFTER_S,
            )
        held = Held(self, num_tokens)
        self.queued_tokens += num_tokens
        self.num_requests += 1
        self._idle.clear()
        try:
            yield held
        finally:
            held.release()
            self.num_requests -= 1
            if not self.num_requests:
                self._idle.set()
