"""Server-sent events: a generation's deltas as a stream of `data:` lines, each written as soon as there is something to say.

Headers go out with the first delta, so that a request that fails before it gets a proper status. While a client reads
slowly, deltas gather and leave in fewer, larger events.
"""

from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType
from starlette.types import Send

from protocol.errors import Cancelled, HeadraceError
from router.api_errors import error_body
from router.api_responses import Usage
from router.generation import Generation
from router.openai_format import AnswerFormat, make_usage
from router.progress import Progress

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class UsageOptions:
    """`at_end`: one more chunk with the usage and no choices. `always`: the usage so far in every chunk."""

    at_end: bool
    always: bool


class EventStream:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False

    async def write(
        self, generation: Generation, answer: AnswerFormat, usage: UsageOptions, progress: Progress
    ) -> None:
        """The whole response. Raises HeadraceError only before the first byte; later ones become an event."""
        try:
            async with aclosing(generation.deltas()) as batches:
                async for deltas in batches:
                    shown = _shown_usage(generation, usage)
                    events = [_event(chunk) for delta in deltas for chunk in answer.chunks(delta, shown)]
                    if events:
                        await self._put(b"".join(events))
                    for delta in deltas:
                        progress.sent(delta)
        except HeadraceError as error:
            if not self._started or isinstance(error, Cancelled):
                raise
            progress.failed(error)
            await self._put(_event(error_body(error)) + DONE, last=True)
            return
        tail = _event(answer.usage_chunk(_usage_so_far(generation))) + DONE if usage.at_end else DONE
        await self._put(tail, last=True)

    async def _put(self, body: bytes, *, last: bool = False) -> None:
        try:
            if not self._started:
                self._started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})
        except OSError as error:
            raise Cancelled("the client has gone") from error


def _shown_usage(generation: Generation, usage: UsageOptions) -> Usage | UnsetType | None:
    if usage.always:
        return _usage_so_far(generation)
    return None if usage.at_end else UNSET


def _usage_so_far(generation: Generation) -> Usage:
    return make_usage(generation.num_prompt_tokens, generation.num_output_tokens, generation.num_cached_tokens)


def _event(chunk: object) -> bytes:
    return b"data: " + _encoder.encode(chunk) + b"\n\n"
