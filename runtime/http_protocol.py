"""BoundedHttpProtocol: uvicorn's HTTP/1.1 protocol, with an end to how large a request's head may be and how slow.

The parser gathers a header for as long as one is sent, so without a bound every open connection can take all memory; and
a connection that never sends a whole head would be held for ever.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 128 * 1024
"""Request line and headers together. Checked after each read, so one read more may have been taken."""

HEAD_TIMEOUT_S = 10.0
"""From the first byte of a head to its last."""

FIRST_BYTE_TIMEOUT_S = 30.0
"""From the connection, or from bytes between requests that begin none, to the first byte of a head. A connection that idles
after a response has uvicorn's keep-alive timeout instead."""


class BoundedHttpProtocol(HttpToolsProtocol):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = False
        self._head_bytes = 0
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._wait(FIRST_BYTE_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        self._wait(HEAD_TIMEOUT_S)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head:
            if self._patience is None and self._is_idle and self.timeout_keep_alive_task is None:
                self._wait(FIRST_BYTE_TIMEOUT_S)  # these bytes ended the keep-alive timeout, and began nothing
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    @property
    def _is_idle(self) -> bool:
        """No response is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self, timeout_s: float) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        """The head of a request that is sent ahead may wait for the response before it."""
        if self._is_idle:
            self.transport.close()
        else:
            self._wait(HEAD_TIMEOUT_S)
