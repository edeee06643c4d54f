"""WorkerRegistry: who is registered, fenced by incarnation, seen from outside as an immutable snapshot.

A worker enters by registering, stays by heartbeats, and goes by leaving, by silence, or by a newer incarnation of the same
name. An incarnation that a newer one replaced never comes back, so that two processes with the same name cannot
take turns.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from protocol.errors import InvalidParameter, ModelNotFound, ProtocolError
from protocol.ids import Incarnation, WorkerId
from protocol.kv_layout import KVLayout
from protocol.wire import check_wire_version
from protocol.workers import Heartbeat, Role, WorkerInfo, WorkerLoad
from runtime.clock import Clock

MAX_REMEMBERED_INCARNATIONS = 4096


@dataclass(frozen=True, slots=True)
class Worker:
    """One registered incarnation. `load` as of the last heartbeat; `leaving`: nothing new is to go there."""

    info: WorkerInfo
    load: WorkerLoad
    leaving: bool = False

    @property
    def worker_id(self) -> WorkerId:
        return WorkerId(self.info.worker_id)

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(self.info.incarnation)

    @property
    def role(self) -> Role:
        return self.info.role

    @property
    def admits(self) -> bool:
        return not self.leaving and not self.load.draining


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All workers at one moment, in order of registration."""

    workers: tuple[Worker, ...] = ()

    @property
    def layout(self) -> KVLayout | None:
        """The layout that all workers share, None while there is none."""
        return self.workers[0].info.layout if self.workers else None


class WorkerRegistry:
    def __init__(self, served_name: str, timeout_s: float, clock: Clock) -> None:
        self._served_name = served_name
        self._timeout_s = timeout_s
        self._clock = clock
        self._workers: dict[WorkerId, Worker] = {}
        self._heard: dict[WorkerId, float] = {}
        self._replaced: OrderedDict[Incarnation, None] = OrderedDict()
        self._snapshot = Snapshot()

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def get(self, incarnation: Incarnation) -> Worker | None:
        return next((worker for worker in self._snapshot.workers if worker.incarnation == incarnation), None)

    def check(self, info: WorkerInfo) -> None:
        """Raise WireVersionMismatch, ModelNotFound, LayoutMismatch or ProtocolError if this worker cannot be one of ours."""
        check_wire_version(info.wire_version, f"{info.role} node {info.worker_id}")
        if Incarnation(info.incarnation) in self._replaced:
            raise ProtocolError(
                f"another process has registered as {info.worker_id} since; give every node its own worker_id",
                param="worker_id",
            )
        if info.served_model != self._served_name:
            raise ModelNotFound(
                f"this router serves {self._served_name!r}, node {info.worker_id} offers {info.served_model!r}",
                param="served_name",
            )
        if info.num_blocks < 1 or info.max_model_len < 2 or info.vocab_size < 1:
            raise InvalidParameter(f"node {info.worker_id} has no KV blocks, context or vocabulary", param="num_blocks")
        for other in self._snapshot.workers:
            if other.worker_id != info.worker_id:
                other.info.layout.check_compatible(info.layout, f"{info.role} node {info.worker_id}")

    def register(self, info: WorkerInfo) -> Worker | None:
        """Take a worker in. Returns the incarnation that it replaces, if any. Raises as `check`; registering the same
        incarnation again is no error."""
        self.check(info)
        worker_id = WorkerId(info.worker_id)
        known = self._workers.get(worker_id)
        self._heard[worker_id] = self._clock.now()
        if known is not None and known.incarnation == info.incarnation:
            self._put(replace(known, info=info, leaving=False))
            return None
        if known is not None:
            self._replaced[known.incarnation] = None
            if len(self._replaced) > MAX_REMEMBERED_INCARNATIONS:
                self._replaced.popitem(last=False)
        nothing = WorkerLoad(
            running=0, waiting=0, waiting_tokens=0, free_blocks=info.num_blocks, steps=0, draining=False
        )
        self._put(Worker(info, nothing))
        return known

    def heartbeat(self, message: Heartbeat) -> Worker | None:
        """Note a sign of life. None: that incarnation is not registered."""
        worker_id = WorkerId(message.worker_id)
        known = self._workers.get(worker_id)
        if known is None or known.incarnation != message.incarnation:
            return None
        self._heard[worker_id] = self._clock.now()
        worker = replace(known, load=message.load)
        self._put(worker)
        return worker

    def leave(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        """Nothing new goes there; what runs there goes on. An unknown worker is no error."""
        known = self._workers.get(worker_id)
        if known is not None and known.incarnation == incarnation:
            self._put(replace(known, leaving=True))

    def remove(self, incarnation: Incarnation) -> None:
        """Forget a worker. It may register again."""
        self._drop([worker for worker in self._workers.values() if worker.incarnation == incarnation])

    def expire(self) -> list[Worker]:
        """Forget the workers that have been silent for too long, and say which."""
        since = self._clock.now() - self._timeout_s
        lost = [worker for worker_id, worker in self._workers.items() if self._heard[worker_id] < since]
        self._drop(lost)
        return lost

    def _drop(self, workers: Iterable[Worker]) -> None:
        for worker in workers:
            del self._workers[worker.worker_id]
            del self._heard[worker.worker_id]
        self._snapshot = Snapshot(tuple(self._workers.values()))

    def _put(self, worker: Worker) -> None:
        self._workers[worker.worker_id] = worker
        self._snapshot = Snapshot(tuple(self._workers.values()))
