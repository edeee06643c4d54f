"""A process that does nothing but write to a disk tier, and forget, until it is killed."""

import random
from multiprocessing.connection import Connection
from pathlib import Path

from kv_store.disk.tier import DiskTier
from protocol.kv_blocks import CachedBlock
from tests.support.disk_blocks import FINGERPRINT, hashes, put, some_blocks

BLOCK_BYTES = 20_000
SIZE_BYTES = 200 * BLOCK_BYTES
NUM_CHAINS = 60


def chain_of(seed: int) -> list[CachedBlock]:
    return some_blocks(1 + seed % 12, seed=seed)


def write_until_killed(pipe: Connection, path: str, seed: int) -> None:
    """Says "open" once the tier is."""
    pick = random.Random(seed)
    tier = DiskTier(Path(path), FINGERPRINT, BLOCK_BYTES, SIZE_BYTES)
    pipe.send("open")
    while True:
        blocks = chain_of(pick.randrange(NUM_CHAINS))
        put(tier, blocks)
        if pick.random() < 0.3:
            tier.forget(hashes(blocks[: pick.randint(1, len(blocks))]))
