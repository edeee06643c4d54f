"""RowSampler: draws tokens on the device from parameters that stay there, so that no step waits for the host.

Each row of the batch has its sampling parameters in persistent tensors; a request that gets a row writes them once. What a
row draws is what engine.sampling.sampler draws from the same logits: the same cuts, the same uniform numbers, the same
order of operations. TorchRowSampler is made of torch operations that never ask the device for a value. It sorts whole rows,
which a kernel of its own need not.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from engine.cuda.device import Device, Work
from engine.cuda.outputs import DrawnRows
from engine.runner import ScheduledChunk
from engine.sampling.draw import Cuts, draw_without_waiting
from engine.sampling.parameters import COLDEST
from engine.sampling.randomness import device_uniforms
from engine.sampling.sampler import first_argmax
from protocol.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS, SamplingParams


class RowSampler(Protocol):
    def update(self, chunks: Sequence[ScheduledChunk], rows: Sequence[int], new: Sequence[int]) -> Work | None:
        """What must happen on the device before these rows draw; None if nothing. `new`: places of the chunks whose
        request has only now got its row. A sequence with penalties comes with all of its output."""
        ...

    def forget(self, row: int) -> None:
        """Work on this row may not have been done. It comes as a new one next time."""
        ...

    def draw(self, logits: torch.Tensor, rows: torch.Tensor, output_positions: torch.Tensor) -> DrawnRows:
        """One token for each row of logits ([num_rows, vocab_size], float32), with the parameters of `rows` ([num_rows],
        int64, may repeat), for `output_positions` ([num_rows], int64). Device work, and may be captured."""
        ...


class TorchRowSampler:
    """For `max_rows` rows and one more for padding, which is greedy."""

    def __init__(self, max_rows: int, vocab_size: int, device: Device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        num_rows, on = max_rows + 1, device.torch_device
        self._integers = torch.zeros((num_rows, 3), dtype=torch.int64, device=on)  # seed, top_k, min_tokens
        # temperature (0: greedy), top_p, min_p; repetition, presence and frequency penalty
        self._reals = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64, device=on).repeat(num_rows, 1)
        # An id of vocab_size is one token too many: what is written there is cut off.
        self._stop_ids = torch.full((num_rows, MAX_STOP_TOKENS), vocab_size, dtype=torch.int64, device=on)
        self._bias_ids = torch.full((num_rows, MAX_LOGIT_BIAS), vocab_size, dtype=torch.int64, device=on)
        self._biases = torch.zeros((num_rows, MAX_LOGIT_BIAS), dtype=torch.float32, device=on)
        self._seen = torch.zeros((num_rows, vocab_size), dtype=torch.bool, device=on)
        self._counts = torch.zeros((num_rows, vocab_size), dtype=torch.float32, device=on)
        self._num_observed: dict[int, int] = {}  # by row, of rows with penalties

    def update(self, chunks: Sequence[ScheduledChunk], rows: Sequence[int], new: Sequence[int]) -> Work | None:
        works = [self._assignment([chunks[place] for place in new], [rows[place] for place in new])] if new else []
        fresh = {rows[place] for place in new}
        for chunk, row in zip(chunks, rows, strict=True):
            if chunk.sampling.has_penalties:
                works += self._observation(chunk, row, fresh=row in fresh)
        return _all_of(works) if works else None

    def forget(self, row: int) -> None:
        self._num_observed.pop(row, None)

    def draw(self, logits: torch.Tensor, rows: torch.Tensor, output_positions: torch.Tensor) -> DrawnRows:
        finite = logits.amax(dim=-1).isfinite() & logits.amin(dim=-1).isfinite()
        logits = torch.where(finite[:, None], logits, 0.0)
        seeds, top_k, min_tokens = self._integers.index_select(0, rows).unbind(1)
        temperatures, top_p, min_p, *penalties = self._reals.index_select(0, rows).unbind(1)
        adjusted = self._adjusted(logits, rows, output_positions < min_tokens, penalties)
        greedy = temperatures == 0.0
        drawn = draw_without_waiting(
            adjusted,
            torch.where(greedy, 1.0, temperatures).float(),
            Cuts(top_k=top_k, top_p=top_p, min_p=min_p),
            device_uniforms(seeds, output_positions),
        )
        token_ids = torch.where(greedy, first_argmax(adjusted), drawn)
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        top = logits.topk(min(MAX_TOP_LOGPROBS, self._vocab_size), dim=-1)
        sampled = (logits.gather(1, token_ids[:, None]) - normaliser).squeeze(1)
        return DrawnRows(token_ids, finite, sampled, top.indices, top.values - normaliser)

    def _adjusted(
        self, logits: torch.Tensor, rows: torch.Tensor, early: torch.Tensor, penalties: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Logit bias, minimum length and penalties as in engine.sampling.adjust; a new tensor."""
        num_rows, vocab_size = logits.shape
        wide = torch.zeros((num_rows, vocab_size + 1), dtype=torch.float32, device=logits.device)
        wide.scatter_(1, self._bias_ids.index_select(0, rows), self._biases.index_select(0, rows))
        adjusted = logits + wide[:, :vocab_size]
        stops = torch.zeros((num_rows, vocab_size + 1), dtype=torch.bool, device=logits.device)
        stops.scatter_(1, self._stop_ids.index_select(0, rows), early[:, None].expand(-1, MAX_STOP_TOKENS))
        adjusted.masked_fill_(stops[:, :vocab_size], -torch.inf)
        repetition, presence, frequency = (each.float()[:, None] for each in penalties)
        seen, counts = self._seen.index_select(0, rows), self._counts.index_select(0, rows)
        repeated = torch.where(adjusted > 0, adjusted / repetition, adjusted * repetition)
        return torch.where(seen, repeated - frequency * counts - presence * (counts > 0), adjusted)

    def _assignment(self, chunks: Sequence[ScheduledChunk], rows: Sequence[int]) -> Work:
        """The parameters of new rows."""
        params = [chunk.sampling for chunk in chunks]
        integers = torch.tensor([[each.seed, each.top_k, each.min_tokens] for each in params], dtype=torch.int64)
        reals = torch.tensor([_reals(each) for each in params], dtype=torch.float64)
        stop_ids = np.full((len(rows), MAX_STOP_TOKENS), self._vocab_size, np.int64)
        bias_ids = np.full((len(rows), MAX_LOGIT_BIAS), self._vocab_size, np.int64)
        biases = np.zeros((len(rows), MAX_LOGIT_BIAS), np.float32)
        for place, each in enumerate(params):
            stop_ids[place, : len(each.stop_token_ids)] = each.stop_token_ids
            bias_ids[place, : len(each.logit_bias)] = list(each.logit_bias)
            biases[place, : len(each.logit_bias)] = list(each.logit_bias.values())
        tables = (self._integers, self._reals, self._stop_ids, self._bias_ids, self._biases)
        arrays = (integers, reals, *map(torch.from_numpy, (stop_ids, bias_ids, biases)))
        where = torch.tensor(rows, dtype=torch.int64)

        def assign() -> None:
            index = self._device.upload(where)
            for table, values in zip(tables, arrays, strict=True):
                table.index_copy_(0, index, self._device.upload(values))

        return assign

    def _observation(self, chunk: ScheduledChunk, row: int, *, fresh: bool) -> list[Work]:
        """The tokens of a sequence with penalties that its row has not seen yet."""
        observed, works = self._num_observed.get(row), list[Work]()
        if fresh or observed is None or observed > len(chunk.output_token_ids):
            observed = 0
            works.append(self._beginning(torch.tensor(chunk.prompt_token_ids, dtype=torch.int64), row))
        emitted = torch.tensor(chunk.output_token_ids[observed:], dtype=torch.int64)
        self._num_observed[row] = len(chunk.output_token_ids)
        return [*works, self._emission(emitted, row)] if len(emitted) else works

    def _beginning(self, prompt: torch.Tensor, row: int) -> Work:
        def begin() -> None:
            self._seen[row].zero_()
            self._counts[row].zero_()
            if len(prompt):
                self._seen[row].index_fill_(0, self._device.upload(prompt), True)

        return begin

    def _emission(self, emitted: torch.Tensor, row: int) -> Work:
        def emit() -> None:
            token_ids = self._device.upload(emitted)
            self._seen[row].index_fill_(0, token_ids, True)
            # Whole numbers far below 2**24: exact in float32, in whatever order they are added.
            self._counts[row].index_add_(0, token_ids, torch.ones_like(token_ids, dtype=torch.float32))

        return emit


def _reals(params: SamplingParams) -> tuple[float, ...]:
    temperature = 0.0 if params.greedy else max(params.temperature, COLDEST)
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return (temperature, params.top_p, params.min_p, *penalties)


def _all_of(works: Sequence[Work]) -> Work:
    def run() -> None:
        for work in works:
            work()

    return run
