"""Sweeper: takes the places of dead owners out of the index, in slices.

Any process may sweep, and one at a time sweeps a life: it holds a claim that expires. First the life is fenced off in every
shard, so that nothing comes back behind the sweep; then its buckets say which entries it had. The life is forgotten last, so
that a sweep that breaks off is done again.
"""

import random
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kv_store.index.keys import NUM_SHARDS, Keyspace
from kv_store.index.members import Owner
from kv_store.index.membership import fence
from kv_store.index.scripts import BUCKET, FENCE_OFF, SWEEP
from kv_store.index.server import Command, RedisServer
from kv_store.index.state import IndexCounters

BUCKETS_AT_ONCE = 16
SWEPT_AT_ONCE = 64
CLAIM_MS = 10_000
CLAIMS_AT_ONCE = 4


@dataclass(slots=True)
class _Sweep:
    life: int
    owner: Owner
    buckets: Iterator[tuple[int, bytes]]
    unread: list[tuple[int, bytes]]
    read: list[tuple[int, bytes, list[bytes]]]


class Sweeper:
    """On one event loop, one call at a time."""

    def __init__(self, keys: Keyspace, worker_id: str, counters: IndexCounters) -> None:
        self._keys = keys
        self._worker_id = worker_id
        self._counters = counters
        self._sweep: _Sweep | None = None

    @property
    def idle(self) -> bool:
        """No sweep has been begun that is not done."""
        return self._sweep is None

    async def step(self, server: RedisServer, dead: Mapping[int, Owner]) -> int | None:
        """One slice of work, of a few milliseconds at most. Returns the life that is done with, if one is. Raises like
        RedisServer.run; the sweep then goes on with the next step."""
        if self._sweep is None:
            for life in random.sample(list(dead), min(CLAIMS_AT_ONCE, len(dead))):  # others begin elsewhere
                if await self._begin(server, life, dead[life]):
                    break
            return None
        sweep = self._sweep
        while len(sweep.unread) < BUCKETS_AT_ONCE and (bucket := next(sweep.buckets, None)) is not None:
            sweep.unread.append(bucket)
        if sweep.unread or sweep.read:
            await self._sweep_buckets(server, sweep)
            return None
        await server.run(
            [
                ("DEL", self._keys.events(sweep.life)),
                ("HDEL", self._keys.lives, str(sweep.life)),
                ("DEL", self._keys.claim(sweep.life)),
            ]
        )
        self._sweep = None
        return sweep.life

    async def _begin(self, server: RedisServer, life: int, owner: Owner) -> bool:
        claim = self._keys.claim(life)
        (granted,) = await server.run([("SET", claim, self._worker_id, "NX", "PX", CLAIM_MS)])
        if not granted or isinstance(granted, Exception):
            return False
        mark = fence(life, owner.incarnation)
        await server.run(
            [FENCE_OFF.call([self._keys.record(shard, owner.worker_id)], [mark]) for shard in range(NUM_SHARDS)]
        )
        buckets = (
            (shard, self._keys.bucket(shard, life, number))
            for shard in range(NUM_SHARDS)
            for number in range(owner.num_buckets)
        )
        self._sweep = _Sweep(life, owner, buckets, [], [])
        return True

    async def _sweep_buckets(self, server: RedisServer, sweep: _Sweep) -> None:
        """In one round trip, sweep the buckets that were read in the last one, and read the next."""
        mark, life = fence(sweep.life, sweep.owner.incarnation), struct.pack("<I", sweep.life)
        commands: list[Command] = [("PEXPIRE", self._keys.claim(sweep.life), CLAIM_MS)]
        for shard, bucket, addresses in sweep.read:
            keys = [self._keys.record(shard, sweep.owner.worker_id), bucket]
            commands.append(SWEEP.call([*keys, *map(self._keys.entry, addresses)], [mark, life]))
        commands += [BUCKET.call([bucket], [SWEPT_AT_ONCE]) for _, bucket in sweep.unread]
        _, *replies = await server.run(commands)
        swept, found = replies[: len(sweep.read)], replies[len(sweep.read) :]
        left: list[tuple[int, bytes]] = []
        for (shard, bucket, _), reply in zip(sweep.read, swept, strict=True):
            num_swept, more = reply if isinstance(reply, list) else (0, 1)
            self._counters.swept += num_swept
            if more:
                left.append((shard, bucket))
        sweep.read = [
            (shard, bucket, addresses)
            for (shard, bucket), addresses in zip(sweep.unread, found, strict=True)
            if isinstance(addresses, list) and addresses
        ]
        sweep.unread = left
