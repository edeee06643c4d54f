"""Offers: blocks that the engine is about to forget, on their way into the store.

    BlocksOffered ──▶ save ──▶ Engine.saved, whatever came of it

Used as `async with`, inside the store: leaving it waits for the saves under way, so that nothing reads the device's blocks
afterwards. Event loop only, but for what `listening` makes.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from engine.events import BlocksOffered, EngineEvent
from kv_store.store import KVStore
from protocol.ids import PinId

Receive = Callable[[list[EngineEvent]], None]


class OfferingEngine(Protocol):
    """See engine.engine."""

    def saved(self, pin_id: PinId) -> None: ...


class Offers:
    def __init__(self, store: KVStore, engine: OfferingEngine) -> None:
        self._store = store
        self._engine = engine
        self._saving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._saving:
            await asyncio.wait(self._saving)

    def listening(self, loop: asyncio.AbstractEventLoop, receive: Receive) -> Receive:
        """`receive`, for an engine whose offers are taken here."""

        def hand_on(events: list[EngineEvent]) -> None:
            offers = [event for event in events if isinstance(event, BlocksOffered)]
            if offers and not loop.is_closed():
                loop.call_soon_threadsafe(self.take, offers)
            receive(events)

        return hand_on

    def take(self, offers: Sequence[BlocksOffered]) -> None:
        for offer in offers:
            task = asyncio.create_task(self._save(offer), name=f"kv-save:{offer.pin_id}")
            self._saving.add(task)
            task.add_done_callback(self._saving.discard)

    async def _save(self, offer: BlocksOffered) -> None:
        try:
            await self._store.save(offer.blocks, offer.block_ids)
        finally:
            self._engine.saved(offer.pin_id)
