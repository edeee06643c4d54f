"""Outcomes: what a sequence's progress means to whoever asked for it. Turns it into events, and ends sequences.

The only place where a sequence leaves the engine, and so the only one that frees its blocks.
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
from engine.stop_rules import ending
from engine.timing import decode_phases, prefill_phases
from protocol.errors import HeadraceError
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.tokens import SampledToken


class Outcomes:
    """`max_sequence_tokens`: prompt and output tokens at which a sequence ends for length."""

    def __init__(self, runner: Runner, scheduler: Scheduler, tables: BlockTables, max_sequence_tokens: int) -> None:
        self._runner = runner
        self._layout: KVLayout = runner.layout
        self._scheduler = scheduler
        self._tables = tables
        self._max_sequence_tokens = max_sequence_tokens
        self.sequences: dict[RequestId, Sequence] = {}
        self.events: list[EngineEvent] = []
        self.departed: list[RequestId] = []
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_sampled_tokens = 0

    def admitted(self, sequence: Sequence, now: float) -> None:
        """It has got its blocks; the prefix cache has filled the first `num_computed` tokens."""
        self.num_cached_tokens += sequence.num_computed
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
        if sequence.state is State.IMPORTING:
            num_cached_blocks = sequence.num_computed // self._layout.block_size
            self.events.append(Reserved(sequence.request_id, tuple(sequence.block_ids), num_cached_blocks))
            return
        if sequence.times.first_scheduled_at is None:
            sequence.times.first_scheduled_at = now
        self._announce(sequence, sequence.num_computed // self._layout.block_size)

    def computed(self, sequence: Sequence, chunk: ScheduledChunk) -> None:
        """A step has computed its chunk."""
        if not sequence.decoding:
            self.num_computed_tokens += len(chunk.token_ids)
        sequence.num_computed += len(chunk.token_ids)
        self._tables.index(sequence)
        full_blocks = sequence.num_computed // self._layout.block_size
        self._announce(sequence, len(sequence.block_ids) if chunk.samples else full_blocks)

    def sampled(self, sequence: Sequence, token: SampledToken, started_at: float, ended_at: float) -> None:
        """The step between these instants drew a token for it."""
        if sequence.num_sampled == 0:
            sequence.times.computed_at = ended_at
        elif sequence.times.decode_started_at is None:
            sequence.times.decode_started_at = started_at
        self.num_sampled_tokens += 1
        if sequence.request.mode is Mode.PREFILL_ONLY:
            self._finish_prefill(sequence, token, ended_at)
        else:
            self.emit_token(sequence, token, ended_at)

    def emit_token(self, sequence: Sequence, token: SampledToken, now: float) -> None:
        """Append the token and say so; maybe it was the last."""
        index = len(sequence.output_token_ids)
        sequence.append(token)
        self.events.append(TokensSampled(sequence.request_id, index, (token,)))
        if sequence.request.mode is Mode.GENERATE and sequence.num_sampled == 1:
            cached = sequence.num_cached_tokens or 0
            self.events.append(PromptComputed(sequence.request_id, cached, prefill_phases(sequence)))
        end = ending(sequence, self._max_sequence_tokens)
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

    def fail(self, sequence: Sequence, error: HeadraceError) -> None:
        """It ends with an error. The blocks of an import under way stay with the transfer until that has ended too."""
        match sequence.state:
            case State.ORPHANED | State.HELD:
                return
            case State.IMPORTING:
                self._scheduler.orphan(sequence)
            case State.WAITING | State.RUNNING:
                self.leave(sequence)
        self.events.append(Failed(sequence.request_id, error))

    def leave(self, sequence: Sequence) -> None:
        """It is gone, from wherever it was."""
        self._scheduler.remove(sequence)
        del self.sequences[sequence.request_id]
        self._runner.forget(sequence.request_id)
        self.departed.append(sequence.request_id)

    def _finish_prefill(self, sequence: Sequence, token: SampledToken, computed_at: float) -> None:
        sequence.append(token)
        end = ending(sequence, self._max_sequence_tokens)
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
        if sequence.released_early:
            self.leave(sequence)
        else:
            self._scheduler.hold(sequence)

    def _announce(self, sequence: Sequence, num_final_blocks: int) -> None:
        """Tell the reader of a PREFILL_ONLY request which more blocks it may read."""
        first = sequence.num_announced_blocks
        if sequence.request.mode is not Mode.PREFILL_ONLY or num_final_blocks <= first:
            return
        block_ids = tuple(sequence.block_ids[first:num_final_blocks])
        self.events.append(BlocksComputed(sequence.request_id, first, block_ids))
        sequence.num_announced_blocks = num_final_blocks
