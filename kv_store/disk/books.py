"""DiskBooks: which block of which segment holds what. Pure book-keeping: it touches no file and takes no lock.

A block is live in one segment at most. Forgotten blocks keep their place in the file, dead, until the whole file goes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kv_store.disk.segment import MAX_SEGMENT_BLOCKS, Segment
from kv_store.disk.stats import DiskCounts
from kv_store.tiers import StoredBlock
from protocol.ids import BlockHash
from protocol.kv_blocks import Tenant


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours in one segment: blocks `first` to `first + count - 1` of it."""

    segment: Segment
    first: int
    count: int

    @property
    def checksums(self) -> Sequence[int]:
        return self.segment.checksums[self.first : self.first + self.count]


class DiskBooks:
    """One for each DiskTier, which guards it with a lock."""

    def __init__(self, counts: DiskCounts | None = None) -> None:
        self.segments: dict[int, Segment] = {}
        self.used_bytes = 0
        self.counts = counts or DiskCounts()
        self.tenants: Counter[Tenant] = Counter()
        """Live blocks of each."""
        self._places: dict[bytes, int] = {}  # segment's number * MAX_SEGMENT_BLOCKS + index
        self._stale: dict[int, Segment] = {}
        self._gone: list[StoredBlock] = []

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._places

    @property
    def num_blocks(self) -> int:
        """Live ones."""
        return len(self._places)

    def num_held(self, block_hashes: Sequence[BlockHash]) -> int:
        """How many leading ones."""
        return next(
            (index for index, block_hash in enumerate(block_hashes) if block_hash not in self._places),
            len(block_hashes),
        )

    def add(self, segment: Segment) -> None:
        """Blocks of it that are live elsewhere stay there, and are dead here: its file is to know."""
        self.segments[segment.number] = segment
        self.used_bytes += segment.file_bytes
        for index, block in enumerate(segment.blocks):
            if block is None:
                continue
            if block.block_hash in self._places:
                segment.blocks[index] = None
                segment.num_live -= 1
                self._stale[segment.number] = segment
            else:
                self._places[block.block_hash] = segment.number * MAX_SEGMENT_BLOCKS + index
                self.tenants[Tenant(block.tenant)] += 1

    def find(self, block_hash: bytes) -> StoredBlock | None:
        place = self._places.get(block_hash)
        if place is None:
            return None
        number, index = divmod(place, MAX_SEGMENT_BLOCKS)
        segment = self.segments[number]
        block = segment.blocks[index]
        assert block is not None
        return StoredBlock(block, "disk", place, segment.checksums[index])

    def runs(self, block_hashes: Sequence[BlockHash], max_blocks: int) -> list[Run]:
        """Where the leading blocks that are held lie, in their order, up to `max_blocks` neighbours together."""
        runs: list[Run] = []
        for block_hash in block_hashes:
            place = self._places.get(block_hash)
            if place is None:
                break
            number, index = divmod(place, MAX_SEGMENT_BLOCKS)
            last = runs[-1] if runs else None
            follows = last is not None and last.segment.number == number and last.first + last.count == index
            if last is not None and follows and last.count < max_blocks:
                runs[-1] = Run(last.segment, last.first, last.count + 1)
            else:
                runs.append(Run(self.segments[number], index, 1))
        return runs

    def forget(self, block_hash: bytes) -> None:
        place = self._places.get(block_hash)
        if place is not None:
            number, index = divmod(place, MAX_SEGMENT_BLOCKS)
            self.forget_run(Run(self.segments[number], index, 1))

    def forget_run(self, run: Run) -> int:
        """How many of these blocks were still live, in that very place."""
        segment = run.segment
        if self.segments.get(segment.number) is not segment:
            return 0
        num_forgotten = self._kill(run)
        if num_forgotten:
            self._stale[segment.number] = segment
        return num_forgotten

    def remove(self, segment: Segment) -> None:
        """A segment whose file is gone, unless that is known."""
        if self.segments.get(segment.number) is not segment:
            return
        self._kill(Run(segment, 0, len(segment.blocks)))
        self._stale.pop(segment.number, None)
        del self.segments[segment.number]
        self.used_bytes -= segment.file_bytes

    def remove_all(self) -> None:
        """All files are gone. Whoever goes through `segments` at this moment goes on with what was."""
        for segment in self.segments.values():
            self._kill(Run(segment, 0, len(segment.blocks)))
        self.segments, self._stale, self.used_bytes = {}, {}, 0

    def take_stale(self) -> list[Segment]:
        """Segments with blocks that were forgotten since the last call: their files do not know yet."""
        stale, self._stale = list(self._stale.values()), {}
        return stale

    def take_gone(self) -> list[StoredBlock]:
        """Blocks that are not live any more since the last call: nobody was told yet."""
        gone, self._gone = self._gone, []
        return gone

    def put_back(self, gone: Sequence[StoredBlock]) -> None:
        """What was taken, of other books too, for the next to take it."""
        self._gone += gone

    def stored(self, segment: Segment) -> list[StoredBlock]:
        """Its live blocks, in their order."""
        return [
            StoredBlock(block, "disk", segment.number * MAX_SEGMENT_BLOCKS + index, segment.checksums[index])
            for index, block in enumerate(segment.blocks)
            if block is not None
        ]

    def _kill(self, run: Run) -> int:
        segment, num_live = run.segment, run.segment.num_live
        for index in range(run.first, run.first + run.count):
            block = segment.blocks[index]
            if block is None:
                continue
            segment.blocks[index] = None
            segment.num_live -= 1
            self._gone.append(StoredBlock(block, "disk", self._places.pop(block.block_hash), segment.checksums[index]))
            tenant = Tenant(block.tenant)
            self.tenants[tenant] -= 1
            if not self.tenants[tenant]:
                del self.tenants[tenant]
        return num_live - segment.num_live
