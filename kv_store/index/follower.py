"""Follower: follows what all owners publish, without publishing anything itself.

Used as `async with Follower(settings) as follower`, then `async for change in follower.changes()`. It reads each life's stream; where an
event is missing (a stream is trimmed, a server loses data) or cannot be read, it reads the owner's addresses anew and says so
with "resynced". So what it says of an owner, taken together, is always what the owner has published, a moment late.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import msgspec
from redis.exceptions import RedisError

from kv_store.index.events import MAX_EVENT_BYTES, IndexEvent, decode_event
from kv_store.index.keys import NUM_SHARDS, Keyspace
from kv_store.index.members import Member
from kv_store.index.membership import Membership
from kv_store.index.scripts import EVENTS
from kv_store.index.seal import Seal
from kv_store.index.server import UNREACHABLE, OddServer, RedisServer, cause_of
from kv_store.index.settings import IndexSettings
from kv_store.index.state import IndexCounters
from protocol.block_hash import HASH_BYTES
from runtime.clock import MonotonicClock

POLL_EVERY_S = 0.2
EVENTS_AT_ONCE = 64
SCANNED_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to an owner's entries. Chunks are named by the address of their last block. "resynced": `stored` is all
    that it has, and `removed` what it had before and has no more."""

    member: Member
    kind: Literal["joined", "left", "changed", "resynced"]
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


@dataclass(slots=True)
class _Followed:
    member: Member
    last_id: bytes = b"0-0"
    next_event: int | None = 0
    addresses: set[bytes] = field(default_factory=set)


class Follower:
    def __init__(self, settings: IndexSettings, poll_every_s: float = POLL_EVERY_S) -> None:
        self._keys = Keyspace(settings.namespace)
        self._server = RedisServer(settings)
        self._poll_every_s = poll_every_s
        self._counters = IndexCounters()
        seal = Seal(settings.cluster_key, settings.namespace)
        self._membership = Membership(self._keys, seal, MonotonicClock(), self._counters)
        self._followed: dict[int, _Followed] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.close()

    def addresses(self, worker_id: str) -> frozenset[bytes]:
        """The chunks that an owner has published, as far as they have been read."""
        found = [followed for followed in self._followed.values() if followed.member.worker_id == worker_id]
        return frozenset(found[-1].addresses) if found else frozenset()

    async def changes(self) -> AsyncIterator[Change]:
        """All that happens from now on, after "joined" and "resynced" of every owner that is there. Raises one of
        server.UNREACHABLE when the server does not answer; may be called again then."""
        while True:
            for change in await self.poll():
                yield change
            await asyncio.sleep(self._poll_every_s)

    async def poll(self) -> list[Change]:
        """What has happened since the last time. Raises like `changes`."""
        try:
            return await self._poll()
        except UNREACHABLE:
            raise
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise OddServer(f"it answers what no server would: {cause_of(error)}") from error

    async def _poll(self) -> list[Change]:
        await self._membership.refresh(self._server)
        present = self._membership.by_life
        changes = [
            Change(self._followed.pop(life).member, "left") for life in list(self._followed) if life not in present
        ]
        for life, member in present.items():
            followed = self._followed.get(life)
            if followed is None:
                followed = self._followed[life] = _Followed(member, next_event=None)
                changes.append(Change(member, "joined"))
                changes.append(await self._resync(life, followed))
            changes += await self._follow(life, followed)
        return changes

    async def _follow(self, life: int, followed: _Followed) -> list[Change]:
        changes = []
        while entries := await self._read(life, followed.last_id):
            for entry_id, body in entries:
                followed.last_id = entry_id
                event = _decode(body)
                if event is None or followed.next_event not in (None, event.number):
                    changes.append(await self._resync(life, followed))
                    break
                followed.next_event = event.number + 1
                if event.stored or event.removed:
                    changes.append(_apply(followed, event))
        return changes

    async def _read(self, life: int, after: bytes) -> list[tuple[bytes, bytes]]:
        call = EVENTS.call([self._keys.events(life)], [b"(" + after, EVENTS_AT_ONCE, MAX_EVENT_BYTES])
        (reply,) = await self._server.run([call])
        if isinstance(reply, RedisError):
            raise reply
        return [(bytes(entry_id), bytes(body)) for entry_id, body in reply]

    async def _resync(self, life: int, followed: _Followed) -> Change:
        """Events that come while the addresses are read are followed afterwards: they change nothing that is there already."""
        (last,) = await self._server.run([("XREVRANGE", self._keys.events(life), "+", "-", "COUNT", 1)])
        followed.last_id = last[0][0] if isinstance(last, list) and last else b"0-0"
        followed.next_event = None
        found: set[bytes] = set()
        owner = self._membership.owner(life)
        for shard in range(NUM_SHARDS):
            for bucket in range(owner.num_buckets if owner is not None else 0):
                found.update(await self._scan(self._keys.bucket(shard, life, bucket)))
        removed, followed.addresses = followed.addresses - found, found
        return Change(followed.member, "resynced", tuple(sorted(found)), tuple(sorted(removed)))

    async def _scan(self, bucket: bytes) -> Sequence[bytes]:
        found: list[bytes] = []
        cursor: bytes | int = 0
        while True:
            (reply,) = await self._server.run([("SSCAN", bucket, cursor, "COUNT", SCANNED_AT_ONCE)])
            if isinstance(reply, RedisError):
                return found
            cursor, members = reply
            found += [member for member in members if len(member) == HASH_BYTES]
            if not int(cursor):
                return found


def _decode(body: bytes) -> IndexEvent | None:
    try:
        return decode_event(body)
    except msgspec.MsgspecError:
        return None


def _apply(followed: _Followed, event: IndexEvent) -> Change:
    followed.addresses.update(event.stored)
    followed.addresses.difference_update(event.removed)
    return Change(followed.member, "changed", event.stored, event.removed)
