"""Scheduler: decides what each step computes. Pure: no device, no thread, no clock.

One token budget a step. Every running decode gets its token first, then prefills go on in the order of their age, then
new sequences are admitted while budget, rows and blocks last.

Admission reserves the whole context, so that a prefill never stops half-way for want of blocks and an import always
has where to land; only decodes grow. A sequence whose first tokens somebody may bring is admitted like an import, ahead of
those that wait for compute, and computes the rest when they have come, or have not: in its turn by age, so that whom it
passed is not overtaken twice. Some of what it waits for it may compute meanwhile (see engine.sequence). A decode that finds no free block preempts the youngest sequence, which may be
itself: the oldest always gets on. Only where blocks are being saved it waits for those. A preempted sequence is recomputed, mostly from the prefix cache and the store behind it
(engine.offloading), which is asked at every admission, once. Neither the blocks of an import nor those of a prefill for
somebody else move: others may be writing or reading them.

A step may be planned while another is in flight. A sequence that draws a token there goes on behind it, with PENDING in its
place, unless that is its last for length. Where more must be known of the step in flight, nothing is planned ahead of its
results: penalties are taken over the token itself, guesses are made from it, and preemption wants to know what it puts back.
One sequence that must wait makes the whole step wait, because a batch that falls into two halves costs more than it gains.
"""

import math
from dataclasses import dataclass

from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.offloading import Offloading
from engine.runner import PENDING, ScheduledChunk, StepPlan
from engine.sequence import Sequence, State
from engine.speculation import Speculator
from engine.stop_rules import num_draws_left
from engine.waiting_queue import WaitingQueue
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step. `sequences[i]` owns `plan.chunks[i]`. `admitted` have got their blocks just now."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]
    admitted: tuple[Sequence, ...]


