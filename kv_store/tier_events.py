"""TierEvents: everybody who hears what a store's tiers gain and lose. Made before the tiers, because a disk tier tells of what it
evicts from its own thread; it lives as long as they do."""

from collections.abc import Sequence

from kv_store.tiers import StoredBlock, TierListener


class TierEvents:
    """A TierListener that passes everything on, in the thread that it is called from."""

    def __init__(self) -> None:
        self._listeners: list[TierListener] = []

    def add(self, listener: TierListener) -> None:
        """Before the first block is stored."""
        self._listeners.append(listener)

    def stored(self, blocks: Sequence[StoredBlock]) -> None:
        if blocks:
            for listener in self._listeners:
                listener.stored(blocks)

    def removed(self, blocks: Sequence[StoredBlock]) -> None:
        if blocks:
            for listener in self._listeners:
                listener.removed(blocks)
