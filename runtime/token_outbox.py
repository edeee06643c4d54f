"""TokenOutbox: the node's side of the token streams, one per router.

The engine posts a step's messages; each connected router gets one frame with those of its requests. A stream is the
lease on its router's requests: when it ends (the router died, reads too slowly, or opened a newer one), `on_lost` is
called with the requests that were still running for it, and they are to be cancelled. Nothing is buffered for a router
without a stream beyond `grace_s`: a request that arrives just before its stream is open waits that long.

Used on one event loop only.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable

from protocol.errors import InvalidParameter, Overloaded
from protocol.ids import RequestId, RouterId
from protocol.tokens import SequenceFailed, SequenceFinished, TokenFrame, TokenMessage
from protocol.wire import encode_frame

MAX_BUFFERED_FRAMES = 4096
SIGN_OF_LIFE_S = 1.0

log = logging.getLogger(__name__)


class _Stream:
    """One router's connection: frames not yet taken by it."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.next_number = 0

    def push(self, messages: tuple[TokenMessage, ...]) -> None:
        self.frames.put_nowait(encode_frame(TokenFrame(self.next_number, messages)))
        self.next_number += 1

    def end(self) -> None:
        self.frames.put_nowait(None)


class TokenOutbox:
    def __init__(self, on_lost: Callable[[list[RequestId]], None]) -> None:
        self._on_lost = on_lost
        self._streams: dict[RouterId, _Stream] = {}
        self._router_of: dict[RequestId, RouterId] = {}

    @property
    def num_requests(self) -> int:
        return len(self._router_of)

    def expect(self, request_id: RequestId, router_id: RouterId) -> None:
        """Address a request's tokens. Raises Overloaded (retry at once) while that router has no stream open, and
        InvalidParameter, leaving it alone, for a request that is being served."""
        if request_id in self._router_of:
            raise InvalidParameter(f"request {request_id} is being served", param="request_id")
        if router_id not in self._streams:
            raise Overloaded(f"router {router_id} has no token stream open to this node", retry_after_s=0.05)
        self._router_of[request_id] = router_id

    def forget(self, request_id: RequestId) -> None:
        self._router_of.pop(request_id, None)

    def post(self, messages: Iterable[TokenMessage]) -> None:
        """Send one step's messages. Those of unknown requests (cancelled meanwhile) are dropped.

        A request is forgotten with its end or failure; one that goes on at another node is for the caller to forget.
        """
        by_router: dict[RouterId, list[TokenMessage]] = {}
        for message in messages:
            request_id = RequestId(message.request_id)
            router_id = self._router_of.get(request_id)
            if router_id is None:
                continue
            by_router.setdefault(router_id, []).append(message)
            if isinstance(message, SequenceFinished | SequenceFailed):
                del self._router_of[request_id]
        for router_id, own in by_router.items():
            stream = self._streams.get(router_id)
            if stream is None:
                continue
            stream.push(tuple(own))
            if stream.frames.qsize() > MAX_BUFFERED_FRAMES:
                log.warning("router %s does not read its tokens; closing its stream", router_id)
                self._close(router_id, stream)

    def open(self, router_id: RouterId) -> AsyncIterator[bytes]:
        """A new stream for a router. An older one of the same router ends, and its requests are lost."""
        older = self._streams.get(router_id)
        if older is not None:
            self._close(router_id, older)
        stream = self._streams[router_id] = _Stream()
        stream.push(())
        return self._frames(router_id, stream)

    def close(self) -> None:
        """End every stream, after what is buffered."""
        for router_id, stream in list(self._streams.items()):
            self._close(router_id, stream)

    async def _frames(self, router_id: RouterId, stream: _Stream) -> AsyncIterator[bytes]:
        try:
            while True:
                try:
                    async with asyncio.timeout(SIGN_OF_LIFE_S):
                        frame = await stream.frames.get()
                except TimeoutError:
                    stream.push(())
                    continue
                if frame is None:
                    return
                yield frame
        finally:
            self._close(router_id, stream)

    def _close(self, router_id: RouterId, stream: _Stream) -> None:
        if self._streams.get(router_id) is not stream:
            return
        del self._streams[router_id]
        stream.end()
        lost = [request_id for request_id, owner in self._router_of.items() if owner == router_id]
        for request_id in lost:
            del self._router_of[request_id]
        if lost:
            self._on_lost(lost)
