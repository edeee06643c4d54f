"""What the Redis index costs: time added to a request, entries written and swept per second, memory per entry.

    python -m benchmarks.bench_kv_index [--entries 1000000] [--url unix:///... | redis://...]

Without --url a server of its own is started. Lookups stand beside a raw MGET of the same keys by the same client library, in
turn, in the same run; "while publishing" is measured while another owner writes as fast as it may.
"""

import argparse
import asyncio
import statistics
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack

from redis.asyncio import Redis

from kv_store.index.embedded import EmbeddedServer
from kv_store.index.index import RedisIndex
from kv_store.index.keys import Keyspace
from kv_store.index.members import Owner, num_buckets_for
from kv_store.index.places import Chunk, pack
from kv_store.index.settings import IndexSettings
from kv_store.tiers import StoredBlock
from protocol.block_hash import hash_blocks, root_hash
from protocol.ids import BlockHash
from protocol.kv_blocks import chain

BLOCK_SIZE = 16
CHUNK_BLOCKS = 16
FILL_BATCH = 4096
LOOKUPS = 2000
PROMPTS = (4_000, 32_000)
PATIENT_S = 1.0
"""A budget under which no lookup is cut off, so that what is measured is how long it takes."""


def owner(name: str, num_chunks: int) -> Owner:
    return Owner(
        worker_id=name,
        incarnation=f"life-of-{name}",
        role="store",
        control_url="http://127.0.0.1:1",
        fingerprint="0" * 32,
        block_size=BLOCK_SIZE,
        capacity_blocks=num_chunks * CHUNK_BLOCKS,
        num_buckets=num_buckets_for(num_chunks),
    )


def context(num_tokens: int, text: int) -> list[BlockHash]:
    return hash_blocks([text] * num_tokens, BLOCK_SIZE, root_hash("bench"))


def blocks_of(hashes: Sequence[BlockHash]) -> list[StoredBlock]:
    return [StoredBlock(block, "host", slot, slot) for slot, block in enumerate(chain(root_hash("bench"), hashes))]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what another process of the index does has no event
        await asyncio.sleep(0.002)


async def memory(client: "Redis") -> int:
    return int((await client.info("memory"))["used_memory"])


FILL = """
local buckets, place, addresses = tonumber(ARGV[2]), ARGV[3], ARGV[4]
for at = 1, #addresses, 16 do
  local address = string.sub(addresses, at, at + 15)
  local shard, low, middle, high = string.byte(address, 1, 4)
  local prefix = string.format('{%s:%x}:', ARGV[1], shard % 16)
  local bucket = (low + 256 * middle + 65536 * high) % buckets
  redis.call('SET', prefix .. 'b:' .. address, place)
  redis.call('SADD', string.format('%so:1:%d', prefix, bucket), address)
end
"""
"""One server only: it names its keys itself."""


async def fill(client: "Redis", keys: Keyspace, num_entries: int) -> float:
    """Entries as an owner leaves them, written by the server itself because that is quicker. Returns the server's bytes an entry, sets of own entries
    included."""
    before = await memory(client)
    place = b"\x01" + pack(1, Chunk("host", 1, CHUNK_BLOCKS, 1 << 60, 256)) + struct.pack("<I", int(time.time()))
    for start in range(0, num_entries, FILL_BATCH):
        addresses = b"".join(_addresses(start, min(num_entries, start + FILL_BATCH)))
        await client.eval(FILL, 0, keys.namespace, num_buckets_for(num_entries), place, addresses)
    return (await memory(client) - before) / num_entries


def _addresses(start: int, stop: int) -> Iterator[bytes]:
    """As evenly spread as hashes are."""
    for number in range(start, stop):
        yield (number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128)).to_bytes(16, "little")


async def timed(ask: Callable[[], Awaitable[object]], samples: list[float]) -> None:
    begun_at = time.perf_counter()
    await ask()
    samples.append(1e6 * (time.perf_counter() - begun_at))


async def lookups(reader: RedisIndex, client: "Redis", keys: Keyspace, hashes: list[BlockHash], title: str) -> None:
    entries = [keys.entry(address) for address in hashes[CHUNK_BLOCKS - 1 :: CHUNK_BLOCKS]]
    (source,) = await reader.find(hashes)
    assert source.num_blocks == len(entries) * CHUNK_BLOCKS
    ours: list[float] = []
    raw: list[float] = []
    for _ in range(LOOKUPS):
        await timed(lambda: reader.find(hashes), ours)
        await timed(lambda: client.mget(entries), raw)
    print(
        f"{title:<34}{len(entries):>7}{statistics.median(ours):>9.0f}{_p99(ours):>9.0f}{statistics.median(raw):>10.0f}"
        f"{_p99(raw):>9.0f}{statistics.median(ours) / statistics.median(raw):>7.2f}"
    )


