"""SimulatedRunner: tokens that can be worked out by hand, in time taken from a cost model. No tensors.

The token after a context of tokens t[0], t[1], ... t[n-1] is

    next = sum over i of (i + 1) * (t[i] + 1), modulo the vocabulary

so it depends on every token and its place, and not on how steps were cut or batched. Where that is a stop token which
`min_tokens` forbids, the next larger one that is allowed is taken, around the end of the vocabulary. Other sampling
parameters change nothing; the token's log-probability is 0.

Given memory, the runner keeps the sums there instead of taking them from the request: each token's slot of its block
holds the block's sum up to that token, as 8 little-endian bytes. A step reads one slot of every block of the context. A
block that was not transferred, or belongs to another context, therefore gives another token.

An asynchronous runner does nothing in `launch` but note what it is to do. It does that when a result is wanted, step by step in
the order of their launch, also behind one that failed: what is written into blocks meanwhile is what a step finds there, as
on a device that is busy with the step before.
"""

import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from typing import Protocol

from engine.runner import PENDING, LaunchedStep, ReadyStep, ScheduledChunk, StepPlan, StepResult, standing
from protocol.errors import ConfigError
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.tokens import SampledToken

_SUM = struct.Struct("<Q")
_MODULUS = 1 << 64  # never reached by our own sums; what lies in a wrong block may be anything


def next_token(context: Sequence[int], vocab_size: int) -> int:
    """The token that follows these, by the rule above and without forbidden tokens."""
    return _weighted_sum(context, 0) % vocab_size


@dataclass(frozen=True, slots=True)
class SimulatedCost:
    """Duration of a step: step_s + prefill_token_s a token of chunks longer than one + decode_sequence_s a one-token
    chunk, guesses not counted."""

    step_s: float = 0.0
    prefill_token_s: float = 0.0
    decode_sequence_s: float = 0.0

    def duration_s(self, plan: StepPlan) -> float:
        lengths = [len(chunk.token_ids) - chunk.num_drafts for chunk in plan.chunks]
        num_decodes = lengths.count(1)
        num_prefill_tokens = sum(lengths) - num_decodes
        return self.step_s + num_prefill_tokens * self.prefill_token_s + num_decodes * self.decode_sequence_s


class SimulatedRunner:
    """`memory` has num_blocks * layout.block_bytes bytes. `sleep` spends the time that a step costs."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        *,
        vocab_size: int,
        max_model_len: int,
        cost: SimulatedCost | None = None,
        sleep: Callable[[float], None] = time.sleep,
        memory: memoryview | None = None,
        asynchronous: bool = False,
    ) -> None:
        if memory is not None and layout.token_bytes < _SUM.size:
            raise ConfigError(f"a simulated KV cache needs {_SUM.size} bytes a token, the layout has less")
        if memory is not None and memory.nbytes != num_blocks * layout.block_bytes:
            raise ConfigError(f"{memory.nbytes} bytes of memory are not {num_blocks} blocks of {layout.block_bytes}")
        self._layout = layout
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._cost = cost or SimulatedCost()
        self._sleep = sleep
        self._asynchronous = asynchronous
        self._noted_steps: deque[_NotedStep] = deque()
        self._last_tokens: dict[RequestId, int] = {}
        self._sums: _Sums = _RememberedSums() if memory is None else _StoredSums(layout, memory.cast("B"))

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def runs_ahead(self) -> bool:
        return self._asynchronous

    def launch(self, plan: StepPlan) -> LaunchedStep:
        if not self._asynchronous:
            return ReadyStep(self.compute(plan))
        step = _NotedStep(self, StepPlan(tuple(_noted(chunk) for chunk in plan.chunks)))
        self._noted_steps.append(step)
        return step

    def compute_noted(self) -> None:
        """The oldest step that was launched and is not yet computed."""
        step = self._noted_steps.popleft()
        try:
            step.outcome = self.compute(step.plan)
        except Exception as error:  # noqa: BLE001 - the step's `result` raises it again
            step.outcome = error

    def compute(self, plan: StepPlan) -> StepResult:
        """A step from beginning to end."""
        duration_s = self._cost.duration_s(plan)
        if duration_s > 0.0:
            self._sleep(duration_s)
        return StepResult(tuple(self._tokens(chunk) for chunk in plan.chunks))

    def forget(self, request_id: RequestId) -> None:
        self._sums.forget(request_id)
        self._last_tokens.pop(request_id, None)

    def _tokens(self, chunk: ScheduledChunk) -> tuple[SampledToken, ...]:
        if chunk.token_ids[0] == PENDING:
            chunk = replace(chunk, token_ids=[self._last_tokens[chunk.request_id], *chunk.token_ids[1:]])
        total = self._sums.extend(chunk)
        if not chunk.samples:
            return ()
        drafts_at = chunk.start + len(chunk.token_ids) - chunk.num_drafts
        weights = [(position + 1) * (token + 1) for position, token in enumerate(chunk.drafts, drafts_at)]
        totals = accumulate(weights, initial=total - sum(weights))
        drawn = [self._token(chunk, position, each) for position, each in enumerate(totals, chunk.output_position)]
        tokens = standing(drawn, chunk.drafts)
        assert isinstance(tokens, tuple), "no row of this runner fails"
        self._last_tokens[chunk.request_id] = tokens[-1].token_id
        return tokens

    def _token(self, chunk: ScheduledChunk, output_position: int, total: int) -> SampledToken:
        sampling = chunk.sampling
        forbidden = sampling.stop_token_ids if output_position < sampling.min_tokens else ()
        candidates = ((total + step) % self._vocab_size for step in range(self._vocab_size))
        token_id = next((token for token in candidates if token not in forbidden), total % self._vocab_size)
        if sampling.logprobs is None:
            return SampledToken(token_id)
        return SampledToken(token_id, 0.0, ((token_id, 0.0),) if sampling.logprobs else ())


class _NotedStep:
    """A step of an asynchronous runner; `outcome` is None until it has been computed."""

    def __init__(self, runner: SimulatedRunner, plan: StepPlan) -> None:
        self._runner = runner
        self.plan = plan
        self.outcome: StepResult | Exception | None = None

    def result(self) -> StepResult:
        while self.outcome is None:
            self._runner.compute_noted()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def _noted(chunk: ScheduledChunk) -> ScheduledChunk:
    """The chunk without views of what others may change."""
    return replace(chunk, block_ids=tuple(chunk.block_ids), output_token_ids=tuple(chunk.output_token_ids))


class _Sums(Protocol):
    """The weighted sums of contexts."""

    def extend(self, chunk: ScheduledChunk) -> int:
        """Add a chunk's tokens. Returns the sum of the whole context up to its end."""
        ...

    def forget(self, request_id: RequestId) -> None: ...


