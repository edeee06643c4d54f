"""RowTable: which row of the batch tensors belongs to which request. Pure.

A request gets a row with the first step that draws for it and keeps it until it is forgotten. Preempted requests keep
theirs as long as nobody needs it: what a row holds can be written again, so the request that was longest without a step
gives way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.ids import RequestId


@dataclass(frozen=True, slots=True)
class Placement:
    """`rows[i]` belongs to the i-th request; `new` are the places in `rows` of those that had none before."""

    rows: tuple[int, ...]
    new: tuple[int, ...]


class RowTable:
    """Rows 0 to num_rows - 1. Row num_rows is nobody's: what pads a batch reads and writes it."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._free = list(range(num_rows - 1, -1, -1))  # the lowest is given out first
        self._rows: dict[RequestId, int] = {}  # least recently placed first

    @property
    def padding_row(self) -> int:
        return self._num_rows

    def place(self, request_ids: Sequence[RequestId]) -> Placement:
        """A row for each of these, all distinct. Raises ValueError for more requests than there are rows."""
        if len(request_ids) > self._num_rows:
            raise ValueError(f"{len(request_ids)} requests draw a token in a batch of {self._num_rows} rows")
        known = [self._rows.pop(request_id, None) for request_id in request_ids]
        for request_id, row in zip(request_ids, known, strict=True):
            if row is not None:
                self._rows[request_id] = row
        new = tuple(place for place, row in enumerate(known) if row is None)
        for place in new:
            self._rows[request_ids[place]] = self._take()
        return Placement(tuple(self._rows[request_id] for request_id in request_ids), new)

    def forget(self, request_id: RequestId) -> int | None:
        """Its row, which is free now; None for unknown ids."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._free.append(row)
        return row

    def _take(self) -> int:
        if not self._free:
            self.forget(next(iter(self._rows)))
        return self._free.pop()
