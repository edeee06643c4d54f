"""Clears: what was under way when an operator cleared a tier is not kept when it arrives.

A job asks for a `mark` when it begins, and when it commits, whether its tenant has been cleared since. Not thread-safe.
"""

from protocol.kv_blocks import Tenant


class Clears:
    def __init__(self) -> None:
        self.mark = 0
        """Of now: how often anything was cleared."""
        self._all = 0
        self._of: dict[str, int] = {}

    def note(self, tenant: Tenant | None) -> None:
        """All tenants, or one, are cleared from here on."""
        self.mark += 1
        if tenant is None:
            self._all = self.mark
            self._of.clear()
        else:
            self._of[tenant] = self.mark

    def since(self, mark: int, tenant: str) -> bool:
        return max(self._all, self._of.get(tenant, 0)) > mark
