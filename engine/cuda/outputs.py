"""OutputRecords: what a step draws, one record a row, on its way from the device to the host in one copy.

A record is 8-byte words: the token, whether its logits were finite, its log-probability, and the best alternatives with
theirs (protocol.sampling.MAX_TOP_LOGPROBS of them, best first). Steps in flight have a host side each; they share the device side,
because steps run one after another there.
"""

import torch

from engine.cuda.device import Device
from kernels.sampling_tensors import SampledRows
from protocol.errors import InternalError
from protocol.sampling import MAX_TOP_LOGPROBS, SamplingParams
from protocol.tokens import SampledToken

_WORD_BYTES = 8
_TOKEN, _FINITE, _LOGPROB, _TOP = 0, 1, 2, 3  # in words; the last holds an id and a log-probability of 4 bytes each
_WORDS = _TOP + MAX_TOP_LOGPROBS


class OutputRecords:
    """Records of at most `capacity` rows in one memory: int64 [capacity, words], read and written by their fields."""

    def __init__(self, memory: torch.Tensor) -> None:
        assert memory.dtype == torch.int64
        assert memory.shape[1] == _WORDS
        self.memory = memory
        halves, reals = memory.view(torch.int32), memory.view(torch.float32)  # [capacity, 2 * words]
        self.token_ids = memory[:, _TOKEN]
        self.finite = memory[:, _FINITE]
        self.logprobs = reals[:, 2 * _LOGPROB]
        self.top_ids = halves[:, 2 * _TOP :: 2]
        self.top_logprobs = reals[:, 2 * _TOP + 1 :: 2]

    @classmethod
    def on_device(cls, capacity: int, device: torch.device) -> "OutputRecords":
        return cls(torch.zeros((capacity, _WORDS), dtype=torch.int64, device=device))

    @classmethod
    def on_host(cls, capacity: int, device: Device) -> "OutputRecords":
        return cls(device.pinned((capacity, _WORDS), torch.int64))

    def store(self, drawn: SampledRows) -> None:
        """The first rows become what was drawn. Device work."""
        num_rows, num_top = drawn.top_ids.shape
        self.token_ids[:num_rows].copy_(drawn.token_ids)
        self.finite[:num_rows].copy_(drawn.finite)
        self.logprobs[:num_rows].copy_(drawn.logprobs)
        self.top_ids[:num_rows, :num_top].copy_(drawn.top_ids)
        self.top_logprobs[:num_rows, :num_top].copy_(drawn.top_logprobs)

    def copy_from(self, source: "OutputRecords", num_rows: int) -> None:
        """The first rows, in one copy that the host does not wait for. Device work."""
        self.memory[:num_rows].copy_(source.memory[:num_rows], non_blocking=True)

    def read(self, params: list[SamplingParams], output_positions: list[int]) -> list[SampledToken | InternalError]:
        """The first rows as what the engine is told of them. Host side, after the copy has ended."""
        num_rows = len(params)
        token_ids, finite = self.token_ids[:num_rows].tolist(), self.finite[:num_rows].tolist()
        read: list[SampledToken | InternalError] = []
        for row, (wanted, position) in enumerate(zip(params, output_positions, strict=True)):
            if not finite[row]:
                read.append(InternalError(f"the model's logits are not finite at output position {position}"))
            elif wanted.logprobs is None:
                read.append(SampledToken(token_ids[row]))
            else:
                read.append(self._with_logprobs(row, token_ids[row], wanted.logprobs))
        return read

    def _with_logprobs(self, row: int, token_id: int, num_top: int) -> SampledToken:
        ids, values = self.top_ids[row, :num_top].tolist(), self.top_logprobs[row, :num_top].tolist()
        return SampledToken(token_id, float(self.logprobs[row]), tuple(zip(ids, values, strict=True)))
