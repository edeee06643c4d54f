"""HostCopier: a BlockCopier between a KV cache that is in host memory itself and the slots of a host tier."""

from collections.abc import Sequence

import numpy as np

from kv_store.tiers import BlockMemory


class HostCopier:
    """`cache` and `slots` have blocks of one size. numpy lets go of the GIL while it copies."""

    def __init__(self, cache: BlockMemory, slots: BlockMemory) -> None:
        if cache.block_bytes != slots.block_bytes:
            raise ValueError(f"blocks of {cache.block_bytes} bytes do not fit slots of {slots.block_bytes}")
        self._cache = cache
        self._slots = slots

    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        for block_id, slot in zip(block_ids, slots, strict=True):
            _copy(self._cache.block(block_id), self._slots.block(slot))

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        for slot, block_id in zip(slots, block_ids, strict=True):
            _copy(self._slots.block(slot), self._cache.block(block_id))


def _copy(source: memoryview, target: memoryview) -> None:
    np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))
