"""SlotCopier: KV blocks of a device to the slots of a store's host tier and back, while steps compute.

Slots that follow one another cross the bus as one piece, whatever blocks they hold. What is copied out is final and what is
copied in is reserved, so that nothing here waits for a step.
"""

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from engine.cuda.offload_stream import CopyHandle, OffloadStream


class SlotCopier:
    """`slots` is pinned host memory, uint8 [num_slots, block_bytes]. Made by DeviceBlocks.slot_copier. Any thread.

    Both calls block until nothing is copied any more, also where they raise: IndexError for a block or a slot that is not
    there, ValueError where one place would be written twice, and whatever the device raises.
    """

    def __init__(self, slots: torch.Tensor, offload: OffloadStream, submitting: threading.Lock) -> None:
        self._slots = slots
        self._offload = offload
        self._submitting = submitting

    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        """Block `block_ids[i]` to slot `slots[i]`."""
        self._check(block_ids, slots, written=slots)
        self._copy(lambda piece, ids: self._offload.copy_out(ids, piece, after_steps=False), slots, block_ids)

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        """Slot `slots[i]` to block `block_ids[i]`."""
        self._check(block_ids, slots, written=block_ids)
        self._copy(lambda piece, ids: self._offload.copy_in(piece, ids, after_steps=False), slots, block_ids)

    def _copy(
        self,
        submit: Callable[[torch.Tensor, Sequence[int]], CopyHandle],
        slots: Sequence[int],
        block_ids: Sequence[int],
    ) -> None:
        handles: list[CopyHandle] = []
        try:
            with self._submitting:
                for start, end in consecutive_runs(slots):
                    piece = self._slots[slots[start] : slots[end - 1] + 1]
                    handles.append(submit(piece, block_ids[start:end]))
        finally:
            _wait_for(handles)

    def _check(self, block_ids: Sequence[int], slots: Sequence[int], written: Sequence[int]) -> None:
        """Before anything is copied."""
        num_slots = self._slots.shape[0]
        if len(block_ids) != len(slots) or len(set(written)) != len(written):
            raise ValueError(f"{len(block_ids)} blocks and {len(slots)} slots, or one is to be written twice")
        if not all(0 <= slot < num_slots for slot in slots):
            raise IndexError(f"not all of {slots} are in a tier of {num_slots} slots")


def consecutive_runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Where runs of consecutive ids begin and end in the sequence: each crosses the bus as one piece."""
    starts = [place for place in range(len(ids)) if place == 0 or ids[place] != ids[place - 1] + 1]
    return list(pairwise([*starts, len(ids)]))


def _wait_for(handles: Sequence[CopyHandle]) -> None:
    """Until all have ended. Raises what the first of them raised that did."""
    error: Exception | None = None
    for handle in handles:
        try:
            handle.wait()
        except Exception as raised:  # noqa: BLE001 - raised again when no copy is under way any more
            error = error or raised
    if error is not None:
        raise error
