"""CleanBlocks: blocks of the host tier that are next to go and already on disk, in the order of being chosen.

Whoever needs a slot takes one of theirs and loses nothing. A block that is used meanwhile is clean no more: it has earned
its place. Not thread-safe.
"""

from collections.abc import Iterable
from itertools import islice

from kv_store.entries import Entry
from protocol.kv_blocks import Tenant


class CleanBlocks:
    def __init__(self) -> None:
        self._all: dict[Entry, None] = {}
        self._of: dict[str, dict[Entry, None]] = {}

    def count(self, tenant: Tenant | None = None) -> int:
        return len(self._among(tenant))

    def add(self, entry: Entry) -> None:
        self._all[entry] = None
        self._of.setdefault(entry.block.tenant, {})[entry] = None

    def discard(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry in self._all:
                del self._all[entry]
                tenant = entry.block.tenant
                del self._of[tenant][entry]
                if not self._of[tenant]:
                    del self._of[tenant]

    def take(self, count: int, tenant: Tenant | None = None) -> list[Entry]:
        """Those that were chosen first, of one tenant if given."""
        taken = list(islice(self._among(tenant), count))
        self.discard(taken)
        return taken

    def _among(self, tenant: Tenant | None) -> dict[Entry, None]:
        return self._all if tenant is None else self._of.get(tenant, {})
