"""Outcomes: what a sequence's progress means to whoever asked for it. Turns it into events, and ends sequences.

The only place where a sequence leaves the engine, and so the only one that frees its blocks: at once, or when the last step
that has it has ended. Until then the device still writes into them, and another request's transfer must not. Blocks that
were announced to a reader stay longer, however the request ended: until `EngineCore.release` says that nobody reads them.
"""

from engine.block_tables import BlockTables
from engine.events import (
    BlocksComputed,
    EngineEvent,
    Failed,
    Finished,
    PrefillFinished,
    PromptComputed,
    Reserved,
    TokensSampled,
)
from engine.request import Mode
from engine.runner import Runner, ScheduledChunk
from engine.scheduler import Scheduler
from engine.sequence import Sequence, State
from engine.speculation import Speculator
from engine.stop_rules import Ending, ending
from engine.timing import decode_phases, prefill_phases
from protocol.errors import HeadraceError
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.tokens import SampledToken


class Outcomes:
    """`max_sequence_tokens`: prompt and output tokens at which a sequence ends for length. `speculator` hears what became of
    its guesses."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tables: BlockTables,
        max_sequence_tokens: int,
        speculator: Speculator | None,
    ) -> None:
        self._runner = runner
        self._layout: KVLayout = runner.layout
        self._scheduler = scheduler
        self._tables = tables
        self._max_sequence_tokens = max_sequence_tokens
        self._speculator = speculator
        self.sequences: dict[RequestId, Sequence] = {}
        self.events: list[EngineEvent] = []
        self.departed: list[RequestId] = []
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_imported_tokens = 0
        self.num_loaded_tokens = 0
        self.num_sampled_tokens = 0

    def admitted(self, sequence: Sequence, now: float) -> None:
        """It has got its blocks; the prefix cache has filled the first `num_computed` tokens."""
        self.num_cached_tokens += sequence.num_computed
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
        num_cached_blocks = sequence.num_computed // self._layout.block_size
        if sequence.state is State.IMPORTING:
            block_ids = tuple(sequence.block_ids[: self._layout.num_blocks_for(sequence.import_end)])
            prefix = not sequence.computes_nothing
            hashes = tuple(sequence.block_hashes[: sequence.import_end // self._layout.block_size])
            self.events.append(Reserved(sequence.request_id, block_ids, num_cached_blocks, prefix, hashes))
        if sequence.times.first_scheduled_at is None and not sequence.computes_nothing:
            sequence.times.first_scheduled_at = now
        self._announce(sequence, num_cached_blocks)

    def resumed(self, sequence: Sequence, num_imported_tokens: int) -> None:
        """So many of its first tokens, up to `num_computed`, have come from elsewhere, maybe none."""
        self.num_imported_tokens += num_imported_tokens
        start = sequence.num_computed - num_imported_tokens
        self.num_loaded_tokens += max(0, min(sequence.num_computed, sequence.load_end) - start)
        if not sequence.preempted:
            sequence.num_cached_tokens = (sequence.num_cached_tokens or 0) + num_imported_tokens
        self._announce(sequence, sequence.num_computed // self._layout.block_size)

    def computed(
        self,
        sequence: Sequence,
        chunk: ScheduledChunk,
        tokens: tuple[SampledToken, ...],
        started_at: float,
        ended_at: float,
    ) -> None:
        """The step between these instants has computed its chunk, and drawn tokens for it if the chunk samples.

        Of the guesses in the chunk only those that were right count as computed: what lies in the blocks behind them is
        overwritten by what comes.
        """
        if sequence.num_computed < sequence.context_end:
            self.num_computed_tokens += len(chunk.token_ids)
        if not chunk.samples:
            sequence.num_computed += len(chunk.token_ids)
            num_met = sequence.meet()
            self._tables.index(sequence)
            self.resumed(sequence, num_met)
            return
        if sequence.num_sampled == 0:
            sequence.times.computed_at = ended_at
        elif sequence.times.decode_started_at is None:
            sequence.times.decode_started_at = started_at
        index = len(sequence.output_token_ids)
        tokens, end = self._append(sequence, tokens)
        num_accepted = len(tokens) - 1
        sequence.num_computed += len(chunk.token_ids) - chunk.num_drafts + num_accepted
        self._tables.index(sequence)
        self.num_sampled_tokens += len(tokens)
        if self._speculator is not None:
            self._speculator.advanced(sequence, chunk.num_drafts, num_accepted)
        if sequence.request.mode is Mode.PREFILL_ONLY:
            self._announce(sequence, len(sequence.block_ids))
            self._finish_prefill(sequence, tokens[0], end, ended_at)
        else:
            self._emit(sequence, index, tokens, end, ended_at)

    def imported(self, sequence: Sequence, first_token: SampledToken, now: float) -> None:
        """Its context and its first token have come from elsewhere."""
        index = len(sequence.output_token_ids)
        tokens, end = self._append(sequence, (first_token,))
        self._emit(sequence, index, tokens, end, now)

    def fail(self, sequence: Sequence, error: HeadraceError) -> None:
        """It ends with an error. The blocks of an import under way stay with the transfer until that has ended too, those
        of which a reader knows until they are released."""
        match sequence.state:
            case State.ORPHANED | State.HELD | State.LEAVING | State.GONE:
                return
            case State.IMPORTING:
                self._scheduler.orphan(sequence)
            case State.WAITING | State.RUNNING:
                self.let_go(sequence)
        self.events.append(Failed(sequence.request_id, error))

    def let_go(self, sequence: Sequence) -> None:
        """Nothing more is done for it. It leaves, unless a reader may be at its blocks."""
        if sequence.exported:
            self._scheduler.hold(sequence)
        else:
            self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It is gone, from wherever it was, or will be when the last step in flight that has it has ended."""
        self._scheduler.remove(sequence)
        sequence.state = State.LEAVING
        self.landed(sequence)

    def landed(self, sequence: Sequence) -> None:
        """Fewer steps in flight have it."""
        if sequence.state is not State.LEAVING or sequence.num_steps_in_flight:
            return
        sequence.state = State.GONE
        self._tables.release(sequence)
        del self.sequences[sequence.request_id]
        self._runner.forget(sequence.request_id)
        if self._speculator is not None:
            self._speculator.forget(sequence.request_id)
        self.departed.append(sequence.request_id)

    def _append(
        self, sequence: Sequence, tokens: tuple[SampledToken, ...]
    ) -> tuple[tuple[SampledToken, ...], Ending | None]:
        """Append tokens up to one that ends the sequence. Returns those appended, and the end if it was reached."""
        for count, token in enumerate(tokens, 1):
            sequence.append(token)
            end = ending(sequence, self._max_sequence_tokens)
            if end is not None:
                return tokens[:count], end
        return tokens, None

    def _emit(
        self, sequence: Sequence, index: int, tokens: tuple[SampledToken, ...], end: Ending | None, now: float
    ) -> None:
        """Say what has been appended, and that it was the end."""
        self.events.append(TokensSampled(sequence.request_id, index, tokens))
        if sequence.request.mode is Mode.GENERATE and index == len(sequence.request.emitted_token_ids):
            cached = sequence.num_cached_tokens or 0
            self.events.append(PromptComputed(sequence.request_id, cached, prefill_phases(sequence)))
        if end is None:
            return
        imported = sequence.request.mode is Mode.IMPORT
        self.events.append(
            Finished(
                request_id=sequence.request_id,
                reason=end.reason,
                stop_token_id=end.stop_token_id,
                imported=imported,
                decode=decode_phases(sequence, now, imported=imported),
            )
        )
        self.leave(sequence)

    def _finish_prefill(self, sequence: Sequence, token: SampledToken, end: Ending | None, computed_at: float) -> None:
        self.events.append(
            PrefillFinished(
                request_id=sequence.request_id,
                first_token=token,
                num_cached_tokens=sequence.num_cached_tokens or 0,
                phases=prefill_phases(sequence),
                computed_at=computed_at,
                finish_reason=None if end is None else end.reason,
                stop_token_id=None if end is None else end.stop_token_id,
            )
        )
        self.let_go(sequence)

    def _announce(self, sequence: Sequence, num_final_blocks: int) -> None:
        """Tell the reader of a PREFILL_ONLY request which more blocks it may read."""
        first = sequence.num_announced_blocks
        if sequence.request.mode is not Mode.PREFILL_ONLY or num_final_blocks <= first:
            return
        block_ids = tuple(sequence.block_ids[first:num_final_blocks])
        self.events.append(BlocksComputed(sequence.request_id, first, block_ids))
        sequence.num_announced_blocks = num_final_blocks
