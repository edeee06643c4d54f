"""RowSampler: draws tokens on the device from parameters that stay there, so that no step waits for the host.

Each row of the batch has its sampling parameters in persistent tensors. A request that gets a row brings them along once; a
sequence with penalties also brings, with every step, the tokens that it has emitted since. The host knows them all
(engine.runner), so nothing that a step counted has to be taken back when its tokens do not stand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.cuda.device import Device, Work
from engine.runner import ScheduledChunk
from kernels.sampling import sample_rows
from kernels.sampling_tensors import SampledRows, SamplingTensors
from protocol.sampling import MAX_TOP_LOGPROBS


@dataclass(frozen=True, slots=True)
class _Observed:
    """What a row is to learn of its sequence. `prompt` None: it knows the prompt, and goes on."""

    row: int
    prompt: torch.Tensor | None
    emitted: Sequence[int]


class RowSampler:
    """For `max_rows` rows and one more for padding, which is greedy."""

    def __init__(self, max_rows: int, vocab_size: int, device: Device) -> None:
        self._device = device
        self._tensors = SamplingTensors.allocate(max_rows + 1, vocab_size, device.torch_device)
        self._num_observed: dict[int, int] = {}  # output tokens, by row, of rows with penalties

    def update(self, chunks: Sequence[ScheduledChunk], rows: Sequence[int], new: Sequence[int]) -> Work | None:
        """What must happen on the device before these rows draw; None if nothing. `new`: places of the chunks whose
        request has only now got its row."""
        for place in new:
            self._num_observed.pop(rows[place], None)
        observed = [
            self._observe(chunk, row) for chunk, row in zip(chunks, rows, strict=True) if chunk.sampling.has_penalties
        ]
        if not new and not observed:
            return None
        params = SamplingTensors.of([chunks[place].sampling for place in new])
        index = torch.tensor([rows[place] for place in new], dtype=torch.int64)
        emitted = _emitted(observed)

        def work() -> None:
            if len(index):
                self._tensors.assign(self._device.upload(index), params.map(self._device.upload))
            for each in observed:
                if each.prompt is not None:
                    self._tensors.observe_prompt(each.row, self._device.upload(each.prompt))
            if emitted.numel():
                self._tensors.observe_output(*self._device.upload(emitted).unbind(0))

        return work

    def forget(self, row: int) -> None:
        """Work on this row may not have been done. It comes as a new one next time."""
        self._num_observed.pop(row, None)

    def draw(self, logits: torch.Tensor, rows: torch.Tensor, output_positions: torch.Tensor) -> SampledRows:
        """One token for each row of logits ([num_rows, vocab_size], float32), with the parameters of `rows` ([num_rows],
        int64, may repeat), for `output_positions` ([num_rows], int64). Device work, and may be captured."""
        return sample_rows(logits, self._tensors, rows, output_positions, MAX_TOP_LOGPROBS)

    def _observe(self, chunk: ScheduledChunk, row: int) -> _Observed:
        num_observed, prompt = self._num_observed.get(row), None
        if num_observed is None or num_observed > len(chunk.output_token_ids):
            num_observed, prompt = 0, torch.tensor(chunk.prompt_token_ids, dtype=torch.int64)
        self._num_observed[row] = len(chunk.output_token_ids)
        return _Observed(row, prompt, tuple(chunk.output_token_ids[num_observed:]))


def _emitted(observed: Sequence[_Observed]) -> torch.Tensor:
    """int64 [2, n]: the row of every emitted token, and the token."""
    rows = [each.row for each in observed for _ in each.emitted]
    return torch.tensor([rows, [token_id for each in observed for token_id in each.emitted]], dtype=torch.int64)
