"""WaitingQueue: sequences not yet admitted, oldest first. Every operation is O(1).

Imports, of a whole context or of its beginning, stand in a line of their own, because they need no compute as yet: while
prefill is busy with older prompts they may pass those that wait for compute. Nobody passes a sequence that waits for room.
"""

from collections import OrderedDict

from engine.sequence import Sequence
from protocol.ids import RequestId


class WaitingQueue:
    def __init__(self) -> None:
        self._compute: OrderedDict[RequestId, Sequence] = OrderedDict()
        self._imports: OrderedDict[RequestId, Sequence] = OrderedDict()
        self.num_tokens = 0
        """Context tokens of all of them."""
        self.num_compute_tokens = 0
        """Of those, what is to be computed here."""

    def __len__(self) -> int:
        return len(self._compute) + len(self._imports)

    def push(self, sequence: Sequence) -> None:
        self._line(sequence)[sequence.request_id] = sequence
        self._count(sequence, 1)

    def push_front(self, sequence: Sequence) -> None:
        """A preempted sequence was admitted before and comes first again."""
        self.push(sequence)
        self._line(sequence).move_to_end(sequence.request_id, last=False)

    def remove(self, sequence: Sequence) -> None:
        del self._line(sequence)[sequence.request_id]
        self._count(sequence, -1)

    def head(self, *, may_compute: bool) -> Sequence | None:
        """The next one to admit; only an import if there is no compute left to give."""
        first_import = next(iter(self._imports.values()), None)
        first_compute = next(iter(self._compute.values()), None) if may_compute else None
        if first_import is None or first_compute is None:
            return first_import or first_compute
        return min(first_import, first_compute, key=lambda sequence: sequence.arrival)

    def _count(self, sequence: Sequence, sign: int) -> None:
        self.num_tokens += sign * sequence.context_end
        self.num_compute_tokens += sign * (sequence.context_end - sequence.import_end)

    def _line(self, sequence: Sequence) -> OrderedDict[RequestId, Sequence]:
        return self._imports if sequence.awaits_import else self._compute
