"""ChunkBook: which chunks this process holds in full, from what its store says of single blocks. Pure; for one task, and
whatever thread it hands it to.

A chunk is `chunk_blocks` consecutive blocks of a chain, aligned at multiples of that, and named by its last block. Several
chunks may share their first blocks, where chains part within a chunk. Every change of a block marks the chunks that it is
in; what is to be said of a marked chunk is worked out only when somebody takes the mark, so that a block that comes and
goes meanwhile costs nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kv_store.index.places import Chunk, checksum_of
from kv_store.tiers import StoredBlock, Tier


@dataclass(slots=True)
class _Held:
    parent: bytes
    position: int
    checksum: int
    places: dict[Tier, int]


class ChunkBook:
    def __init__(self, chunk_blocks: int, block_size: int) -> None:
        self._chunk_blocks = chunk_blocks
        self._block_size = block_size
        self._blocks: dict[bytes, _Held] = {}
        self._children: dict[bytes, set[bytes]] = {}
        self._marked: dict[bytes, None] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_marked(self) -> int:
        return len(self._marked)

    def stored(self, blocks: Iterable[StoredBlock]) -> None:
        for stored in blocks:
            self._add(stored)
            self._mark_chunks(stored.block.block_hash, stored.block.position)

    def removed(self, blocks: Iterable[StoredBlock]) -> None:
        """Blocks that it does not hold are no error."""
        for stored in blocks:
            block_hash = stored.block.block_hash
            held = self._blocks.get(block_hash)
            if held is None or held.places.pop(stored.tier, None) is None:
                continue
            self._mark_chunks(block_hash, held.position)
            if not held.places:
                self._drop(block_hash, held)

    def replace(self, snapshot: Sequence[StoredBlock]) -> None:
        """This is all there is. What was held before is marked too."""
        for block_hash, held in self._blocks.items():
            if self._ends_chunk(held.position):
                self._marked[block_hash] = None
        self._blocks.clear()
        self._children.clear()
        for stored in snapshot:
            self._add(stored)
        for block_hash, held in self._blocks.items():
            if self._ends_chunk(held.position):
                self._marked[block_hash] = None

    def mark(self, addresses: Iterable[bytes]) -> None:
        """Have these taken once more: what was said of them has not arrived, or has been lost."""
        self._marked.update(dict.fromkeys(addresses))

    def take_marked(self, limit: int) -> dict[bytes, Chunk | None]:
        """Up to `limit` marked chunks, the longest marked first, and what is held of them now; None: not all of it."""
        taken = [address for address, _ in zip(self._marked, range(limit), strict=False)]
        for address in taken:
            del self._marked[address]
        return {address: self.chunk(address) for address in taken}

    def chunk(self, address: bytes) -> Chunk | None:
        """The chunk that ends with this block, if all of its blocks are held."""
        held = self._blocks.get(address)
        if held is None or not self._ends_chunk(held.position):
            return None
        blocks, last = [held], held
        while len(blocks) < self._chunk_blocks:
            before = self._blocks.get(last.parent)
            if before is None or before.position != last.position - 1:
                return None
            blocks.append(before)
            last = before
        on_disk = [block for block in blocks if "host" not in block.places]
        tier: Tier = "disk" if on_disk else "host"
        first = blocks[-1].places
        return Chunk(
            tier=tier,
            first=first.get(tier, next(iter(first.values()))),
            num_blocks=len(blocks),
            checksum=checksum_of([block.checksum for block in reversed(blocks)]),
            num_tokens=len(blocks) * self._block_size,
        )

    def _ends_chunk(self, position: int) -> bool:
        return (position + 1) % self._chunk_blocks == 0

    def _add(self, stored: StoredBlock) -> None:
        block = stored.block
        held = self._blocks.get(block.block_hash)
        if held is None:
            held = self._blocks[block.block_hash] = _Held(block.parent, block.position, stored.checksum, {})
            if block.position % self._chunk_blocks:
                self._children.setdefault(block.parent, set()).add(block.block_hash)
        held.checksum = stored.checksum
        held.places[stored.tier] = stored.place

    def _drop(self, block_hash: bytes, held: _Held) -> None:
        del self._blocks[block_hash]
        siblings = self._children.get(held.parent)
        if siblings is not None:
            siblings.discard(block_hash)
            if not siblings:
                del self._children[held.parent]

    def _mark_chunks(self, block_hash: bytes, position: int) -> None:
        """All chunks with this block in them that end with a block that is held."""
        level = [block_hash]
        while not self._ends_chunk(position):
            level = [child for block in level for child in self._children.get(block, ())]
            if not level:
                return
            position += 1
        self._marked.update(dict.fromkeys(level))
