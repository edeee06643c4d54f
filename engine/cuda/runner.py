"""CudaRunner: the Runner of a device that works while the host goes on.

Life: `engine.cuda.build.build_cuda_runner` loads the model and finds room for the KV cache; `warm_up` compiles, and captures
the decode steps; then `launch` queues steps and `LaunchedStep.result` waits for one.

A step of nothing but decodes copies a few columns of numbers to tensors that stay on the device and replays a graph that
was captured for its padded size. Any other step (prefill chunks, drafts) has inputs of its own and is launched operation by
operation, on the same stream. Either draws its tokens on the device and leaves them there for the next step (PENDING), and
sends them to pinned host memory of its own, so that two steps may be in flight. The host waits for nothing else.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.cuda.batch import BlockTableRows, PersistentBatch, StepColumns
from engine.cuda.decode_graphs import DecodeGraphs
from engine.cuda.device import Device, Work
from engine.cuda.device_step import DeviceStep
from engine.cuda.limits import BatchLimits
from engine.cuda.mixed_step import MixedInputs
from engine.cuda.outputs import OutputRecords
from engine.cuda.row_sampler import RowSampler
from engine.cuda.rows import RowTable
from engine.cuda.trial_plans import prefill_plan
from engine.model.llama import LlamaModel, StepInputs
from engine.runner import PENDING, LaunchedStep, ReadyStep, ScheduledChunk, StepPlan, StepResult
from kernels.attention_batch import AttentionBatch
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout

_STEPS_IN_FLIGHT = 2
_WARM_UP_PREFILL = 256


@dataclass(slots=True)
class _Slot:
    """The host's side of one step in flight."""

    columns: StepColumns
    records: OutputRecords
    busy: bool = False


