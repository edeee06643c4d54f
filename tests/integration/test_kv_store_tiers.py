"""KVStore over a real arena and a real disk tier: the bytes that a device had are the bytes that it gets back."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from kv_store.disk.tier import DiskTier
from kv_store.host_copier import HostCopier
from kv_store.policy.factory import POLICY_NAMES, PolicyName, make_policy
from kv_store.settings import StoreSettings
from kv_store.sizing import host_slots
from kv_store.store import KVStore
from kv_store.tier_events import TierEvents
from kv_transfer.memory.arena import HostArena
from protocol.kv_blocks import CachedBlock
from tests.support.store_parts import blocks_of, bytes_of, hashes_of
from tests.support.store_world import Ledger

BLOCK_BYTES = 8192
NUM_SLOTS = 24
DISK_BYTES = 64 << 20
LAYOUT = "1f" * 16


def fill(device: HostArena, block_ids: Sequence[int], blocks: Sequence[CachedBlock]) -> None:
    for block_id, block in zip(block_ids, blocks, strict=True):
        device.block(block_id)[:] = bytes_of(block, BLOCK_BYTES)


def right(device: HostArena, block_ids: Sequence[int], blocks: Sequence[CachedBlock]) -> bool:
    pairs = zip(block_ids, blocks, strict=True)
    return all(device.block(block_id) == bytes_of(block, BLOCK_BYTES) for block_id, block in pairs)


def flip_a_byte_of_each_file(folder: Path) -> int:
    """In its last block. How many files there are."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > BLOCK_BYTES]
    for file in files:
        data = bytearray(file.read_bytes())
        data[-BLOCK_BYTES // 2] ^= 1
        file.write_bytes(data)
    return len(files)


def open_store(device: HostArena, slab: HostArena, folder: Path, ledger: Ledger, policy: PolicyName = "lru") -> KVStore:
    events = TierEvents()
    events.add(ledger)
    disk = DiskTier(folder, LAYOUT, BLOCK_BYTES, DISK_BYTES, removed=events.removed)
    return KVStore(
        slab,
        NUM_SLOTS,
        make_policy(policy, NUM_SLOTS),
        StoreSettings(16, load="always"),
        copier=HostCopier(device, slab),
        disk=disk,
        events=events,
    )


@pytest.mark.parametrize("policy", POLICY_NAMES)
async def test_more_than_the_host_holds_comes_back_from_both_tiers(tmp_path: Path, policy: PolicyName) -> None:
    chains = [blocks_of(f"chain {i}", 12) for i in range(6)]
    ledger = Ledger()
    with HostArena(64, BLOCK_BYTES) as device, HostArena(NUM_SLOTS, BLOCK_BYTES) as slab:
        async with open_store(device, slab, tmp_path, ledger, policy) as store:
            for chain in chains:
                store.requested(chain)
                fill(device, range(12), chain)
                assert await store.save(chain, range(12)) == 12
                await store.drain(5.0)
            random.Random(1).shuffle(chains)
            for chain in chains:
                device.memory[:] = bytes(len(device.memory))
                store.requested(chain)
                assert store.num_loadable(hashes_of(chain)) == 12
                assert await store.load(hashes_of(chain), range(20, 32)) == 12
                assert right(device, range(20, 32), chain)
            stats = store.stats()
            assert stats.dropped_demotions == 0
            assert {tier.tier for tier in stats.tiers if tier.read} == {"host", "disk"}
        places = {stored.block.block_hash for stored in store.snapshot() if stored.tier == "host"}
        assert places == set(ledger.host)


async def test_what_is_on_disk_outlives_the_process(tmp_path: Path) -> None:
    old, new = blocks_of("old", 12), blocks_of("new", NUM_SLOTS)
    with HostArena(64, BLOCK_BYTES) as device, HostArena(NUM_SLOTS, BLOCK_BYTES) as slab:
        async with open_store(device, slab, tmp_path, Ledger()) as store:
            for chain in (old, new):
                fill(device, range(len(chain)), chain)
                await store.save(chain, range(len(chain)))
                await store.drain(5.0)
        slab.memory[:] = bytes(len(slab.memory))
        device.memory[:] = bytes(len(device.memory))
        async with open_store(device, slab, tmp_path, Ledger()) as store:
            assert store.match(hashes_of(old)).disk == 12
            held = await store.hold(hashes_of(old))
            assert right(slab, held.slots, old)
            store.let_go(held)
            assert await store.load(hashes_of(old), range(12)) == 12
            assert right(device, range(12), old)
            assert store.match(hashes_of(new)).total == NUM_SLOTS
            assert await store.clear() >= 12 + NUM_SLOTS
            assert store.match(hashes_of(old)).total == 0


async def test_a_restart_finds_what_was_in_host_memory(tmp_path: Path) -> None:
    chain = blocks_of("a", 5)
    with HostArena(64, BLOCK_BYTES) as device, HostArena(NUM_SLOTS, BLOCK_BYTES) as slab:
        async with open_store(device, slab, tmp_path, Ledger()) as store:
            fill(device, range(5), chain)
            await store.save(chain, range(5))
            await store.drain(5.0)
        device.memory[:] = bytes(len(device.memory))
        async with open_store(device, slab, tmp_path, Ledger()) as store:
            assert await store.load(hashes_of(chain), range(5)) == 5
            assert right(device, range(5), chain)


async def test_a_byte_flipped_in_a_file_is_a_miss(tmp_path: Path) -> None:
    chain, other = blocks_of("a", 12), blocks_of("b", NUM_SLOTS)
    with HostArena(64, BLOCK_BYTES) as device, HostArena(NUM_SLOTS, BLOCK_BYTES) as slab:
        async with open_store(device, slab, tmp_path, Ledger()) as store:
            for blocks in (chain, other):
                fill(device, range(len(blocks)), blocks)
                await store.save(blocks, range(len(blocks)))
                await store.drain(5.0)
        assert flip_a_byte_of_each_file(tmp_path) > 0
        async with open_store(device, slab, tmp_path, Ledger()) as store:
            count = await store.load(hashes_of(chain), range(12))
            assert count < 12
            assert right(device, range(count), chain[:count])


def test_a_host_tier_is_sized_by_what_there_is() -> None:
    assert host_slots("0", BLOCK_BYTES) == 0
    assert host_slots("auto", BLOCK_BYTES) > 0
