"""PersistentBatch: the tensors of a step that outlive it, and how the host changes them.

On the device, for as long as the runner: a block table and the last drawn token of every row, and the columns that
describe one decode step. A step copies its columns there and writes only those entries of the tables that have changed.
Captured graphs read these tensors and no others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.cuda.device import Device
from engine.runner import ScheduledChunk


class StepColumns:
    """One decode step's inputs, one entry for each of its padded rows: int64 [5, max_rows] in one memory."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.rows, self.token_ids, self.positions, self.slots, self.output_positions = memory.unbind(0)

    @classmethod
    def on_device(cls, max_rows: int, device: torch.device) -> "StepColumns":
        return cls(torch.zeros((5, max_rows), dtype=torch.int64, device=device))

    @classmethod
    def on_host(cls, max_rows: int, device: Device) -> "StepColumns":
        return cls(device.pinned((5, max_rows), torch.int64))

    def fill(
        self, chunks: Sequence[ScheduledChunk], rows: Sequence[int], num_rows: int, padding_row: int, block_size: int
    ) -> None:
        """Host side: one-token chunks, padded to `num_rows`. A padding row has slot -1, and so no context."""
        columns = self.memory.numpy()
        columns[:, len(chunks) : num_rows] = np.array([padding_row, 0, 0, -1, 0])[:, None]
        for place, (chunk, row) in enumerate(zip(chunks, rows, strict=True)):
            block, offset = divmod(chunk.start, block_size)
            slot = chunk.block_ids[block] * block_size + offset
            columns[:, place] = (row, chunk.token_ids[0], chunk.start, slot, chunk.output_position)

    def copy_from(self, source: "StepColumns") -> None:
        """All columns, in one copy that the host does not wait for. Device work."""
        self.memory.copy_(source.memory, non_blocking=True)


@dataclass(frozen=True, slots=True)
class TableChanges:
    """Entries of the block tables to write: places in the flattened table, and block ids."""

    places: npt.NDArray[np.int64]
    block_ids: npt.NDArray[np.int32]


class BlockTableRows:
    """What the host knows of the device's block tables, so that it sends only what differs."""

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._known: list[list[int]] = [[] for _ in range(num_rows)]

    def update(self, chunks: Sequence[ScheduledChunk], rows: Sequence[int]) -> TableChanges | None:
        """What brings these rows up to these chunks' tables; None if nothing does. A decode adds a block now and then; a
        request that is new in its row, or was preempted and came back, brings a table of its own."""
        places: list[npt.NDArray[np.int64]] = []
        values: list[npt.NDArray[np.int32]] = []
        for chunk, row in zip(chunks, rows, strict=True):
            known, block_ids = self._known[row], list(chunk.block_ids)
            num_known = len(known) if block_ids[: len(known)] == known else 0
            if num_known < len(block_ids):
                first = row * self._max_blocks
                places.append(np.arange(first + num_known, first + len(block_ids)))
                values.append(np.array(block_ids[num_known:], np.int32))
            self._known[row] = block_ids
        return TableChanges(np.concatenate(places), np.concatenate(values)) if places else None

    def forget(self, row: int) -> None:
        """The device's entries are not known any more."""
        self._known[row] = []


class PersistentBatch:
    """Tensors on the device, for `max_rows` rows and one more for padding, contexts of at most `max_blocks` blocks."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self.block_tables = torch.zeros((max_rows + 1, max_blocks), dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.columns = StepColumns.on_device(max_rows, device)
        self.query_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)  # of one-token queries
        self.every_row = torch.arange(max_rows, dtype=torch.int64, device=device)

    def write_tables(self, changes: TableChanges, device: Device) -> None:
        """Device work."""
        places, block_ids = torch.from_numpy(changes.places), torch.from_numpy(changes.block_ids)
        self.block_tables.view(-1).index_copy_(0, device.upload(places), device.upload(block_ids))
