"""SourceSearch: who else holds the beginning of a prompt, beside those that the router knows of.

Asked once for a request, before the engine hears of it. Nothing is owed to anybody meanwhile: a request whose caller goes away
during the search has not begun.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec

from protocol.ids import BlockHash, WorkerId
from protocol.requests import DecodeRequest, PrefillRequest
from protocol.transfer import KVSource

MAX_SOURCES = 4
"""A request asks them one after the other; who holds less than the first few saves it little."""

MIN_TOKENS = 256
"""What an index covers with one entry, and more than a loan is worth for."""

Request = TypeVar("Request", PrefillRequest, DecodeRequest)


class SourceFinder(Protocol):
    async def find(self, block_hashes: Sequence[BlockHash]) -> tuple[KVSource, ...]:
        """Who holds leading blocks of this chain, the most first. Ends within a budget of its own and never raises."""
        ...


class NobodyElse:
    """Where there is no index."""

    async def find(self, block_hashes: Sequence[BlockHash]) -> tuple[KVSource, ...]:  # noqa: ARG002  # nobody to ask
        return ()


class SourceSearch:
    def __init__(self, finder: SourceFinder, myself: WorkerId) -> None:
        self._finder = finder
        self._myself = myself

    async def complete(
        self, request: Request, block_hashes: Sequence[BlockHash], num_held: int, block_size: int
    ) -> Request:
        """The request, with the sources that were found for these first blocks of it among its own. `num_held`: how many
        leading ones this node holds itself. Raises nothing."""
        if (len(block_hashes) - num_held) * block_size < MIN_TOKENS:
            return request
        found = [source for source in await self._finder.find(block_hashes) if source.num_blocks > num_held]
        if not found:
            return request
        return msgspec.structs.replace(request, sources=merge_sources(request.sources, found, self._myself))


def merge_sources(known: Sequence[KVSource], found: Sequence[KVSource], myself: WorkerId) -> tuple[KVSource, ...]:
    """Each node once, in its latest life as far as `known` has it, those with the most blocks first; a few at most."""
    best: dict[str, KVSource] = {}
    for source in (*known, *found):
        other = best.get(source.worker)
        if other is None or (other.incarnation == source.incarnation and source.num_blocks > other.num_blocks):
            best[source.worker] = source
    best.pop(myself, None)
    return tuple(sorted(best.values(), key=lambda source: -source.num_blocks)[:MAX_SOURCES])
