"""TierLog: a store's tiers as KV events for the routers, beside those of an engine's own cache."""

from collections.abc import Callable, Sequence
from itertools import groupby

from kv_store.tiers import StoredBlock
from protocol.ids import BlockHash
from protocol.kv_events import StorageTier

Note = Callable[[Sequence[BlockHash], StorageTier], None]


class TierLog:
    """A TierListener. `note_stored` and `note_removed` are called from any thread."""

    def __init__(self, note_stored: Note, note_removed: Note) -> None:
        self._note_stored = note_stored
        self._note_removed = note_removed

    def stored(self, blocks: Sequence[StoredBlock]) -> None:
        _by_tier(blocks, self._note_stored)

    def removed(self, blocks: Sequence[StoredBlock]) -> None:
        _by_tier(blocks, self._note_removed)


def _by_tier(blocks: Sequence[StoredBlock], note: Note) -> None:
    for tier, group in groupby(blocks, key=lambda each: each.tier):
        note([BlockHash(each.block.block_hash) for each in group], tier)
