"""DriftCheck: compares a sample of what this owner has published with what the index has, and mends what differs.

Both ways: entries that are gone or changed (a server that evicts, somebody who deletes), and entries that are there and should not
be (a server that was set back).
"""

import logging
import random

from kv_store.index.keys import NUM_SHARDS, Keyspace, shard_of
from kv_store.index.members import Owner
from kv_store.index.places import MAX_PLACES, MAX_VALUE_BYTES, unpack
from kv_store.index.publisher import Publisher
from kv_store.index.scripts import BUCKET, FETCH
from kv_store.index.server import RedisServer
from kv_store.index.state import IndexCounters

log = logging.getLogger(__name__)

SAMPLE = 128


class DriftCheck:
    """On the task that publishes: nothing is written between the sample and the look at it."""

    def __init__(self, keys: Keyspace, owner: Owner, publisher: Publisher, counters: IndexCounters) -> None:
        self._keys = keys
        self._owner = owner
        self._publisher = publisher
        self._counters = counters
        self._random = random.Random()  # noqa: S311 - a sample

    async def check(self, server: RedisServer) -> None:
        """Raises like RedisServer.run."""
        life = self._publisher.life
        if life is None:
            return
        wrong = await self._wrong(server, life)
        strangers = await self._strangers(server, life)
        if not wrong and not strangers:
            return
        self._counters.drift += len(wrong) + len(strangers)
        log.info("the index had drifted", extra={"wrong": len(wrong), "unknown": len(strangers)})
        self._publisher.forget(wrong)
        self._publisher.forget_strangers(strangers)

    async def _wrong(self, server: RedisServer, life: int) -> list[bytes]:
        """Of a sample of our entries, those that the index does not have as we wrote them."""
        known = self._publisher.addresses
        by_shard: dict[int, list[bytes]] = {}
        for address in self._random.sample(known, min(SAMPLE, len(known))):
            by_shard.setdefault(shard_of(address), []).append(address)
        groups = list(by_shard.values())
        replies = await server.run(
            [FETCH.call([self._keys.entry(address) for address in group], [MAX_VALUE_BYTES, 0]) for group in groups]
        )
        wrong = []
        for group, values in zip(groups, replies, strict=True):
            if not isinstance(values, list):
                continue
            self._counters.checked += len(group)
            wrong += [
                address
                for address, value in zip(group, values, strict=False)
                if not self._is_right(address, value, life)
            ]
        return wrong

    def _is_right(self, address: bytes, value: bytes, life: int) -> bool:
        expected = self._publisher.published(address)
        found = unpack(value) or ()
        ours = [place.chunk for place in found if place.life == life]
        return ours == [expected] or (not ours and len(found) == MAX_PLACES)

    async def _strangers(self, server: RedisServer, life: int) -> list[bytes]:
        """Of one bucket a shard, the addresses that we have not published."""
        buckets = [
            self._keys.bucket(shard, life, self._random.randrange(self._owner.num_buckets))
            for shard in range(NUM_SHARDS)
        ]
        replies = await server.run([BUCKET.call([bucket], [SAMPLE]) for bucket in buckets])
        return [
            address
            for addresses in replies
            if isinstance(addresses, list)
            for address in addresses
            if not self._publisher.has_written(address)
        ]
