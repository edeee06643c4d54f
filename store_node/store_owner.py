"""StoreOwner: a store as the owner of blocks that an exchange lends (kv_transfer.exchange.BlockOwner).

    pin ──▶ held by the store, promoted from disk if need be ──▶ pinned(slots) ──┬──▶ unpin
                                             a reader calls a block damaged: inspect ──┘

A reader's word is believed as far as the store's own checksums bear it out: if the block that it names is right, that was
all; if not, the rest of the loan is read as well, because memory that fails seldom fails in one place. So a reader that lies
costs one block's checksum, and takes nothing away.

Used as `async with`, inside the store: leaving it ends what is being held on nobody's behalf. Event loop only.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self

from kv_store.entries import Held
from kv_store.store import KVStore
from protocol.ids import BlockHash, PinId, RequestId

log = logging.getLogger(__name__)


class StoreOwner:
    """`on_pinned` is set before anybody asks: the lender's ear."""

    prefill_tokens_per_s: float | None = None
    """It computes nothing."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self._held: dict[PinId, Held] = {}
        self._checksums: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_pinned: Callable[[PinId, Sequence[int]], None] = _nobody_asks

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for pin_id in list(self._held):
            self.unpin(pin_id)

    def checksum_of(self, slot: int) -> int:
        """Of a slot that is held."""
        return self._checksums[slot]

    def release(self, request_id: RequestId) -> None:
        """No request of a store's exports anything: it only lends."""

    def pin(self, pin_id: PinId, block_hashes: tuple[BlockHash, ...]) -> None:
        self._start(self._hold(pin_id, block_hashes), f"kv-hold:{pin_id}")

    def unpin(self, pin_id: PinId) -> None:
        """Unknown ids are no error: what is being held for them is given back when it is asked about."""
        held = self._held.pop(pin_id, None)
        if held is not None:
            self._store.let_go(held)

    def inspect(self, pin_id: PinId, index: int) -> None:
        """A reader says that block `index` of its loan came damaged. Unknown loans and blocks are no error."""
        held = self._held.get(pin_id)
        if held is not None and index < len(held.blocks):
            hashes = [BlockHash(block.block_hash) for block in held.blocks]
            self._start(self._inspect(hashes, index), f"kv-inspect:{pin_id}")

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _inspect(self, block_hashes: Sequence[BlockHash], index: int) -> None:
        try:
            if await self._store.inspect(block_hashes[index : index + 1]):
                await self._store.inspect([*block_hashes[:index], *block_hashes[index + 1 :]])
        except Exception:
            log.exception("reading %d blocks that may be damaged failed", len(block_hashes))

    async def _hold(self, pin_id: PinId, block_hashes: tuple[BlockHash, ...]) -> None:
        try:
            held = await self._store.hold(block_hashes)
        except Exception:
            log.exception("%s: holding %d blocks failed", pin_id, len(block_hashes))
            self.on_pinned(pin_id, ())
            return
        self._held[pin_id] = held
        self._checksums.update(zip(held.slots, held.checksums, strict=True))
        self.on_pinned(pin_id, held.slots)


def _nobody_asks(_pin_id: PinId, _slots: Sequence[int]) -> None:
    raise AssertionError("nobody was to ask for blocks before there is a lender")
