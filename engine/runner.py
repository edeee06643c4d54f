"""Runner: the seam between the scheduler, which decides, and the device, which computes.

Two implementations ship: `engine.torch_runner.TorchRunner` runs a model; `engine.simulated_runner.SimulatedRunner` makes tokens that can be
worked out by hand, in time taken from a cost model. Both are called from the engine's thread only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.errors import HeadraceError
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """One sequence's share of a step: run `token_ids` at positions `start`, `start + 1`, ...

    `block_ids` is the block table up to the end of this chunk. With `samples`, a token is drawn after the last one, for
    output position `output_position`; `prompt_token_ids` and `output_token_ids` are what penalties are taken over
    (live views, valid during the call).
    """

    request_id: RequestId
    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    samples: bool
    output_position: int
    sampling: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes: decodes (one token each) first, then prefill chunks."""

    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepResult:
    """`sampled[i]` belongs to `plan.chunks[i]`: the token, None where the chunk does not sample, or the error (say,
    logits that are not finite) that ends this one sequence."""

    sampled: tuple[SampledToken | HeadraceError | None, ...]


class Runner(Protocol):
    """Computes steps over a paged KV cache of `num_blocks` blocks of `layout`."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens of one sequence, at most."""
        ...

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step. After an exception the engine tries each sequence of the plan alone; running a chunk twice must
        be harmless."""
        ...

    def forget(self, request_id: RequestId) -> None:
        """The sequence has left the engine: drop per-sequence state. Unknown ids are no error."""
        ...
