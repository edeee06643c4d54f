"""Inspection: blocks in host slots verified where they lie, because somebody calls them damaged."""

from collections.abc import Sequence

from kv_store.host_tier import HostTier
from kv_store.mover import Mover


async def inspect(host: HostTier, mover: Mover, block_hashes: Sequence[bytes], batch: int) -> int:
    """Drop those of the blocks whose bytes are not what they were; blocks that are not here are passed over. How many were
    dropped. Between two batches, saves and loads have their turn on the mover's thread."""
    num_dropped = 0
    for first in range(0, len(block_hashes), batch):
        entries = [entry for block_hash in block_hashes[first : first + batch] for entry in host.hold([block_hash])]
        try:
            found = await mover.checksums([entry.slot for entry in entries])
            for entry, checksum in zip(entries, found, strict=True):
                if checksum != entry.checksum:
                    host.drop_damaged(entry)
                    num_dropped += 1
        finally:
            host.let_go(entries)
    return num_dropped
