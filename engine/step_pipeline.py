"""StepPipeline: steps from their launch to their results. At most two are in flight, and they end in order.

What a sequence has in flight is counted here and nowhere else. A step that raised is taken apart: the step behind it, which
may go on from what it failed to compute, is waited for and dropped, and then each of its sequences is tried alone, so that
one that the runner cannot compute ends alone. Running a chunk again writes the same KV into the same blocks.
"""

import logging
from collections import deque
from dataclasses import dataclass, replace

from engine.runner import LaunchedStep, Runner, ScheduledChunk, StepPlan, StepResult
from engine.scheduler import Schedule
from engine.sequence import Sequence
from protocol.errors import HeadraceError, InternalError
from protocol.tokens import SampledToken
from runtime.clock import Clock

MAX_IN_FLIGHT = 2

Sampled = tuple[SampledToken, ...] | HeadraceError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CollectedStep:
    """A step that has ended. `dropped` are the sequences of the step behind it, where that was dropped. The device was busy
    with it between the two instants."""

    schedule: Schedule
    result: StepResult
    dropped: tuple[Sequence, ...]
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class _Flight:
    schedule: Schedule
    launched: LaunchedStep
    launched_at: float


@dataclass(frozen=True, slots=True)
class _FailedLaunch:
    """A step that raised before it was on its way."""

    error: Exception

    def result(self) -> StepResult:
        raise self.error


class StepPipeline:
    def __init__(self, runner: Runner, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock
        self._flights: deque[_Flight] = deque()
        self._last_ended_at = -float("inf")

    def __len__(self) -> int:
        """Steps in flight."""
        return len(self._flights)

    def launch(self, schedule: Schedule) -> None:
        assert len(self._flights) < MAX_IN_FLIGHT, "a third step in flight"
        launched_at = self._clock.now()
        launched = self._launch(schedule.plan)
        for sequence, chunk in zip(schedule.sequences, schedule.plan.chunks, strict=True):
            sequence.num_steps_in_flight += 1
            sequence.num_tokens_in_flight += len(chunk.token_ids)
            sequence.num_draws_in_flight += chunk.samples
        self._flights.append(_Flight(schedule, launched, launched_at))

    def collect(self) -> CollectedStep:
        """Wait for the oldest step. It counts as in flight no more."""
        flight = self._flights.popleft()
        schedule = flight.schedule
        dropped: tuple[Sequence, ...] = ()
        try:
            result = _checked(flight.launched, schedule.plan)
        except Exception:
            ids = [chunk.request_id for chunk in schedule.plan.chunks]
            log.exception("a step of %d sequences failed: %s", len(ids), ids)
            dropped = self.drop()
            result = self._compute_apart(schedule)
        _land(schedule)
        started_at = max(flight.launched_at, self._last_ended_at)
        self._last_ended_at = self._clock.now()
        return CollectedStep(schedule, result, dropped, started_at, self._last_ended_at)

    def drop(self) -> tuple[Sequence, ...]:
        """Wait for every step in flight, as if it had never been. Returns the sequences that it was of."""
        dropped: list[Sequence] = []
        while self._flights:
            flight = self._flights.popleft()
            try:
                flight.launched.result()
            except Exception:
                log.warning("a step failed whose results nobody wants", exc_info=True)
            _land(flight.schedule)
            dropped += flight.schedule.sequences
        return tuple(dropped)

    def _launch(self, plan: StepPlan) -> LaunchedStep:
        try:
            return self._runner.launch(plan)
        except Exception as error:  # noqa: BLE001 - it is raised again by `result`
            return _FailedLaunch(error)

    def _compute_apart(self, schedule: Schedule) -> StepResult:
        """The results of a step that failed, from its sequences one by one, or InternalError for one that was alone."""
        pairs = list(zip(schedule.sequences, schedule.plan.chunks, strict=True))
        if len(pairs) == 1:
            return StepResult((_step_failed(),))
        return StepResult(tuple(self._compute_alone(sequence, chunk) for sequence, chunk in pairs))

    def _compute_alone(self, sequence: Sequence, chunk: ScheduledChunk) -> Sampled:
        if not sequence.computing:
            return ()  # it has ended meanwhile
        end = chunk.start + len(chunk.token_ids)
        # The runner's last token of a sequence may by now be that of a dropped step, and the block table has grown for it.
        known = sequence.token_ids[chunk.start : end - chunk.num_drafts]
        block_ids = sequence.block_ids[: self._runner.layout.num_blocks_for(end)]
        plan = StepPlan((replace(chunk, token_ids=[*known, *chunk.drafts], block_ids=block_ids),))
        try:
            return _checked(self._runner.launch(plan), plan).sampled[0]
        except Exception:
            log.exception("request %s cannot be computed", chunk.request_id)
            return _step_failed()


def _checked(launched: LaunchedStep, plan: StepPlan) -> StepResult:
    result = launched.result()
    if len(result.sampled) != len(plan.chunks):
        raise RuntimeError(f"{len(result.sampled)} results for {len(plan.chunks)} chunks")
    return result


def _land(schedule: Schedule) -> None:
    for sequence, chunk in zip(schedule.sequences, schedule.plan.chunks, strict=True):
        sequence.num_steps_in_flight -= 1
        sequence.num_tokens_in_flight -= len(chunk.token_ids)
        sequence.num_draws_in_flight -= chunk.samples


def _step_failed() -> InternalError:
    return InternalError("computing this sequence failed; see the node's log")
