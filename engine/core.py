"""EngineCore: the engine without its thread. Commands and steps change it; events and the load come out of it.

A command takes effect at once. A step is `schedule`, then `run`. What happened is collected in order until `take_events`.
Tests and simulations drive it by hand; engine.Engine gives it a thread of its own.
"""

import logging
import math
from collections.abc import Iterable

from engine.admission import max_sequence_tokens
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.events import EngineEvent
from engine.kv_event_log import KVEventLog
from engine.load import EngineLoad
from engine.outcomes import Outcomes
from engine.request import EngineRequest
from engine.runner import Runner, ScheduledChunk, StepPlan, StepResult
from engine.scheduler import Schedule, Scheduler
from engine.sequence import Sequence, State
from protocol.errors import Cancelled, DeadlineExceeded, HeadraceError, InternalError
from protocol.ids import RequestId
from protocol.tokens import SampledToken
from runtime.clock import Clock

log = logging.getLogger(__name__)


class EngineCore:
    """Requests have passed engine.admission.check_request. Unknown request ids are no-ops: they are of sequences that
    have left."""

    def __init__(self, runner: Runner, config: EngineConfig, clock: Clock, kv_events: KVEventLog) -> None:
        self._runner = runner
        self._clock = clock
        self._tables = BlockTables(
            runner.layout, runner.num_blocks, kv_events, enable_prefix_cache=config.enable_prefix_cache
        )
        self._scheduler = Scheduler(config, runner.layout, self._tables)
        self._outcomes = Outcomes(runner, self._scheduler, self._tables, max_sequence_tokens(runner))
        self._sequences = self._outcomes.sequences
        self._next_arrival = 0
        self._next_deadline_at = math.inf
        self._steps = 0

    # Commands.

    def submit(self, request: EngineRequest, submitted_at: float) -> None:
        assert request.request_id not in self._sequences, f"{request.request_id} is here already"
        sequence = Sequence(request, self._next_arrival, submitted_at)
        self._next_arrival += 1
        self._next_deadline_at = min(self._next_deadline_at, sequence.deadline_at)
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_ids: Iterable[RequestId]) -> None:
        for request_id in request_ids:
            sequence = self._sequences.get(request_id)
            if sequence is None:
                continue
            if sequence.state is State.HELD:
                self._outcomes.leave(sequence)
            else:
                self._outcomes.fail(sequence, Cancelled("the request was cancelled"))

    def release(self, request_id: RequestId) -> None:
        """Nobody needs the blocks of a PREFILL_ONLY request any more. One that still runs goes on, but is not held."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if sequence.state is State.HELD:
            self._outcomes.leave(sequence)
        else:
            sequence.released_early = True

    def activate(self, request_id: RequestId, first_token: SampledToken, computed_at: float | None) -> None:
        """The context of an IMPORT request is in its blocks. `computed_at`: when the other node ended its last chunk,
        by our clock; None if that is unknown, and the hand-off then counts from now."""
        sequence = self._import(request_id)
        if sequence is None:
            return
        sequence.num_computed = sequence.context_end
        self._tables.index(sequence)
        if sequence.state is State.ORPHANED:
            self._outcomes.leave(sequence)
            return
        now = self._clock.now()
        sequence.times.computed_at = now if computed_at is None else computed_at
        self._scheduler.imported(sequence)
        self._outcomes.emit_token(sequence, first_token, now)

    def abandon_import(self, request_id: RequestId, num_valid_tokens: int, error: HeadraceError) -> None:
        """The context did not arrive. Its first `num_valid_tokens` tokens did, and their full blocks are kept."""
        sequence = self._import(request_id)
        if sequence is None:
            return
        sequence.num_computed = max(sequence.num_computed, min(num_valid_tokens, sequence.context_end))
        self._tables.index(sequence)
        self._outcomes.fail(sequence, error)
        self._outcomes.leave(sequence)

    def clear_prefix_cache(self) -> None:
        self._tables.clear_prefix_cache()

    def close(self, error: HeadraceError) -> None:
        """Fail whatever is left and free every block, also those of transfers under way."""
        for sequence in list(self._sequences.values()):
            self._outcomes.fail(sequence, error)
            if sequence.request_id in self._sequences:
                self._outcomes.leave(sequence)

    # Steps.

    def schedule(self) -> Schedule | None:
        """Expire, admit and plan. None if there is nothing to run before the next command or deadline."""
        now = self._clock.now()
        if now >= self._next_deadline_at:
            self._expire(now)
        schedule = self._scheduler.schedule()
        for sequence in schedule.admitted:
            self._outcomes.admitted(sequence, now)
        return schedule if schedule.plan.chunks else None

    def run(self, schedule: Schedule) -> None:
        """Compute a step that was just scheduled."""
        started_at = self._clock.now()
        result = self._compute(schedule)
        ended_at = self._clock.now()
        self._steps += 1
        for sequence, chunk, sampled in zip(schedule.sequences, schedule.plan.chunks, result.sampled, strict=True):
            if isinstance(sampled, HeadraceError):
                self._outcomes.fail(sequence, sampled)
                continue
            self._outcomes.computed(sequence, chunk)
            if chunk.samples and sampled is None:
                self._outcomes.fail(sequence, InternalError("the runner drew no token for a chunk that samples"))
            elif chunk.samples and sampled is not None:
                self._outcomes.sampled(sequence, sampled, started_at, ended_at)

    # What comes out.

    def take_events(self) -> list[EngineEvent]:
        events, self._outcomes.events = self._outcomes.events, []
        return events

    def take_departed(self) -> list[RequestId]:
        """Sequences that have left since the last call: their ids may be used again."""
        departed, self._outcomes.departed = self._outcomes.departed, []
        return departed

    @property
    def next_deadline_at(self) -> float:
        """No sequence expires before; infinity if there is none."""
        return self._next_deadline_at

    def load(self) -> EngineLoad:
        scheduler, outcomes = self._scheduler, self._outcomes
        return EngineLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_tokens=scheduler.num_waiting_tokens,
            num_importing=len(scheduler.importing) + len(scheduler.orphans),
            num_held=len(scheduler.held),
            free_blocks=self._tables.pool.num_free,
            total_blocks=self._tables.pool.num_blocks,
            steps=self._steps,
            computed_prompt_tokens=outcomes.num_computed_tokens,
            cached_prompt_tokens=outcomes.num_cached_tokens,
            sampled_tokens=outcomes.num_sampled_tokens,
            preemptions=scheduler.num_preemptions,
        )

    def _import(self, request_id: RequestId) -> Sequence | None:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state not in (State.IMPORTING, State.ORPHANED):
            log.warning("%s: an import ended that is not under way", request_id)
            return None
        return sequence

    def _compute(self, schedule: Schedule) -> StepResult:
        """The runner's result. If it raises, each sequence is tried alone, so that one that it cannot compute ends alone:
        running a chunk again writes the same KV into the same blocks."""
        chunks = schedule.plan.chunks
        try:
            return self._checked_run(schedule.plan)
        except Exception:
            log.exception("a step of %d sequences failed: %s", len(chunks), [chunk.request_id for chunk in chunks])
        if len(chunks) == 1:
            return StepResult((_step_failed(),))
        return StepResult(tuple(self._compute_alone(chunk) for chunk in chunks))

    def _compute_alone(self, chunk: ScheduledChunk) -> SampledToken | HeadraceError | None:
        try:
            return self._checked_run(StepPlan((chunk,))).sampled[0]
        except Exception:
            log.exception("request %s cannot be computed", chunk.request_id)
            return _step_failed()

    def _checked_run(self, plan: StepPlan) -> StepResult:
        result = self._runner.run(plan)
        if len(result.sampled) != len(plan.chunks):
            raise RuntimeError(f"{len(result.sampled)} results for {len(plan.chunks)} chunks")
        return result

    def _expire(self, now: float) -> None:
        """Fail what is past its deadline. Every look at all sequences is paid for by a submission: a deadline that is
        taken from the rest is looked at once."""
        alive = [s for s in self._sequences.values() if s.state not in (State.HELD, State.ORPHANED)]
        for sequence in alive:
            if now >= sequence.deadline_at:
                self._outcomes.fail(sequence, DeadlineExceeded("the request's deadline passed"))
        self._next_deadline_at = min((s.deadline_at for s in alive if now < s.deadline_at), default=math.inf)


def _step_failed() -> InternalError:
    return InternalError("computing this sequence failed; see the node's log")
