"""Offloading: the engine's side of the store that keeps blocks when the device forgets them (engine.backing).

    computed ──▶ offered, where the store is eager ──▶ saved: given back as any other
    about to be forgotten ──▶ offered, where the store wants them ──▶ saved: given back to be forgotten

About to be forgotten is what the waiting sequences will take the place of, and WINDOW of the pool behind that. The store is
asked about it, once, when half of WINDOW is left that can be forgotten without loss, so that blocks leave many at a time.
Offered blocks are held, MAX_OFFERED of the pool at once; whoever needs them waits, since they come back on their own. An
admission that would still forget what the store has not been asked about is put off, once, while as much is saved. What is
forgotten faster than that is counted.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from math import ceil

from engine.backing import BackingStore, NoBacking
from engine.block_tables import BlockTables
from engine.events import BlocksOffered
from engine.sequence import Sequence as EngineSequence
from protocol.ids import PinId
from protocol.kv_blocks import CachedBlock

WINDOW = 1 / 8
MAX_AHEAD = 1 / 2
"""Of the pool: WINDOW, and what is before it."""
MAX_OFFERED = 1 / 4
MIN_OFFERED = 16
"""Blocks that may be offered though they are more than MAX_OFFERED, if they are no more than half of the pool."""
MAX_BATCH = 64
"""Blocks of one offer."""
MAX_CONSIDERED = 256
"""Blocks that the store is asked about between two steps, for each reason: they cost four microseconds each. An admission
asks about what it lacks besides, which it would otherwise count as lost at the same cost."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """`cold`: its blocks were about to be forgotten."""

    block_ids: Sequence[int]
    cold: bool


class Offloading:
    """Until `back_with` there is no store, and nothing here costs anything. Blocks held by offers are `num_offered`;
    `num_lost` that the store wanted have been forgotten before they could be offered."""

    def __init__(self, tables: BlockTables) -> None:
        self._tables = tables
        self._pool = tables.pool
        num_blocks = self._pool.num_blocks
        self._window = ceil(num_blocks * WINDOW)
        self._max_ahead = ceil(num_blocks * MAX_AHEAD)
        self._max_offered = max(ceil(num_blocks * MAX_OFFERED), min(MIN_OFFERED, num_blocks // 2))
        self._backing: BackingStore | None = None
        self._offers: dict[PinId, _Offer] = {}
        self._num_offers = 0
        self._num_saved = 0
        """Blocks that offers have given back."""
        self._hurried: list[BlocksOffered] = []
        """Made while a step was planned."""
        self._entered: OrderedDict[int, None] = OrderedDict()
        """Blocks that an eager store has not been asked about."""
        self._overlooked: list[CachedBlock] = []
        self.num_offered = 0
        self.num_lost = 0

    def back_with(self, backing: BackingStore) -> None:
        """Once, before any block is in use."""
        if not isinstance(backing, NoBacking):
            self._backing = backing
            self._tables.watch(self)

    # What the store may bring.

    def num_loadable_tokens(self, sequence: EngineSequence) -> int:
        """Leading tokens of an admitted sequence that the store has, beyond those that are here; 0 if none. At least one
        token of the context is left to compute."""
        if self._backing is None:
            return 0
        block_size = self._tables.block_size
        first, end = sequence.num_computed // block_size, (sequence.context_end - 1) // block_size
        num_loadable = self._backing.num_loadable(sequence.block_hashes[first:end])
        return (first + num_loadable) * block_size if num_loadable else 0

    # What it may keep.

    def entered(self, block_ids: Sequence[int]) -> None:
        if self._backing is not None and self._backing.eager:
            self._entered.update(dict.fromkeys(block_ids))

    def overlooked(self, block: CachedBlock) -> None:
        self._overlooked.append(block)

    def puts_off(self, sequence: EngineSequence, num_blocks: int) -> bool:
        """Whether a sequence for which there is room should still wait for so many new blocks: with them the store would lose
        some of which it has not been asked. It is asked now. A sequence waits once, while blocks are being saved, and until
        as many have been as were lacking at first; for no more than MAX_AHEAD."""
        num_lacking = self._num_lacking(num_blocks)
        if num_lacking <= 0:
            return False
        if sequence.admitted_by is None:
            sequence.admitted_by = self._num_saved + min(num_lacking, self._max_ahead)
        if self._num_saved >= sequence.admitted_by:
            return False
        offers = [*self._offer(self._pool.survey(min(num_lacking, self._room)), cold=True)]
        self._hurried += offers
        # What is offered has left the room that there was.
        return bool(offers) or (self.num_offered > 0 and self._num_lacking(num_blocks) > 0)

    def offers(self, num_waiting_tokens: int) -> list[BlocksOffered]:
        """What is to be saved now. Between two steps, after blocks have been handed out for the next. Sequences that wait for
        theirs have so many tokens."""
        if self._backing is None:
            return []
        if self._overlooked:
            self.num_lost += sum(self._backing.wanted(self._overlooked))
            self._overlooked.clear()
        offers, self._hurried = self._hurried, []
        offers += self._offer(self._just_computed(), cold=False)
        offers += self._offer(self._next_to_go(ceil(num_waiting_tokens / self._tables.block_size)), cold=True)
        return offers

    def saved(self, pin_id: PinId) -> None:
        """The store is done with an offer, whatever came of it. Unknown ids are no error."""
        offer = self._offers.pop(pin_id, None)
        if offer is not None:
            self.num_offered -= len(offer.block_ids)
            self._num_saved += len(offer.block_ids)
            self._pool.release(offer.block_ids, cold=offer.cold)

    def take_back(self) -> None:
        """All offers are void."""
        for pin_id in list(self._offers):
            self.saved(pin_id)

    @property
    def any_returning(self) -> bool:
        """Some blocks will be free without anybody's doing. O(num_offered)."""
        return any(
            self._pool.num_references(block) == 1 for offer in self._offers.values() for block in offer.block_ids
        )

    @property
    def _room(self) -> int:
        return self._max_offered - self.num_offered

    def _num_lacking(self, num_blocks: int) -> int:
        """Blocks of which the store should have been asked before so many are allocated."""
        return self._pool.num_forgotten_by(num_blocks) - self._pool.num_surveyed

    def _just_computed(self) -> list[int]:
        """The next blocks that have entered the prefix cache, as many as there is room for."""
        block_ids: list[int] = []
        while self._entered and len(block_ids) < min(self._room, MAX_CONSIDERED):
            block_id, _ = self._entered.popitem(last=False)
            if self._tables.describe(block_id) is not None:  # it may have been forgotten since
                block_ids.append(block_id)
        return block_ids

    def _next_to_go(self, num_awaited: int) -> list[int]:
        """Blocks to look at now, when so many are waited for. MAX_AHEAD of the pool is clean at most."""
        pool = self._pool
        num_ready = pool.num_empty + pool.num_surveyed + self.num_offered
        num_ready -= min(num_awaited, self._max_ahead - self._window)
        if num_ready > self._window // 2:
            return []
        return pool.survey(min(self._window - num_ready, self._room, MAX_CONSIDERED))

    def _offer(self, block_ids: Sequence[int], *, cold: bool) -> Iterator[BlocksOffered]:
        """Hold what the store wants of these, which have addresses."""
        if not block_ids:
            return
        assert self._backing is not None
        for block_id in block_ids:
            self._entered.pop(block_id, None)
        held = _by_chain(
            (block, block_id) for block_id in block_ids if (block := self._tables.describe(block_id)) is not None
        )
        chosen = [*compress(held, self._backing.wanted([block for block, _ in held]))]
        for start in range(0, len(chosen), MAX_BATCH):
            blocks, ids = zip(*chosen[start : start + MAX_BATCH], strict=True)
            pin_id = PinId(f"offer-{self._num_offers}")
            self._num_offers += 1
            self._pool.share(ids)
            self._offers[pin_id] = _Offer(ids, cold)
            self.num_offered += len(ids)
            yield BlocksOffered(pin_id, blocks, ids)


def _by_chain(held: Iterable[tuple[CachedBlock, int]]) -> list[tuple[CachedBlock, int]]:
    """Blocks that continue each other together, parents before children."""
    chains: list[list[tuple[CachedBlock, int]]] = []
    chain_of: dict[bytes, list[tuple[CachedBlock, int]]] = {}
    for each in sorted(held, key=lambda each: each[0].position):
        chain = chain_of.get(each[0].parent)
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(each)
        chain_of[each[0].block_hash] = chain
    return [each for chain in chains for each in chain]
