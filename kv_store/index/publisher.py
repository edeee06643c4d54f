"""Publisher: keeps one owner's entries in the index as its store is.

    unregistered ──register──▶ registered ──record lost, other server──▶ unregistered
                                    │
                                    └──another process has our id──▶ superseded, until that one's record is gone

It never writes what it was told but what is true when it writes: news marks chunks, `flush` compares what is held of the
marked ones with what it last wrote and writes the difference. Every write carries the life it was registered under, and the
server refuses it under any other.
"""

import asyncio
import struct
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from redis.exceptions import RedisError

from kv_store.index.chunk_book import ChunkBook
from kv_store.index.events import IndexEvent
from kv_store.index.keys import NUM_SHARDS, Keyspace, shard_of
from kv_store.index.members import Owner
from kv_store.index.membership import MAX_RECORD_BYTES, RECORD, fence, record
from kv_store.index.places import Chunk, pack
from kv_store.index.scripts import ALLOT, ANNOUNCE, BEAT, FENCE_OFF, PUBLISH, SUPERSEDED, WRITTEN
from kv_store.index.seal import Seal
from kv_store.index.server import Command, RedisServer, Reply
from kv_store.index.state import IndexCounters

FLUSH_CHUNKS = 512
TAKEN_AT_ONCE = 32
"""Between turns of the event loop: working out a chunk takes tens of microseconds."""

SCRIPT_CHUNKS = 64
"""Per script, so that none keeps the server from its other clients for more than a fraction of the budget of a request."""

KEPT_EVENTS = 4096
_UNKNOWN: Final = object()
"""Of an entry that was being written when the connection failed: unlike anything that can be held."""