class _RememberedSums:
    """Sums by request. Where the context before a chunk was computed elsewhere, the request says what it is."""

    def __init__(self) -> None:
        self._sums: dict[RequestId, tuple[int, int]] = {}

    def extend(self, chunk: ScheduledChunk) -> int:
        end, total = self._sums.get(chunk.request_id, (0, 0))
        if end != chunk.start:
            known = chain(chunk.prompt_token_ids, chunk.output_token_ids)
            total = _weighted_sum(islice(known, chunk.start), 0)
        total += _weighted_sum(chunk.token_ids, chunk.start)
        self._sums[chunk.request_id] = (chunk.start + len(chunk.token_ids), total)
        return total

    def forget(self, request_id: RequestId) -> None:
        self._sums.pop(request_id, None)


class _StoredSums:
    """Sums in the KV blocks, and nowhere else."""

    def __init__(self, layout: KVLayout, memory: memoryview) -> None:
        self._layout = layout
        self._memory = memory

    def extend(self, chunk: ScheduledChunk) -> int:
        block_size = self._layout.block_size
        end = chunk.start + len(chunk.token_ids)
        for position, token_id in enumerate(chunk.token_ids, chunk.start):
            block_id, slot = chunk.block_ids[position // block_size], position % block_size
            before = self._read(block_id, slot - 1) if slot else 0
            _SUM.pack_into(
                self._memory, self._offset(block_id, slot), (before + (position + 1) * (token_id + 1)) % _MODULUS
            )
        num_full_blocks, num_rest = divmod(end, block_size)
        total = sum(self._read(block_id, block_size - 1) for block_id in chunk.block_ids[:num_full_blocks])
        return total + (self._read(chunk.block_ids[num_full_blocks], num_rest - 1) if num_rest else 0)

    def forget(self, request_id: RequestId) -> None:
        """Blocks are not the request's to clean."""

    def _read(self, block_id: int, slot: int) -> int:
        total: int = _SUM.unpack_from(self._memory, self._offset(block_id, slot))[0]
        return total

    def _offset(self, block_id: int, slot: int) -> int:
        return block_id * self._layout.block_bytes + slot * self._layout.token_bytes


def _weighted_sum(token_ids: Iterable[int], start: int) -> int:
    return sum((index + 1) * (token_id + 1) for index, token_id in enumerate(token_ids, start))