class Scheduler:
    """`max_sequence_tokens`: prompt and output tokens at which a sequence ends for length. Without `speculator` nothing is
    guessed."""

    def __init__(
        self,
        config: EngineConfig,
        layout: KVLayout,
        tables: BlockTables,
        offloading: Offloading,
        max_sequence_tokens: int,
        speculator: Speculator | None,
    ) -> None:
        self._layout = layout
        self._tables = tables
        self._offloading = offloading
        self._max_sequence_tokens = max_sequence_tokens
        self._speculator = speculator
        self._max_tokens = config.max_num_batched_tokens
        self._max_chunk = config.max_prefill_chunk or config.max_num_batched_tokens
        # A row costs a token, so that more rows than tokens would leave none for prefill.
        self._max_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._watermark = math.ceil(config.watermark * tables.pool.num_blocks)
        self.waiting = WaitingQueue()
        self.running: dict[RequestId, Sequence] = {}
        self.importing: dict[RequestId, Sequence] = {}
        self.orphans: dict[RequestId, Sequence] = {}
        self.held: dict[RequestId, Sequence] = {}
        self.num_preemptions = 0

    @property
    def num_waiting_tokens(self) -> int:
        """Context tokens of all admitted requests that are still to be computed. O(running + importing)."""
        rest_of_imports = sum(sequence.num_uncomputed_context for sequence in self.importing.values())
        return self.waiting.num_tokens + self._num_running_tokens + rest_of_imports

    def add(self, sequence: Sequence) -> None:
        self.waiting.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """From wherever it is. Its blocks stay with it."""
        match sequence.state:
            case State.WAITING:
                self.waiting.remove(sequence)
            case State.RUNNING:
                del self.running[sequence.request_id]
            case State.IMPORTING:
                del self.importing[sequence.request_id]
            case State.ORPHANED:
                del self.orphans[sequence.request_id]
            case State.HELD:
                del self.held[sequence.request_id]
            case State.LEAVING | State.GONE:
                raise AssertionError(f"{sequence.request_id} has been removed before")

    def imported(self, sequence: Sequence) -> None:
        """Its context, or the beginning of it, has arrived: it joins the next step."""
        del self.importing[sequence.request_id]
        self._run(sequence)

    def orphan(self, sequence: Sequence) -> None:
        """An import has failed. Its blocks stay with the transfer; its place in the batch goes to somebody else."""
        del self.importing[sequence.request_id]
        sequence.state = State.ORPHANED
        self.orphans[sequence.request_id] = sequence

    def hold(self, sequence: Sequence) -> None:
        """It has ended, well or not; the blocks stay."""
        self.remove(sequence)
        sequence.state = State.HELD
        self.held[sequence.request_id] = sequence

    def schedule(self, *, in_flight: bool) -> Schedule | None:
        """Decide one step. The plan is empty only if nothing can run now. None, and only with steps in flight, if their
        results are needed first."""
        by_age = sorted([*self.running.values(), *self._fronts], key=_age)
        decodes = [sequence for sequence in by_age if sequence.decoding and self._goes_on(sequence)]
        if in_flight and not all(self._can_run_ahead(sequence) for sequence in decodes):
            return None
        ready = [sequence for sequence in decodes if sequence.state is State.RUNNING and self._make_room(sequence)]
        step = _Step(self._max_tokens, self._max_chunk, self._layout)
        draft_room = 0
        if self._speculator is not None:
            self._speculator.begin_step()
            draft_room = self._draft_room()
        for sequence in ready:
            drafts = self._drafts(sequence, draft_room)
            draft_room -= len(drafts)
            step.decode(sequence, drafts)
        admitted: list[Sequence] = []
        for sequence in by_age:
            if not sequence.decoding and sequence.computing:
                admitted += self._fill(step, before=sequence.arrival)
                step.prefill(sequence)
        admitted += self._fill(step)
        return Schedule(StepPlan(tuple(step.chunks)), tuple(step.sequences), tuple(admitted))

    def _fill(self, step: "_Step", before: float = math.inf) -> list[Sequence]:
        """Admit what fits of those that arrived `before`, and give each its share of the step."""
        admitted: list[Sequence] = []
        while (newcomer := self._admit(step, before)) is not None:
            admitted.append(newcomer)
            if newcomer.state is State.RUNNING:
                step.prefill(newcomer)
        return admitted

    def _admit(self, step: "_Step", before: float) -> Sequence | None:
        """Reserve blocks for the next waiting sequence, if there is one that arrived `before`, and it fits."""
        if step.no_room or len(self.running) + len(self.importing) >= self._max_rows:
            return None
        sequence = self.waiting.head(may_compute=step.budget > 0)
        if sequence is None or sequence.arrival >= before:
            return None
        # With nothing running there is nobody to leave room for, and whoever is next must get in.
        if not self._tables.reserve(sequence, keep_free=self._watermark if self.running else 0):
            step.no_room = True
            return None
        self.waiting.remove(sequence)
        if not sequence.computes_nothing:
            sequence.load_end = self._offloading.num_loadable_tokens(sequence)
            sequence.import_end = max(sequence.import_end, sequence.load_end)
        if sequence.computes_nothing or sequence.num_computed < sequence.import_end:
            sequence.state = State.IMPORTING
            self.importing[sequence.request_id] = sequence
        else:
            sequence.import_end = 0
            self._run(sequence)
        return sequence

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        self.running[sequence.request_id] = sequence

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether a decode has another token to draw: not if what is in flight draws its last."""
        return not sequence.num_draws_in_flight or num_draws_left(sequence, self._max_sequence_tokens) > 0

    def _can_run_ahead(self, sequence: Sequence) -> bool:
        """Whether a decode can be planned without the results of the step in flight."""
        if sequence.num_draws_in_flight and (sequence.has_penalties or self._wants_drafts(sequence)):
            return False
        return self._tables.grow(sequence, sequence.num_scheduled + 1)

    def _wants_drafts(self, sequence: Sequence) -> bool:
        return self._speculator is not None and self._speculator.eager(sequence)

    def _draft_room(self) -> int:
        """Guesses that one step may check: what of the budget neither decodes nor any prefill could use."""
        num_front_tokens = sum(sequence.front_end - sequence.num_computed for sequence in self._fronts)
        num_prefill_tokens = self._num_running_tokens + num_front_tokens + self.waiting.num_compute_tokens
        return self._max_tokens - len(self.running) - num_prefill_tokens

    @property
    def _fronts(self) -> list[Sequence]:
        """Imports under way of which the beginning is computed here."""
        return [sequence for sequence in self.importing.values() if sequence.front_end]

    @property
    def _num_running_tokens(self) -> int:
        """Context tokens of running requests that are still to be computed."""
        return sum(sequence.num_uncomputed_context for sequence in self.running.values())

    def _drafts(self, sequence: Sequence, room: int) -> list[int]:
        """Guesses of what follows a decode's last token, with blocks for them. They preempt nobody."""
        if self._speculator is None or sequence.num_draws_in_flight or not self._speculator.eager(sequence):
            return []
        room = min(room, num_draws_left(sequence, self._max_sequence_tokens) - 1)
        drafts = self._speculator.propose(sequence, room)
        num_tokens = len(sequence.token_ids) + len(drafts)
        return drafts if self._tables.grow(sequence, num_tokens, keep_free=self._watermark) else []

    def _make_room(self, sequence: Sequence) -> bool:
        """A place for the next token of a decode, at the cost of younger ones. False if it was itself the youngest, or
        blocks are being saved and will be free: nobody is preempted for what comes back on its own."""
        while not self._tables.grow(sequence, sequence.num_scheduled + 1):
            if self._offloading.any_returning:
                return False
            victim = max((other for other in self.running.values() if other.preemptable), key=_age)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert not sequence.num_steps_in_flight, "a step in flight writes into its blocks"
        del self.running[sequence.request_id]
        self._tables.release(sequence)
        sequence.start_over()
        self.waiting.push_front(sequence)
        self.num_preemptions += 1


