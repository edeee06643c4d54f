"""Runner: the seam between the scheduler, which decides, and the device, which computes.

A step is launched, and its result is collected later; at most two steps are in flight, and they run in the order in which
they were launched. So the engine may plan a step while the device still computes the one before it: where that one draws
the token which the new step begins with, the plan says PENDING.

Three implementations ship: `engine.torch_runner.TorchRunner` runs a model within `launch`; `engine.cuda.runner.CudaRunner`
queues it on a device that works while the host goes on; `engine.simulated_runner.SimulatedRunner` makes tokens that can be
worked out by hand, in time taken from a cost model. All are called from the engine's thread only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.errors import HeadraceError
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken

PENDING = -1
"""In place of a token id: the token that the step before this one draws for the same request; the runner has it, the engine does not yet."""


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """One sequence's share of a step: run `token_ids` at positions `start`, `start + 1`, ...

    The first token may be PENDING, in a decode. The last `num_drafts` tokens are guesses of what follows the token before
    them. With `samples`, a token is drawn after each of the last `num_drafts + 1` tokens, for output positions
    `output_position`, `output_position + 1`, ...

    `block_ids` is the block table up to the end of this chunk; `prompt_token_ids` and `output_token_ids` are what penalties
    are taken over. All three are live views, valid until `launch` returns. A sequence with penalties comes with all of
    its output, and without PENDING or drafts.
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
    num_drafts: int = 0

    @property
    def num_rows(self) -> int:
        """Tokens that are drawn."""
        return self.num_drafts + 1 if self.samples else 0

    @property
    def drafts(self) -> Sequence[int]:
        return self.token_ids[len(self.token_ids) - self.num_drafts :]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes: decodes (one token each, and its drafts) first, then prefill chunks."""

    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepResult:
    """`sampled[i]` belongs to `plan.chunks[i]`: the tokens that stand, none where the chunk does not sample, or the error
    (say, logits that are not finite) that ends this one sequence.

    Tokens stand while each equals the draft that follows it, and so does the first that does not: 1 to num_drafts + 1 of
    them. `prepare_s` and `sample_s`: host time spent on the step's inputs and on drawing and reading its tokens, as far as
    the runner tells them from computing.
    """

    sampled: tuple[tuple[SampledToken, ...] | HeadraceError, ...]
    prepare_s: float = 0.0
    sample_s: float = 0.0


class LaunchedStep(Protocol):
    """A step on its way."""

    def result(self) -> StepResult:
        """Wait for the device. Raises what the step raised. Called once, after that of the step launched before."""
        ...


@dataclass(frozen=True, slots=True)
class ReadyStep:
    """A step that was over when `launch` returned."""

    ready: StepResult

    def result(self) -> StepResult:
        return self.ready


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

    @property
    def runs_ahead(self) -> bool:
        """Whether `launch` returns before the device is done, so that planning the next step meanwhile gains time."""
        ...

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Begin one step. After an exception, here or from `result`, the engine waits for the other step in flight, drops
        what it drew, and tries each sequence of the plan alone: running a chunk twice must be harmless."""
        ...

    def forget(self, request_id: RequestId) -> None:
        """The sequence has left the engine, and no step in flight has it: drop per-sequence state. Unknown ids are no error."""
        ...


def standing(
    drawn: Iterable[SampledToken | HeadraceError], drafts: Sequence[int]
) -> tuple[SampledToken, ...] | HeadraceError:
    """Of the tokens drawn after a chunk's last num_drafts + 1 tokens, those that stand.

    What was drawn after a token that was guessed right is what would have been drawn without the guess. A row that failed
    after tokens that stand is left to the next step, which will compute it again.
    """
    tokens: list[SampledToken] = []
    for row, token in enumerate(drawn):
        if isinstance(token, HeadraceError):
            return tuple(tokens) if tokens else token
        tokens.append(token)
        if row == len(drafts) or token.token_id != drafts[row]:
            break
    return tuple(tokens)
