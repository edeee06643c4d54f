"""Keyspace: the names of all keys of one index.

    {ns:0}:life          the last life that was given out
    {ns:0}:lives         hash: life -> Owner (msgpack); stays until the life is swept
    {ns:0}:e:<life>      stream: what the life published and withdrew, by number
    {ns:0}:c:<life>      claim on sweeping a dead life; expires
    {ns:S}:n:<worker>    record: the worker's present life, in every shard, with a TTL; what fences writes
    {ns:S}:b:<address>   entry: who holds the chunk that ends with the block of this address (raw bytes)
    {ns:S}:o:<life>:<b>  set: addresses of the life's own entries, bucket b

The braces are a hash tag: a shard's keys lie in one slot of a cluster, so that one script may write several of them. An
address alone tells its shard and bucket.
"""

from protocol.block_hash import HASH_BYTES

NUM_SHARDS = 16


def shard_of(address: bytes) -> int:
    return address[0] % NUM_SHARDS


class Keyspace:
    """Of one namespace."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._shards = [f"{{{namespace}:{shard:x}}}:".encode() for shard in range(NUM_SHARDS)]
        self._entries = [prefix + b"b:" for prefix in self._shards]
        self.life = self._shards[0] + b"life"
        self.lives = self._shards[0] + b"lives"

    def entry(self, address: bytes) -> bytes:
        return self._entries[address[0] % NUM_SHARDS] + address

    def record(self, shard: int, worker_id: str) -> bytes:
        return self._shards[shard] + b"n:" + worker_id.encode()

    def bucket(self, shard: int, life: int, bucket: int) -> bytes:
        return self._shards[shard] + b"o:%d:%d" % (life, bucket)

    def bucket_of(self, address: bytes, life: int, num_buckets: int) -> bytes:
        number = int.from_bytes(address[1:4], "little") % num_buckets
        return self.bucket(shard_of(address), life, number)

    def events(self, life: int) -> bytes:
        return self._shards[0] + b"e:%d" % life

    def claim(self, life: int) -> bytes:
        return self._shards[0] + b"c:%d" % life

    @staticmethod
    def address(entry_key: bytes) -> bytes:
        return entry_key[-HASH_BYTES:]
