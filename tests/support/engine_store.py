"""A store behind an engine on a bench: it keeps the bytes of what it is offered, and says what it has."""

from collections.abc import Sequence

from engine.events import BlocksOffered
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock


class BenchStore:
    """Without `keeps` it wants nothing that it is asked about."""

    def __init__(self, *, eager: bool = False, keeps: bool = True) -> None:
        self.eager = eager
        self.keeps = keeps
        self.kept: dict[BlockHash, bytes] = {}
        self.blocks: dict[BlockHash, CachedBlock] = {}
        self.asked: list[CachedBlock] = []

    def num_loadable(self, block_hashes: Sequence[BlockHash]) -> int:
        lacking = (count for count, block_hash in enumerate(block_hashes) if block_hash not in self.kept)
        return next(lacking, len(block_hashes))

    def wanted(self, blocks: Sequence[CachedBlock]) -> list[bool]:
        self.asked += blocks
        return [self.keeps and block.block_hash not in self.kept for block in blocks]

    def save(self, offer: BlocksOffered, memory: memoryview, block_bytes: int) -> None:
        """As the copies of a real store do, some time after the offer."""
        for block, block_id in zip(offer.blocks, offer.block_ids, strict=True):
            self.blocks[BlockHash(block.block_hash)] = block
            start = block_id * block_bytes
            self.kept[BlockHash(block.block_hash)] = bytes(memory[start : start + block_bytes])
