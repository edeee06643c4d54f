"""SlotStaging: the slots of a host tier as wire blocks, announced with the checksums that the tier has kept of them.

A slot's checksum was computed when its block entered the store, and is what a reader is told. So what has changed in memory
since does not pass for the block: the reader finds out, and computes it anew. Nothing is read to be lent.
"""

from collections.abc import Callable, Sequence

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.staging import HostStaging, StagedBlocks


class SlotStaging(HostStaging):
    """`checksum_of(slot)`, of a slot that is held for a reader: any thread."""

    def __init__(self, arena: HostArena, checksum_of: Callable[[int], int]) -> None:
        super().__init__(arena)
        self._checksum_of = checksum_of

    def stage_at_once(self, block_ids: Sequence[int]) -> StagedBlocks | None:
        return StagedBlocks(tuple(block_ids), tuple(self._checksum_of(slot) for slot in block_ids))

    async def stage(self, block_ids: Sequence[int]) -> StagedBlocks:
        staged = self.stage_at_once(block_ids)
        assert staged is not None
        return staged
