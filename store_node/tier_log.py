"""TierLog: a store's tiers as KV events for the routers, beside those of the engine's own cache."""

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from kv_store.tiers import StoredBlock
from protocol.ids import BlockHash
from protocol.kv_events import StorageTier


class EventLog(Protocol):
    """Of an engine (engine.engine), or a log of a store's own. Any thread."""

    def note_stored(self, block_hashes: Sequence[BlockHash], tier: StorageTier) -> None: ...

    def note_removed(self, block_hashes: Sequence[BlockHash], tier: StorageTier) -> None: ...


class TierLog:
    """A TierListener. Any thread."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def stored(self, blocks: Sequence[StoredBlock]) -> None:
        for tier, group in groupby(blocks, key=lambda each: each.tier):
            self._log.note_stored([BlockHash(each.block.block_hash) for each in group], tier)

    def removed(self, blocks: Sequence[StoredBlock]) -> None:
        for tier, group in groupby(blocks, key=lambda each: each.tier):
            self._log.note_removed([BlockHash(each.block.block_hash) for each in group], tier)
