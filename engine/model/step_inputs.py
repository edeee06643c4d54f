"""One step's plan as tensors: Python per chunk, numpy per token."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from engine.model.llama import StepInputs
from engine.runner import ScheduledChunk
from kernels.attention_batch import AttentionBatch


def build_step_inputs(chunks: Sequence[ScheduledChunk], block_size: int, device: torch.device) -> StepInputs:
    """The chunks must not be empty, neither the list nor any of them, and their blocks must reach to their ends. No token may be PENDING."""
    query_lens = np.fromiter((len(chunk.token_ids) for chunk in chunks), np.int32, len(chunks))
    first_positions = np.fromiter((chunk.start for chunk in chunks), np.int32, len(chunks))
    context_lens = first_positions + query_lens
    query_starts = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(query_lens, out=query_starts[1:])
    num_tokens = int(query_starts[-1])
    token_ids = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int64, num_tokens)

    num_blocks = (-(-context_lens // block_size)).tolist()
    block_tables = np.zeros((len(chunks), max(num_blocks)), np.int32)
    for row, (chunk, used) in enumerate(zip(chunks, num_blocks, strict=True)):
        block_tables[row, :used] = chunk.block_ids if len(chunk.block_ids) == used else chunk.block_ids[:used]

    if num_tokens == len(chunks):  # a token each, as when nothing but decodes runs
        sequence_of, positions = np.arange(num_tokens), first_positions
    else:
        sequence_of = np.repeat(np.arange(len(chunks)), query_lens)
        positions = np.arange(num_tokens) + (first_positions - query_starts[:-1])[sequence_of]
    slots = block_tables[sequence_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return StepInputs(
        token_ids=_on(device, token_ids),
        positions=_on(device, positions.astype(np.int64)),
        slots=_on(device, slots),
        sampling_rows=_on(device, _sampling_rows(chunks, query_starts[1:].astype(np.int64))),
        batch=AttentionBatch(
            query_starts=_on(device, query_starts),
            context_lens=_on(device, context_lens),
            block_tables=_on(device, block_tables),
            max_query_len=int(query_lens.max()),
            max_context_len=int(context_lens.max()),
        ),
    )


def _sampling_rows(chunks: Sequence[ScheduledChunk], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The last num_rows tokens of each chunk, in order; `ends[i]` is behind the last token of chunk i."""
    num_rows = np.fromiter((chunk.num_rows for chunk in chunks), np.int64, len(chunks))
    row_ends = num_rows.cumsum()
    rows: npt.NDArray[np.int64] = np.arange(row_ends[-1]) + np.repeat(ends - row_ends, num_rows)
    return rows


def _on(device: torch.device, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
