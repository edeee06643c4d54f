"""MixedInputs: one step of prefill chunks, decodes and drafts as arrays of its own, made on the host."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Self

import torch

from engine.cuda.device import Device
from engine.model.llama import StepInputs
from engine.model.step_inputs import build_step_inputs
from engine.runner import PENDING, ScheduledChunk
from kernels.attention_batch import AttentionBatch

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class MixedInputs:
    """Host tensors. A draw is one row of logits: a chunk that samples has one, and one more for each of its drafts."""

    step: StepInputs
    pending_places: torch.Tensor  # [num_pending], int64: tokens of the step that the device knows and the host does not
    pending_rows: torch.Tensor  # [num_pending], int64: in whose rows they are
    draw_rows: torch.Tensor  # [num_draws], int64
    output_positions: torch.Tensor  # [num_draws], int64
    last_draws: torch.Tensor  # [chunks that sample], int64: the last draw of each, which the next step may begin with

    @classmethod
    def build(cls, chunks: Sequence[ScheduledChunk], rows: Sequence[int], block_size: int) -> Self:
        """`rows` belong to the chunks that sample, in order."""
        starts = [0, *accumulate(len(chunk.token_ids) for chunk in chunks)]
        drawing = [(chunk, start) for chunk, start in zip(chunks, starts, strict=False) if chunk.samples]
        pending = [
            (start, row) for (chunk, start), row in zip(drawing, rows, strict=True) if chunk.token_ids[0] == PENDING
        ]
        sizes = [chunk.num_rows for chunk, _ in drawing]
        positions = (range(chunk.output_position, chunk.output_position + chunk.num_rows) for chunk, _ in drawing)
        return cls(
            step=build_step_inputs(chunks, block_size, _HOST),
            pending_places=_int64(place for place, _ in pending),
            pending_rows=_int64(row for _, row in pending),
            draw_rows=_int64(chain.from_iterable([row] * size for row, size in zip(rows, sizes, strict=True))),
            output_positions=_int64(chain.from_iterable(positions)),
            last_draws=_int64(end - 1 for end in accumulate(sizes)),
        )

    @property
    def num_draws(self) -> int:
        return self.draw_rows.numel()

    def on_device(self, last_tokens: torch.Tensor, device: Device) -> StepInputs:
        """The step's inputs there, pending tokens filled in from `last_tokens` ([rows]). Device work."""
        step, batch = self.step, self.step.batch
        token_ids = device.upload(step.token_ids)
        if self.pending_places.numel():
            known = last_tokens.index_select(0, device.upload(self.pending_rows))
            token_ids.index_copy_(0, device.upload(self.pending_places), known)
        return StepInputs(
            token_ids=token_ids,
            positions=device.upload(step.positions),
            slots=device.upload(step.slots),
            sampling_rows=device.upload(step.sampling_rows),
            batch=AttentionBatch(
                query_starts=device.upload(batch.query_starts),
                context_lens=device.upload(batch.context_lens),
                block_tables=device.upload(batch.block_tables),
                max_query_len=batch.max_query_len,
                max_context_len=batch.max_context_len,
            ),
        )


def _int64(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