class CudaRunner:
    """Implements engine.runner.Runner; at most two steps are in flight. Called from one thread.

    kv_cache is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim] on the device's memory. `max_blocks`: of one
    sequence, as its block table and captured steps have room for; 0: as many as it can have in this cache.
    """

    def __init__(
        self,
        model: LlamaModel,
        layout: KVLayout,
        kv_cache: torch.Tensor,
        max_model_len: int,
        limits: BatchLimits,
        device: Device,
        max_blocks: int = 0,
    ) -> None:
        self._model = model
        self._layout = layout
        self._kv_cache = kv_cache
        self._max_model_len = max_model_len
        self._limits = limits
        self._device = device
        max_rows = limits.max_rows
        self._max_blocks = max_blocks or min(layout.num_blocks_for(max_model_len), self.num_blocks)
        self._rows = RowTable(max_rows)
        self._tables = BlockTableRows(max_rows, self._max_blocks)
        with torch.inference_mode():
            self._batch = PersistentBatch(max_rows, self._max_blocks, device.torch_device)
            self._records = OutputRecords.on_device(limits.max_num_batched_tokens, device.torch_device)
            self._sampler = RowSampler(max_rows, self.vocab_size, device)
            self._slots = [self._new_slot(max_rows) for _ in range(_STEPS_IN_FLIGHT)]
        self._graphs = DecodeGraphs(max_rows, self._decode)
        device.settle()

    def _new_slot(self, max_rows: int) -> _Slot:
        columns = StepColumns.on_host(max_rows, self._device)
        return _Slot(columns, OutputRecords.on_host(self._limits.max_num_batched_tokens, self._device))

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._kv_cache.shape[0]

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def runs_ahead(self) -> bool:
        return True

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue one step; see engine.runner.Runner. Raises ValueError for more than the limits allow, a third step,
        or a token that is pending of nobody."""
        if not plan.chunks:
            return ReadyStep(StepResult(()))
        started_at = time.perf_counter()
        slot = self._free_slot(plan)
        drawing = [chunk for chunk in plan.chunks if chunk.samples]
        try:
            placement = self._rows.place([chunk.request_id for chunk in drawing])
            rows = placement.rows
            if any(drawing[place].token_ids[0] == PENDING for place in placement.new):
                raise ValueError("a token is pending of a request for which no step before this one drew any")
            works = [self._sampler.update(drawing, rows, placement.new)]
            works += self._decode_works(drawing, rows, slot) if _only_decodes(plan) else [self._mixed(plan, rows, slot)]
            completion = self._device.compute.submit(_in_turn(works))
        except Exception:
            self._distrust([chunk.request_id for chunk in drawing])
            self._device.settle()  # part of the work may be queued, and read what the next launch will write
            raise
        slot.busy = True

        def on_end(failed: Sequence[RequestId]) -> None:
            slot.busy = False
            self._distrust(failed)

        return DeviceStep(plan, slot.records, completion, on_end, time.perf_counter() - started_at)

    def forget(self, request_id: RequestId) -> None:
        self._rows.forget(request_id)

    def warm_up(self, progress: Callable[[str], None]) -> None:
        """Run a prefill chunk, and run and capture every decode size, so that the first request finds kernels compiled.
        Writes to the first blocks: call it before any block is in use."""
        room = min(self._max_model_len, self.num_blocks * self._layout.block_size, self._limits.max_num_batched_tokens)
        tokens = min(_WARM_UP_PREFILL, room)
        self.try_out(prefill_plan(self._layout, self.vocab_size, num_seqs=1, tokens_per_seq=tokens))
        self.capture(progress)

    def try_out(self, plan: StepPlan) -> None:
        """Run a plan of no request's."""
        self.launch(plan).result()
        for chunk in plan.chunks:
            self.forget(chunk.request_id)

    def capture(self, progress: Callable[[str], None], *, largest_only: bool = False) -> None:
        """Run and capture decode steps. Until then they are launched operation by operation. Nothing is in flight."""
        columns = self._slots[0].columns
        columns.fill((), (), columns.rows.numel(), self._rows.padding_row, self._layout.block_size)
        self._device.compute.submit(lambda: self._batch.columns.copy_from(columns)).wait()
        self._graphs.capture(self._device, progress, largest_only=largest_only)

    # Decode steps: everything but the columns is on the device.

    def _decode_works(self, chunks: Sequence[ScheduledChunk], rows: Sequence[int], slot: _Slot) -> list[Work | None]:
        num_rows, size = len(chunks), self._graphs.padded(len(chunks))
        changes = self._tables.update(chunks, rows)
        slot.columns.fill(chunks, rows, size, self._rows.padding_row, self._layout.block_size)
        return [
            None if changes is None else lambda: self._batch.write_tables(changes, self._device),
            lambda: self._batch.columns.copy_from(slot.columns),
            self._graphs.replay(size),
            lambda: slot.records.copy_from(self._records, num_rows),
        ]

    def _decode(self, size: int) -> None:
        """Device work, captured: one token of each of `size` rows, as the batch's columns say. Reads nothing of a step."""
        batch, columns = self._batch, self._batch.columns
        rows, slots, positions = columns.rows[:size], columns.slots[:size], columns.positions[:size]
        token_ids = torch.where(
            columns.token_ids[:size] < 0, batch.last_tokens.index_select(0, rows), columns.token_ids[:size]
        )
        inputs = StepInputs(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            sampling_rows=batch.every_row[:size],
            batch=AttentionBatch(
                query_starts=batch.query_starts[: size + 1],
                context_lens=torch.where(slots < 0, 0, positions + 1).int(),
                block_tables=batch.block_tables.index_select(0, rows),
                max_query_len=1,
                max_context_len=self._max_blocks * self._layout.block_size,
            ),
        )
        logits = self._model.forward(inputs, self._kv_cache)
        drawn = self._sampler.draw(logits, rows, columns.output_positions[:size])
        batch.last_tokens.index_copy_(0, rows, drawn.token_ids)
        self._records.store(drawn)

    # All other steps.

    def _mixed(self, plan: StepPlan, rows: Sequence[int], slot: _Slot) -> Work:
        inputs = MixedInputs.build(plan.chunks, rows, self._layout.block_size)

        def step() -> None:
            last_tokens = self._batch.last_tokens
            logits = self._model.forward(inputs.on_device(last_tokens, self._device), self._kv_cache)
            if inputs.num_draws:
                draw_rows = self._device.upload(inputs.draw_rows)
                drawn = self._sampler.draw(logits, draw_rows, self._device.upload(inputs.output_positions))
                ends = self._device.upload(inputs.last_draws)
                last_tokens.index_copy_(0, draw_rows.index_select(0, ends), drawn.token_ids.index_select(0, ends))
                self._records.store(drawn)
                slot.records.copy_from(self._records, inputs.num_draws)

        return step

    def _free_slot(self, plan: StepPlan) -> _Slot:
        if plan.num_tokens > self._limits.max_num_batched_tokens:
            raise ValueError(f"{plan.num_tokens} tokens in a step of {self._limits.max_num_batched_tokens}")
        free = [slot for slot in self._slots if not slot.busy]
        if not free:
            raise ValueError(f"{_STEPS_IN_FLIGHT} steps are in flight; collect the first before launching another")
        return free[0]

    def _distrust(self, request_ids: Sequence[RequestId]) -> None:
        """Something failed: what the device holds of these requests may be old. They begin anew in whatever row."""
        for request_id in request_ids:
            row = self._rows.forget(request_id)
            if row is not None:
                self._tables.forget(row)
                self._sampler.forget(row)


def _only_decodes(plan: StepPlan) -> bool:
    """Whether each chunk is one token that draws one."""
    return all(chunk.samples and len(chunk.token_ids) == 1 for chunk in plan.chunks)


def _in_turn(works: Sequence[Work | None]) -> Work:
    def run() -> None:
        for work in works:
            if work is not None:
                work()

    return run
