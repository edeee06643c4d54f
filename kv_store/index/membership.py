"""Membership: which owners are alive, as read from the index every second or so, and which dead ones are still to be swept.

An owner is alive while its record names its life. Everything read is a claim of whoever can write to the server: what cannot
be an Owner is counted and left out, and one that does not have this cluster's seal is a stranger: never a member, never swept for.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import chain, islice

import msgspec
from redis.exceptions import RedisError

from kv_store.index.keys import Keyspace
from kv_store.index.members import MAX_OWNER_BYTES, Life, Member, Owner
from kv_store.index.scripts import FETCH, LIVES
from kv_store.index.seal import Seal
from kv_store.index.server import RedisServer
from kv_store.index.state import IndexCounters
from protocol.ids import Incarnation, WorkerId
from runtime.clock import Clock

MAX_LIVES = 4096
MAX_WANTED = 1024
PRUNED_AT_ONCE = 512
"""A second or so. More than a few thousand lives are not there by themselves: the dead are swept."""

MAX_RECORD_BYTES = 256
RECORD = re.compile(rb"\d{1,10} ([A-Za-z0-9._:-]{1,128})\n\d{1,12}")
"""Whole: life, incarnation, blocks in use."""


def fence(life: int, incarnation: str) -> bytes:
    """How the record of a life begins."""
    return b"%d %s\n" % (life, incarnation.encode())


def record(life: int, incarnation: str, used_blocks: int) -> bytes:
    return fence(life, incarnation) + b"%d" % used_blocks


class Membership:
    """On one event loop. What it has read stays until the next `refresh`, also while the server is away."""

    def __init__(self, keys: Keyspace, seal: Seal, clock: Clock, counters: IndexCounters) -> None:
        self._keys = keys
        self._seal = seal
        self._clock = clock
        self._counters = counters
        self._by_life: dict[int, Member] = {}
        self._owners: dict[int, Owner] = {}
        self._dead: dict[int, Owner] = {}
        self._dead_since: dict[int, float] = {}
        self.num_strangers = 0
        """At the last look."""

    @property
    def by_life(self) -> Mapping[int, Member]:
        return self._by_life

    def members(self) -> tuple[Member, ...]:
        return tuple(sorted(self._by_life.values(), key=lambda member: member.worker_id))

    def owner(self, life: int) -> Owner | None:
        """Whose life this is, or was, as far as that is believed."""
        return self._owners.get(life)

    @property
    def num_dead(self) -> int:
        return len(self._dead)

    def dead_for(self, seconds: float) -> dict[int, Owner]:
        """Lives that have been over for so long, as far as this process has seen: one that is just being registered has
        no record for a moment."""
        now = self._clock.now()
        return {life: owner for life, owner in self._dead.items() if now - self._dead_since[life] >= seconds}

    def swept(self, life: int) -> None:
        self._dead.pop(life, None)
        self._dead_since.pop(life, None)

    async def refresh(self, server: RedisServer, mine: tuple[int, bytes] | None = None) -> bool:
        """Whether `mine`, this process's own life and owner, is there as it was written. Raises like RedisServer.run."""
        wanted = list(islice(self._by_life, MAX_WANTED)) + ([mine[0]] if mine else [])
        (reply,) = await server.run([LIVES.call([self._keys.lives], [MAX_LIVES, MAX_OWNER_BYTES, *wanted])])
        if isinstance(reply, RedisError):
            raise reply
        size, *items = reply
        found = dict(items)
        owners: dict[int, Owner] = {}
        strangers: dict[int, Owner] = {}
        garbage: list[bytes] = []
        for field, value in found.items():
            try:
                life = msgspec.convert(int(field), Life)
                opened = self._seal.open(life, value)
            except (ValueError, msgspec.MsgspecError):
                self._counters.garbage += 1
                garbage.append(field)
                continue
            (owners if opened.believed else strangers)[life] = opened.owner
        records = await self._records(server, {owner.worker_id for owner in chain(owners.values(), strangers.values())})
        self._take(owners, records)
        self.num_strangers = len(strangers)
        if size > MAX_LIVES:
            own = None if mine is None else mine[0]
            dead = (
                life
                for life, owner in chain(strangers.items(), owners.items())
                if life != own and not _is_alive(life, owner, records)
            )
            await self._prune(server, chain(garbage, dead))
        return mine is None or found.get(b"%d" % mine[0]) == mine[1]

    async def _records(self, server: RedisServer, workers: Iterable[str]) -> dict[str, bytes]:
        names = sorted(workers)
        if not names:
            return {}
        keys = [self._keys.record(0, name) for name in names]
        (values,) = await server.run([FETCH.call(keys, [MAX_RECORD_BYTES - 1, 0])])
        if isinstance(values, RedisError):
            raise values
        return dict(zip(names, values, strict=False))

    async def _prune(self, server: RedisServer, lives: Iterable[int | bytes]) -> None:
        """Of a hash that somebody fills: a life is written there after its record, so without one it is nobody's."""
        names = list(islice(lives, PRUNED_AT_ONCE))
        if names:
            (reply,) = await server.run([("HDEL", self._keys.lives, *names)])
            self._counters.pruned += reply if isinstance(reply, int) else 0

    def _take(self, owners: Mapping[int, Owner], records: Mapping[str, bytes]) -> None:
        alive: dict[int, Member] = {}
        dead: dict[int, Owner] = {}
        for life, owner in owners.items():
            if _is_alive(life, owner, records):
                used = records[owner.worker_id][len(fence(life, owner.incarnation)) :]
                alive[life] = _member(life, owner, used)
            else:
                dead[life] = owner
        self._by_life, self._dead, self._owners = alive, dead, dict(owners)
        self._dead_since = {life: self._dead_since.get(life, self._clock.now()) for life in dead}


def _is_alive(life: int, owner: Owner, records: Mapping[str, bytes]) -> bool:
    return records.get(owner.worker_id, b"").startswith(fence(life, owner.incarnation))


def _member(life: int, owner: Owner, used: bytes) -> Member:
    return Member(
        worker_id=WorkerId(owner.worker_id),
        incarnation=Incarnation(owner.incarnation),
        life=life,
        role=owner.role,
        control_url=owner.control_url,
        fingerprint=owner.fingerprint,
        capacity_blocks=owner.capacity_blocks,
        used_blocks=int(used) if used.isdigit() and len(used) <= 12 else 0,
    )