class Publisher:
    """On one event loop, one call at a time. All of its calls raise like RedisServer.run, and ResponseError where the server
    refuses a command; what was not written stays marked."""

    def __init__(
        self,
        keys: Keyspace,
        owner: Owner,
        seal: Seal,
        book: ChunkBook,
        counters: IndexCounters,
        record_ttl_s: float,
    ) -> None:
        self._keys = keys
        self._seal = seal
        self._owner = owner
        self._book = book
        self._counters = counters
        self._ttl_ms = round(1000 * record_ttl_s)
        self._life: int | None = None
        self._published: dict[bytes, object] = {}
        self._next_event = 0
        self._fenced = False

    @property
    def life(self) -> int | None:
        """None while unregistered or superseded."""
        return self._life

    @property
    def entry(self) -> tuple[int, bytes] | None:
        """What stands in the hash of lives while we are registered."""
        return None if self._life is None else (self._life, self._seal.close(self._life, self._owner))

    @property
    def fenced(self) -> bool:
        """The last write was refused because another process has this worker's id."""
        return self._fenced

    @property
    def num_entries(self) -> int:
        return len(self._published)

    def published(self, address: bytes) -> Chunk | None:
        """What was last written of this chunk, as far as that is known."""
        found = self._published.get(address)
        return found if isinstance(found, Chunk) else None

    def has_written(self, address: bytes) -> bool:
        return address in self._published

    @property
    def addresses(self) -> Sequence[bytes]:
        return list(self._published)

    async def register(self, server: RedisServer) -> None:
        """A new life, which takes the place of any other of this worker. Whatever is held is to be published anew."""
        self._life = None
        self._book.mark(self._published)
        self._published.clear()
        (life,) = await _run(server, [ALLOT.call([self._keys.life, self._keys.lives], [])])
        text = record(life, self._owner.incarnation, self._book.num_blocks)
        keys = [self._keys.record(shard, self._owner.worker_id) for shard in range(NUM_SHARDS)]
        await _run(server, [("SET", key, text, "PX", self._ttl_ms) for key in keys])
        await _run(server, [("HSET", self._keys.lives, life, self._seal.close(life, self._owner))])  # now a member
        self._life, self._next_event, self._fenced = life, 0, False
        self._counters.registrations += 1
        await self._announce(server, IndexEvent(number=self._take_number(), cleared=True))

    async def beat(self, server: RedisServer) -> None:
        """Say that we live. Where that finds another life, or none, we are not registered any more."""
        if self._life is None:
            return
        arguments: list[bytes | int] = [
            self._fence,
            record(self._life, self._owner.incarnation, self._book.num_blocks),
            self._ttl_ms,
        ]
        replies = await _run(
            server,
            [BEAT.call([self._keys.record(shard, self._owner.worker_id)], arguments) for shard in range(NUM_SHARDS)],
        )
        self._mind([reply[0] for reply in replies])

    async def superseded(self, server: RedisServer) -> bool:
        """Whether a process with our id, other than this one, has a record at present: one that expires, as all do."""
        key = self._keys.record(0, self._owner.worker_id)
        found, expires_in_ms = await server.run([("GETRANGE", key, 0, MAX_RECORD_BYTES), ("PTTL", key)])
        match = RECORD.fullmatch(found) if isinstance(found, bytes) else None
        if match is None or not isinstance(expires_in_ms, int) or expires_in_ms < 0:
            return False
        return bool(match[1].decode() != self._owner.incarnation)

    async def flush(self, server: RedisServer) -> bool:
        """Write what has changed of FLUSH_CHUNKS marked chunks at most. Whether there was anything to do."""
        if self._life is None:
            return False
        taken: dict[bytes, Chunk | None] = {}
        try:
            while len(taken) < FLUSH_CHUNKS and (slice_ := self._book.take_marked(TAKEN_AT_ONCE)):
                taken |= slice_
                await asyncio.sleep(0)
        except BaseException:
            self._book.mark(taken)
            raise
        changes = {address: chunk for address, chunk in taken.items() if self._published.get(address) != chunk}
        if not changes:
            return bool(taken)
        self._published.update(dict.fromkeys(changes, _UNKNOWN))
        try:
            replies = await _run(server, self._commands(changes))
        except BaseException:
            self._book.mark(changes)
            raise
        if not self._mind([reply[0] for reply in replies]):
            self._book.mark(changes)
            return False
        self._counters.crowded += sum(reply[1] for reply in replies)
        self._note(changes)
        stored = tuple(address for address, chunk in changes.items() if chunk is not None)
        removed = tuple(address for address, chunk in changes.items() if chunk is None)
        await self._announce(server, IndexEvent(number=self._take_number(), stored=stored, removed=removed))
        return True

    def forget(self, addresses: Sequence[bytes]) -> None:
        """Have these written anew: the index does not have them as they should be."""
        known = [address for address in addresses if address in self._published]
        self._published.update(dict.fromkeys(known, _UNKNOWN))
        self._book.mark(known)

    def forget_strangers(self, addresses: Sequence[bytes]) -> None:
        """Entries that the index has of us and that we have not written: have them withdrawn, or written as they should be."""
        self._published.update(dict.fromkeys(addresses, _UNKNOWN))
        self._book.mark(addresses)

    async def leave(self, server: RedisServer) -> None:
        """Void at once, instead of when the record expires."""
        if self._life is None:
            return
        mark, self._life = self._fence, None
        await _run(
            server,
            [FENCE_OFF.call([self._keys.record(shard, self._owner.worker_id)], [mark]) for shard in range(NUM_SHARDS)],
        )

    def retire(self) -> None:
        """The server may be another one, or have lost its data."""
        self._life = None

    @property
    def _fence(self) -> bytes:
        assert self._life is not None
        return fence(self._life, self._owner.incarnation)

    def _commands(self, changes: Mapping[bytes, Chunk | None]) -> list[Command]:
        assert self._life is not None
        life = self._life
        by_shard: dict[int, list[bytes]] = {}
        for address in changes:
            by_shard.setdefault(shard_of(address), []).append(address)
        commands = []
        for shard, addresses in by_shard.items():
            for start in range(0, len(addresses), SCRIPT_CHUNKS):
                keys = [self._keys.record(shard, self._owner.worker_id)]
                arguments: list[bytes | int] = [self._fence, struct.pack("<I", life)]
                for address in addresses[start : start + SCRIPT_CHUNKS]:
                    chunk = changes[address]
                    keys.append(self._keys.entry(address))
                    keys.append(self._keys.bucket_of(address, life, self._owner.num_buckets))
                    arguments.append(b"" if chunk is None else pack(life, chunk))
                commands.append(PUBLISH.call(keys, arguments))
        return commands

    def _note(self, changes: Mapping[bytes, Chunk | None]) -> None:
        for address, chunk in changes.items():
            if chunk is None:
                del self._published[address]
                self._counters.withdrawn += 1
            else:
                self._published[address] = chunk
                self._counters.published += 1

    def _mind(self, outcomes: Sequence[int]) -> bool:
        """Whether all were written; else we are not registered any more."""
        if all(outcome == WRITTEN for outcome in outcomes):
            return True
        self._fenced = SUPERSEDED in outcomes
        self._counters.fenced += self._fenced
        self._life = None
        return False

    def _take_number(self) -> int:
        """Taken before it is sent: an event that may have been lost leaves a gap, which readers see."""
        number, self._next_event = self._next_event, self._next_event + 1
        return number

    async def _announce(self, server: RedisServer, event: IndexEvent) -> None:
        if self._life is None:
            return
        keys = [self._keys.record(0, self._owner.worker_id), self._keys.events(self._life)]
        (reply,) = await _run(server, [ANNOUNCE.call(keys, [self._fence, KEPT_EVENTS, msgspec.msgpack.encode(event)])])
        self._mind(reply)


async def _run(server: RedisServer, commands: Sequence[Command]) -> list[Reply]:
    """Like RedisServer.run; raises the first error that a command was answered with."""
    replies = await server.run(commands)
    for reply in replies:
        if isinstance(reply, RedisError):
            raise reply
    return replies
