"""Membership: which owners are alive, as read from the index every second or so, and which dead ones are still to be swept.

An owner is alive while its record names its life. Everything read is a claim of whoever can write to the server: what cannot
be an Owner is counted and left out, control URLs are of the form that all of ours are.
"""

import re
from collections.abc import Mapping

import msgspec

from kv_store.index.keys import Keyspace
from kv_store.index.members import MAX_OWNER_BYTES, Life, Member, Owner
from kv_store.index.scripts import FETCH, LIVES
from kv_store.index.server import RedisServer, Reply
from kv_store.index.state import IndexCounters
from protocol.ids import Incarnation, WorkerId
from runtime.clock import Clock

MAX_LIVES = 4096
MAX_RECORD_BYTES = 256
RECORD = re.compile(rb"\d{1,10} ([A-Za-z0-9._:-]{1,128})\n\d{1,12}")
"""Whole: life, incarnation, blocks in use."""

_decode_owner = msgspec.msgpack.Decoder(Owner).decode


def fence(life: int, incarnation: str) -> bytes:
    """How the record of a life begins."""
    return b"%d %s\n" % (life, incarnation.encode())


def record(life: int, incarnation: str, used_blocks: int) -> bytes:
    return fence(life, incarnation) + b"%d" % used_blocks


class Membership:
    """On one event loop. What it has read stays until the next `refresh`, also while the server is away."""

    def __init__(self, keys: Keyspace, clock: Clock, counters: IndexCounters) -> None:
        self._keys = keys
        self._clock = clock
        self._counters = counters
        self._by_life: dict[int, Member] = {}
        self._owners: dict[int, Owner] = {}
        self._dead: dict[int, Owner] = {}
        self._dead_since: dict[int, float] = {}

    @property
    def by_life(self) -> Mapping[int, Member]:
        return self._by_life

    def members(self) -> tuple[Member, ...]:
        return tuple(sorted(self._by_life.values(), key=lambda member: member.worker_id))

    def owner(self, life: int) -> Owner | None:
        """Whose life this is, or was."""
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

    async def refresh(self, server: RedisServer) -> None:
        """Raises like RedisServer.run."""
        (reply,) = await server.run([LIVES.call([self._keys.lives], [MAX_LIVES, MAX_OWNER_BYTES])])
        owners = self._read(reply)
        workers = sorted({owner.worker_id for owner in owners.values()})
        records: dict[str, bytes] = {}
        if workers:
            keys = [self._keys.record(0, worker) for worker in workers]
            (values,) = await server.run([FETCH.call(keys, [MAX_RECORD_BYTES - 1, 0])])
            if isinstance(values, list):
                records = dict(zip(workers, values, strict=False))
        self._take(owners, records)

    def _read(self, reply: Reply) -> dict[int, Owner]:
        owners: dict[int, Owner] = {}
        for item in reply if isinstance(reply, list) else ():
            try:
                owners[msgspec.convert(int(item[0]), Life)] = _decode_owner(item[1])
            except (ValueError, msgspec.MsgspecError):
                self._counters.garbage += 1
        return owners

    def _take(self, owners: Mapping[int, Owner], records: Mapping[str, bytes]) -> None:
        alive: dict[int, Member] = {}
        dead: dict[int, Owner] = {}
        for life, owner in owners.items():
            start, now = fence(life, owner.incarnation), records.get(owner.worker_id, b"")
            if now.startswith(start):
                alive[life] = _member(life, owner, now[len(start) :])
            else:
                dead[life] = owner
        self._by_life, self._dead, self._owners = alive, dead, dict(owners)
        self._dead_since = {life: self._dead_since.get(life, self._clock.now()) for life in dead}


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
