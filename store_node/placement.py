"""Placement: which store a chain of blocks goes to. Pure, and the same on every node that knows the same stores.

Rendezvous hashing over the chain's first address: every block of a context goes to one store, and when a store comes or goes,
only its own share of the chains moves.
"""

from collections.abc import Collection

from blake3 import blake3


def store_for(chain: bytes, stores: Collection[str]) -> str | None:
    """The store of highest weight for this chain; None where there is none. `stores`: control URLs."""
    return max(stores, key=lambda url: (blake3(chain + url.encode()).digest(length=8), url), default=None)
