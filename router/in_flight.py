"""InFlight: what this router has sent to each worker and not yet seen finished. Counted before the message goes out, so that
two decisions made in the same moment do not both see an idle node.

What a worker reports beyond our own share is other routers' work: the difference at the moment of its heartbeat.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from protocol.ids import Incarnation
from protocol.workers import WorkerLoad


@dataclass(slots=True)
class _Share:
    prefill_tokens: int = 0
    sequences: int = 0
    foreign_tokens: int = 0
    foreign_sequences: int = 0


class InFlight:
    def __init__(self) -> None:
        self._shares: dict[Incarnation, _Share] = {}

    def add_worker(self, incarnation: Incarnation) -> None:
        self._shares.setdefault(incarnation, _Share())

    def remove_worker(self, incarnation: Incarnation) -> None:
        self._shares.pop(incarnation, None)

    def heard(self, incarnation: Incarnation, load: WorkerLoad) -> None:
        """A worker's own account. What exceeds ours is somebody else's."""
        share = self._shares.get(incarnation)
        if share is not None:
            share.foreign_tokens = max(0, load.waiting_tokens - share.prefill_tokens)
            share.foreign_sequences = max(0, load.running + load.waiting - share.sequences)

    def prefill_tokens(self, incarnation: Incarnation) -> int:
        share = self._shares.get(incarnation)
        return 0 if share is None else share.prefill_tokens + share.foreign_tokens

    def sequences(self, incarnation: Incarnation) -> int:
        share = self._shares.get(incarnation)
        return 0 if share is None else share.sequences + share.foreign_sequences

    @contextmanager
    def sequence(self, incarnation: Incarnation) -> Iterator[None]:
        """One more sequence at a worker, until the end of the block."""
        share = self._shares.get(incarnation, _Share())
        share.sequences += 1
        try:
            yield
        finally:
            share.sequences -= 1

    @contextmanager
    def prefill(self, incarnation: Incarnation, num_tokens: int) -> Iterator[None]:
        """So many prompt tokens to compute at a worker, until the end of the block."""
        share = self._shares.get(incarnation, _Share())
        share.prefill_tokens += num_tokens
        try:
            yield
        finally:
            share.prefill_tokens -= num_tokens