def _p99(samples: Sequence[float]) -> float:
    return sorted(samples)[int(0.99 * len(samples))]


async def throughput(reader: RedisIndex, hashes: list[BlockHash], at_once: int = 64, rounds: int = 60) -> float:
    """Lookups a second of many requests at once."""
    begun_at = time.perf_counter()
    for _ in range(rounds):
        await asyncio.gather(*(reader.find(hashes) for _ in range(at_once)))
    return at_once * rounds / (time.perf_counter() - begun_at)


async def publish_and_sweep(settings: IndexSettings, reader: RedisIndex, num_chunks: int) -> None:
    held = blocks_of(context(num_chunks * 256, text=3))
    begun_at = time.perf_counter()
    async with RedisIndex(settings, owner("writer", num_chunks), lambda: held) as writer:
        await until(lambda: writer.state().registered)
        begun_at = time.perf_counter()
        await until(lambda: writer.state().entries == num_chunks and writer.state().lag_s == 0)
        print(f"publish        {num_chunks / (time.perf_counter() - begun_at):>12,.0f} entries/s (paced)")
    before = reader.state().counters.swept
    await until(lambda: reader.state().counters.swept > before)
    begun_at = time.perf_counter()
    await until(lambda: reader.state().dead_owners == 0)
    swept = reader.state().counters.swept - before
    print(f"sweep          {swept:>12,} entries in {time.perf_counter() - begun_at:.2f} s")


async def measure(settings: IndexSettings, num_entries: int, num_swept: int) -> None:
    keys = Keyspace(settings.namespace)
    contexts = {num_tokens: context(num_tokens, num_tokens) for num_tokens in PROMPTS}
    held = [block for hashes in contexts.values() for block in blocks_of(hashes)]
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Redis.from_url(settings.driver_url, protocol=2))
        begun_at = time.perf_counter()
        entry_bytes = await fill(client, keys, num_entries)
        print(f"fill           {num_entries:>12,} entries in {time.perf_counter() - begun_at:.1f} s")
        print(f"memory         {entry_bytes:>12.0f} bytes an entry, {entry_bytes * num_entries / 1e9:.2f} GB in all")
        holder = await stack.enter_async_context(RedisIndex(settings, owner("holder", 1000), lambda: held))
        reader = await stack.enter_async_context(RedisIndex(settings, owner("reader", 1000), lambda: []))
        await until(lambda: holder.state().entries == sum(tokens // 256 for tokens in PROMPTS))
        await until(lambda: len(reader.members()) == 2)
        print(f"{'lookup':<34}{'entries':>7}{'p50 us':>9}{'p99 us':>9}{'MGET p50':>10}{'p99':>9}{'ratio':>7}")
        for tokens, hashes in contexts.items():
            await lookups(reader, client, keys, hashes, f"  {tokens:,} tokens")
        flood = blocks_of(context(256 * 50_000, text=4))
        async with RedisIndex(settings, owner("flood", 50_000), lambda: flood):
            for tokens, hashes in contexts.items():
                await lookups(reader, client, keys, hashes, f"  {tokens:,} tokens, while publishing")
        for tokens, hashes in contexts.items():
            print(f"  {tokens:,} tokens, 64 at once: {await throughput(reader, hashes):>10,.0f} lookups/s")
        await until(lambda: reader.state().dead_owners == 0)
        await publish_and_sweep(settings, reader, num_swept)


async def run(url: str | None, num_entries: int, num_swept: int) -> None:
    async with AsyncExitStack() as stack:
        if url is None:
            url = (await stack.enter_async_context(EmbeddedServer())).url
        settings = IndexSettings(url=url, namespace="bench", budget_s=PATIENT_S, heartbeat_s=0.2, record_ttl_s=1.0)
        await measure(settings, num_entries, num_swept)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the Redis index.")
    parser.add_argument("--url", help="a server to measure; its namespace `bench` is written to")
    parser.add_argument("--entries", type=int, default=1_000_000, help="how many others there are")
    parser.add_argument("--swept", type=int, default=100_000, help="entries that are published and swept")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.url, arguments.entries, arguments.swept))


if __name__ == "__main__":
    main()
