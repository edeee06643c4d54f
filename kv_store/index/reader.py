"""EntryReader: reads the entries of a chain, for requests.

All requests share one connection, which a task of its own serves: what is asked while a reply is on its way goes out together,
in the next round trip, a Flight. So a request that gives up waiting breaks no connection.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from redis.exceptions import RedisError

from kv_store.index.flight import Flight
from kv_store.index.keys import Keyspace, shard_of
from kv_store.index.places import MAX_VALUE_BYTES
from kv_store.index.scripts import FETCH
from kv_store.index.server import UNREACHABLE, Command, OddServer, RedisServer, Reply, cause_of
from runtime.clock import Clock

log = logging.getLogger(__name__)

MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class _Question:
    addresses: Sequence[bytes]
    answer: asyncio.Future[list[bytes]]


class EntryReader:
    """`run` must be running for `read` to be answered."""

    def __init__(self, server: RedisServer, keys: Keyspace, clock: Clock) -> None:
        self._server = server
        self._keys = keys
        self._clock = clock
        self._flight: Flight | None = None
        self._questions: list[_Question] = []
        self._asked = asyncio.Event()
        self._last_odd = ""

    @property
    def flight(self) -> Flight | None:
        """What the server is being asked; everything else waits for it."""
        return self._flight

    def read(self, addresses: Sequence[bytes]) -> asyncio.Future[list[bytes]]:
        """The values of these entries as far as the first that is missing (in a cluster, maybe some more; a missing one
        is b""). Fails with one of UNREACHABLE. Cancel it when it is not wanted any more."""
        question = _Question(addresses, asyncio.get_running_loop().create_future())
        self._questions.append(question)
        self._asked.set()
        return question.answer

    async def run(self) -> None:
        """Serve, until cancelled. Nothing that the server answers ends it."""
        try:
            while True:
                await self._asked.wait()
                questions = [question for question in self._questions[:MAX_BATCH] if not question.answer.done()]
                del self._questions[:MAX_BATCH]
                if not self._questions:
                    self._asked.clear()
                if questions:
                    await self._serve_or_fail(questions)
        finally:
            for question in self._questions:
                question.answer.cancel()

    async def _serve_or_fail(self, questions: Sequence[_Question]) -> None:
        try:
            await self._serve(questions)
        except Exception as error:  # a reply is untrusted: whoever wrote it may break any step with it
            cause = cause_of(error)
            if cause != self._last_odd and not isinstance(error, UNREACHABLE):
                log.warning("the index server answers what no server would", exc_info=error)
            self._last_odd = cause
            _fail(questions, error if isinstance(error, UNREACHABLE) else OddServer(cause))

    async def _serve(self, questions: Sequence[_Question]) -> None:
        commands: list[Command] = []
        shares: list[list[list[int]]] = []
        for question in questions:
            share = self._shares(question.addresses)
            shares.append(share)
            commands += [self._command(question.addresses, indices, len(share) == 1) for indices in share]
        try:
            with Flight(self._clock) as self._flight:
                replies = iter(await self._server.run(commands, self._flight.opened))
        finally:
            self._flight = None
        for question, share in zip(questions, shares, strict=True):
            values, refused = _assemble(len(question.addresses), [(indices, next(replies)) for indices in share])
            if question.answer.done():
                continue
            if refused is not None:
                question.answer.set_exception(refused)
            else:
                question.answer.set_result(values)

    def _shares(self, addresses: Sequence[bytes]) -> list[list[int]]:
        """Which of them are asked for together: all, or in a cluster those of one shard."""
        if not self._server.clustered:
            return [list(range(len(addresses)))]
        shares: dict[int, list[int]] = {}
        for index, address in enumerate(addresses):
            shares.setdefault(shard_of(address), []).append(index)
        return list(shares.values())

    def _command(self, addresses: Sequence[bytes], indices: Sequence[int], alone: bool) -> Command:
        keys = [self._keys.entry(addresses[index]) for index in indices]
        return FETCH.call(keys, [MAX_VALUE_BYTES, int(alone)])


def _fail(questions: Sequence[_Question], error: BaseException) -> None:
    for question in questions:
        if not question.answer.done():
            question.answer.set_exception(error)


def _assemble(
    num_addresses: int, parts: Sequence[tuple[Sequence[int], Reply]]
) -> tuple[list[bytes], RedisError | None]:
    values = [b""] * num_addresses
    for indices, reply in parts:
        if isinstance(reply, RedisError):
            return [], reply
        for index, value in zip(indices, reply, strict=False):
            if not isinstance(value, bytes):
                raise OddServer("an entry that is no text")
            values[index] = value
    return values, None
