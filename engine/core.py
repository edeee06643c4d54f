"""EngineCore: the engine without its thread. Commands and steps change it; events and the load come out of it.

A command takes effect at once. A step is `schedule`, then `run`, which launches it; with asynchronous scheduling it then
collects the step before it, otherwise the step itself. What happened is kept in order until `take_events`. Tests and
simulations drive it by hand; engine.Engine gives it a thread of its own.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import replace

from engine.admission import max_sequence_tokens
from engine.backing import BackingStore
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.events import EngineEvent, Pinned
from engine.kv_event_log import KVEventLog
from engine.load import EngineLoad
from engine.offloading import Offloading
from engine.outcomes import Outcomes
from engine.prefill_rate import PrefillRate
from engine.request import EngineRequest
from engine.runner import Runner
from engine.scheduler import Schedule, Scheduler
from engine.sequence import Sequence, State
from engine.speculation import Drafter, NgramDrafter, Speculator
from engine.step_pipeline import StepPipeline
from engine.step_times import StepTimes
from protocol.errors import Cancelled, DeadlineExceeded, HeadraceError, InternalError
from protocol.ids import BlockHash, PinId, RequestId
from protocol.phases import HandoffPhases
from protocol.tokens import SampledToken
from runtime.clock import Clock

log = logging.getLogger(__name__)


class EngineCore:
    """Requests have passed engine.admission.check_request. Unknown request ids are no-ops: they are of sequences that
    have left. `drafter` guesses where the configuration says that guesses are wanted; without one, prompt lookup does."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        clock: Clock,
        kv_events: KVEventLog,
        drafter: Drafter | None = None,
    ) -> None:
        self._clock = clock
        self._pipeline = StepPipeline(runner, clock)
        self._runs_ahead = runner.runs_ahead if config.async_scheduling == "auto" else config.async_scheduling == "on"
        self._tables = BlockTables(
            runner.layout, runner.num_blocks, kv_events, enable_prefix_cache=config.enable_prefix_cache
        )
        self._speculator = _speculator(config, drafter)
        limit = max_sequence_tokens(runner)
        self._offloading = Offloading(self._tables)
        self._scheduler = Scheduler(config, runner.layout, self._tables, self._offloading, limit, self._speculator)
        self._outcomes = Outcomes(runner, self._scheduler, self._tables, limit, self._speculator)
        self.times = StepTimes()
        self._prefill_rate = PrefillRate()
        self._sequences = self._outcomes.sequences
        self._pins: dict[PinId, tuple[int, ...]] = {}
        self._next_arrival = 0
        self._next_deadline_at = math.inf
        self._steps = 0

    def back_with(self, backing: BackingStore) -> None:
        """Where blocks go that are forgotten here. Before the first command."""
        self._offloading.back_with(backing)

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
            if sequence is not None:
                self._outcomes.fail(sequence, Cancelled("the request was cancelled"))

    def release(self, request_id: RequestId) -> None:
        """Nobody reads the blocks of a PREFILL_ONLY request any more. One that still runs goes on, but is not held."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if sequence.state is State.HELD:
            self._outcomes.leave(sequence)
        else:
            sequence.released_early = True

    def activate(
        self,
        request_id: RequestId,
        first_token: SampledToken,
        computed_at: float | None,
        landing: HandoffPhases | None = None,
    ) -> None:
        """The context of an IMPORT request is in its blocks. `computed_at`: when the other node ended its last chunk,
        by our clock; None if that is unknown, and the hand-off then counts from now. `landing`: what of the time since
        then has been accounted for; from its end on the sequence waits to join."""
        sequence = self._import(request_id)
        if sequence is None or not self._landed(sequence, sequence.context_end):
            return
        now = self._clock.now()
        sequence.times.computed_at = now if computed_at is None else computed_at
        if landing is not None:
            sequence.times.landing = landing
        self._scheduler.imported(sequence)
        self._outcomes.imported(sequence, first_token, now)

    def proceed(self, request_id: RequestId, num_tokens: int) -> None:
        """While the beginning of a request is brought, compute the first `num_tokens` of it here: whole blocks, of those
        that were reserved. Once, before `resume`. Nothing more is computed of a request that has ended, but it is known that
        nobody brings these."""
        sequence = self._import(request_id)
        if sequence is None:
            return
        assert not sequence.computes_nothing, f"{request_id} computes nothing here"
        assert not sequence.front_end, f"{request_id} was told before how far to go"
        assert num_tokens % self._tables.block_size == 0, f"{num_tokens} tokens are not whole blocks"
        assert num_tokens <= sequence.import_end, f"only {sequence.import_end} tokens of {request_id} are awaited"
        if num_tokens > sequence.num_computed:
            sequence.front_end = num_tokens

    def resume(self, request_id: RequestId, num_valid_tokens: int) -> None:
        """The first `num_valid_tokens` tokens of a request that waited for its beginning are in its blocks, or will be when
        those are computed that it was told to `proceed` with; if no more than these have come, none have. The rest is to be
        computed, and nothing else writes into its blocks any more."""
        sequence = self._import(request_id)
        if sequence is None:
            return
        assert not sequence.computes_nothing, f"{request_id} wants its first token too: activate it"
        num_before = sequence.num_computed
        if self._landed(sequence, num_valid_tokens):
            self._scheduler.imported(sequence)
            self._outcomes.resumed(sequence, sequence.num_computed - num_before)

    def fail_import(self, request_id: RequestId, error: HeadraceError) -> None:
        """What was awaited will not come in time. Its blocks stay with the transfer until `abandon_import`."""
        sequence = self._import(request_id)
        if sequence is not None:
            self._outcomes.fail(sequence, error)

    def abandon_import(self, request_id: RequestId, num_valid_tokens: int, error: HeadraceError) -> None:
        """The context did not arrive. Its first `num_valid_tokens` tokens did, and their full blocks are kept."""
        sequence = self._import(request_id)
        if sequence is None:
            return
        if self._landed(sequence, num_valid_tokens):
            self._outcomes.fail(sequence, error)
            self._outcomes.let_go(sequence)

    def pin(self, pin_id: PinId, block_hashes: tuple[BlockHash, ...]) -> None:
        """Hold what the prefix cache has of this chain. Answered by Pinned."""
        assert pin_id not in self._pins, f"{pin_id} is pinned already"
        self._pins[pin_id] = block_ids = self._tables.pin(block_hashes)
        self._outcomes.events.append(Pinned(pin_id, block_ids))

    def unpin(self, pin_id: PinId) -> None:
        self._tables.unpin(self._pins.pop(pin_id, ()))

    def saved(self, pin_id: PinId) -> None:
        """The answer to BlocksOffered."""
        self._offloading.saved(pin_id)

    def clear_prefix_cache(self) -> None:
        self._tables.clear_prefix_cache()

    def close(self, error: HeadraceError) -> None:
        """Wait for steps in flight, fail whatever is left, and free every block, also those of transfers under way."""
        self._drop(self._pipeline.drop())
        for sequence in list(self._sequences.values()):
            self._outcomes.fail(sequence, error)
            if sequence.request_id in self._sequences:
                self._outcomes.leave(sequence)
        for pin_id in list(self._pins):
            self.unpin(pin_id)
        self._offloading.take_back()

    # Steps.

    @property
    def in_flight(self) -> bool:
        """A step has been launched whose results have not been collected."""
        return len(self._pipeline) > 0

    def schedule(self) -> Schedule | None:
        """Expire, admit and plan. None if there is nothing to run before the step in flight has ended or, with none in
        flight, before the next command or deadline. May collect the step in flight first."""
        now = self._clock.now()
        if now >= self._next_deadline_at:
            self._expire(now)
        schedule = self._scheduler.schedule(in_flight=self.in_flight)
        self.times.schedule_s += self._clock.now() - now
        if schedule is None:
            self._collect()
            now = self._clock.now()
            schedule = self._scheduler.schedule(in_flight=False)
            self.times.schedule_s += self._clock.now() - now
        assert schedule is not None, "nothing in flight to wait for"
        for sequence in schedule.admitted:
            self._outcomes.admitted(sequence, now)
        self._outcomes.events += self._offloading.offers(self._scheduler.waiting.num_tokens)
        return schedule if schedule.plan.chunks else None

    def run(self, schedule: Schedule | None) -> None:
        """Launch what was just scheduled, if anything was, and collect the step that is due."""
        if schedule is not None:
            launched_at = self._clock.now()
            self._pipeline.launch(schedule)
            self.times.compute_s += self._clock.now() - launched_at
        if schedule is None or len(self._pipeline) > self._runs_ahead:
            self._collect()

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
        scheduler, outcomes, speculator = self._scheduler, self._outcomes, self._speculator
        return EngineLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_tokens=scheduler.num_waiting_tokens,
            num_importing=len(scheduler.importing) + len(scheduler.orphans),
            num_held=len(scheduler.held),
            num_pins=len(self._pins),
            num_offered_blocks=self._offloading.num_offered,
            free_blocks=self._tables.pool.num_free,
            total_blocks=self._tables.pool.num_blocks,
            steps=self._steps,
            computed_prompt_tokens=outcomes.num_computed_tokens,
            cached_prompt_tokens=outcomes.num_cached_tokens,
            imported_prompt_tokens=outcomes.num_imported_tokens,
            loaded_prompt_tokens=outcomes.num_loaded_tokens,
            lost_blocks=self._offloading.num_lost,
            prefill_tokens_per_s=self._prefill_rate.tokens_per_s,
            sampled_tokens=outcomes.num_sampled_tokens,
            preemptions=scheduler.num_preemptions,
            draft_tokens=speculator.num_drafts if speculator else 0,
            accepted_drafts=tuple(speculator.num_accepted_of_step) if speculator else (),
            times=replace(self.times),
        )

    def _landed(self, sequence: Sequence, num_valid_tokens: int) -> bool:
        """An import has ended with so many valid tokens, which are kept. False if its request had ended before: it is
        let go now."""
        sequence.arrive(min(num_valid_tokens, sequence.import_end))
        self._tables.index(sequence)
        if sequence.state is State.ORPHANED:
            self._outcomes.let_go(sequence)
            return False
        return True

    def _import(self, request_id: RequestId) -> Sequence | None:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state not in (State.IMPORTING, State.ORPHANED):
            log.warning("%s: no import is under way", request_id)
            return None
        return sequence

    def _collect(self) -> None:
        """Take in the results of the oldest step in flight."""
        waited_from = self._clock.now()
        step = self._pipeline.collect()
        self.times.waited(step.ended_at - waited_from, step.result)
        self._steps += 1
        chunks = step.schedule.plan.chunks
        num_before = self._outcomes.num_computed_tokens
        for sequence, chunk, sampled in zip(step.schedule.sequences, chunks, step.result.sampled, strict=True):
            if not sequence.computing:  # it has ended meanwhile
                self._outcomes.landed(sequence)
            elif isinstance(sampled, HeadraceError):
                self._outcomes.fail(sequence, sampled)
            elif chunk.samples and not 1 <= len(sampled) <= chunk.num_rows:
                self._outcomes.fail(
                    sequence, InternalError(f"the runner drew {len(sampled)} tokens of {chunk.num_rows}")
                )
            else:
                self._outcomes.computed(sequence, chunk, sampled, step.started_at, step.ended_at)
        self._drop(step.dropped)
        self._prefill_rate.note(self._outcomes.num_computed_tokens - num_before, step.ended_at - step.started_at)
        self.times.emit_s += self._clock.now() - step.ended_at

    def _drop(self, sequences: Iterable[Sequence]) -> None:
        """A step of these has ended whose results count for nothing."""
        for sequence in sequences:
            self._outcomes.landed(sequence)

    def _expire(self, now: float) -> None:
        """Fail what is past its deadline. Every look at all sequences is paid for by a submission: a deadline that is
        taken from the rest is looked at once."""
        ended = (State.HELD, State.ORPHANED, State.LEAVING)
        alive = [sequence for sequence in self._sequences.values() if sequence.state not in ended]
        for sequence in alive:
            if now >= sequence.deadline_at:
                self._outcomes.fail(sequence, DeadlineExceeded("the request's deadline passed"))
        self._next_deadline_at = min((s.deadline_at for s in alive if now < s.deadline_at), default=math.inf)


def _speculator(config: EngineConfig, drafter: Drafter | None) -> Speculator | None:
    settings = config.speculation
    if settings is None:
        return None
    return Speculator(settings, drafter or NgramDrafter(settings.ngram_min, settings.ngram_max))
