"""A prefix cache as a lender sees it: addresses, the blocks that hold them, and what is pinned. For tests."""

import asyncio
from collections.abc import Sequence

from kv_transfer.handoff.exports import ExportTable
from kv_transfer.lending.lender import Lender
from protocol.ids import BlockHash, PinId


class CachedBlocks:
    """With `answers` False it is an engine that is busy with a long step."""

    def __init__(self, exports: ExportTable, block_size: int, num_blocks: int, timeout_s: float) -> None:
        self.block_of: dict[BlockHash, int] = {}
        self.pins: dict[PinId, tuple[int, ...]] = {}
        self.answers = True
        self._unanswered: list[tuple[PinId, tuple[BlockHash, ...]]] = []
        self.lender = Lender(
            exports,
            block_size=block_size,
            num_blocks=num_blocks,
            pin=self._pin,
            unpin=lambda pin_id: self.pins.pop(pin_id, None) and None,
            timeout_s=timeout_s,
        )

    def hold(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> None:
        self.block_of.update(zip(block_hashes, block_ids, strict=True))

    def answer(self) -> None:
        """What was asked for while it did not answer."""
        while self._unanswered:
            pin_id, block_hashes = self._unanswered.pop(0)
            held = []
            for block_hash in block_hashes:
                if block_hash not in self.block_of:
                    break
                held.append(self.block_of[block_hash])
            self.pins[pin_id] = tuple(held)
            self.lender.pinned(pin_id, held)

    def _pin(self, pin_id: PinId, block_hashes: tuple[BlockHash, ...]) -> None:
        self._unanswered.append((pin_id, block_hashes))
        if self.answers:
            asyncio.get_running_loop().call_soon(self.answer)