class _Step:
    """A step in the making. `no_room`: somebody waits for blocks, and nobody passes."""

    def __init__(self, max_tokens: int, max_chunk: int, layout: KVLayout) -> None:
        self.budget = max_tokens
        self.no_room = False
        self._max_chunk = max_chunk
        self._layout = layout
        self.chunks: list[ScheduledChunk] = []
        self.sequences: list[Sequence] = []

    def decode(self, sequence: Sequence, drafts: list[int]) -> None:
        """The last token, known or not, and the guesses behind it."""
        last = PENDING if sequence.num_draws_in_flight else sequence.token_ids[-1]
        self._add(sequence, [last, *drafts], samples=True, num_drafts=len(drafts))

    def prefill(self, sequence: Sequence) -> None:
        """As many tokens of the context as budget and chunk size allow; maybe none."""
        start = sequence.num_scheduled
        end = min(sequence.prefill_end, start + min(self.budget, self._max_chunk))
        if start < end:
            self._add(sequence, sequence.token_ids[start:end], samples=end == sequence.context_end)

    def _add(self, sequence: Sequence, token_ids: list[int], *, samples: bool, num_drafts: int = 0) -> None:
        start, block_ids = sequence.num_scheduled, sequence.block_ids
        num_blocks = self._layout.num_blocks_for(start + len(token_ids))
        chunk = ScheduledChunk(
            request_id=sequence.request_id,
            token_ids=token_ids,
            start=start,
            block_ids=block_ids if num_blocks == len(block_ids) else block_ids[:num_blocks],
            samples=samples,
            output_position=len(sequence.output_token_ids) + sequence.num_draws_in_flight,
            sampling=sequence.request.sampling,
            prompt_token_ids=sequence.request.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
            num_drafts=num_drafts,
        )
        self.budget -= len(token_ids)
        self.sequences.append(sequence)
        self.chunks.append(chunk)


def _age(sequence: Sequence) -> int:
    return sequence.arrival
