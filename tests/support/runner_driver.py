"""A driver for a Runner without an engine: hands out blocks by hand, keeps a batch of sequences, runs steps."""

from dataclasses import dataclass, field

from engine.runner import Runner, ScheduledChunk, StepPlan
from protocol.errors import HeadraceError
from protocol.ids import RequestId
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken

GREEDY = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0)


@dataclass
class Sequence:
    request_id: RequestId
    prompt: list[int]
    sampling: SamplingParams = GREEDY
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return [token.token_id for token in self.tokens]


class Driver:
    """Blocks are handed out in an order that is not theirs, so that a table that is ignored is noticed."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._free = [block for step in range(3) for block in range(step, runner.num_blocks, 3)]

    def chunk(self, sequence: Sequence, num_tokens: int) -> ScheduledChunk:
        """The next `num_tokens` tokens of a sequence; samples if they are the last."""
        context = sequence.prompt + sequence.output
        end = sequence.num_computed + num_tokens
        assert end <= len(context)
        while len(sequence.block_ids) < self.runner.layout.num_blocks_for(end):
            sequence.block_ids.append(self._free.pop())
        chunk = ScheduledChunk(
            request_id=sequence.request_id,
            token_ids=context[sequence.num_computed : end],
            start=sequence.num_computed,
            block_ids=sequence.block_ids,
            samples=end == len(context),
            output_position=len(sequence.tokens),
            sampling=sequence.sampling,
            prompt_token_ids=sequence.prompt,
            output_token_ids=sequence.output,
        )
        sequence.num_computed = end
        return chunk

    def step(self, *scheduled: tuple[Sequence, int]) -> list[SampledToken | HeadraceError | None]:
        """Run one step of (sequence, number of its tokens); tokens are appended to their sequences."""
        result = self.runner.launch(StepPlan(tuple(self.chunk(*each) for each in scheduled))).result()
        drawn: list[SampledToken | HeadraceError | None] = []
        for (sequence, _), sampled in zip(scheduled, result.sampled, strict=True):
            if isinstance(sampled, HeadraceError):
                drawn.append(sampled)
                continue
            assert len(sampled) <= 1, "nothing was guessed"
            sequence.tokens += sampled
            drawn.append(sampled[0] if sampled else None)
        return drawn

    def generate(self, prompt: list[int], num_tokens: int, chunk: int = 1 << 20, **sampling: object) -> Sequence:
        """One sequence alone, its prompt in chunks of at most `chunk` tokens."""
        params = SamplingParams(**{"max_tokens": num_tokens, "seed": 0, "temperature": 0.0, **sampling})
        sequence = Sequence(RequestId(f"request-{id(prompt)}"), prompt, params)
        while sequence.num_computed < len(prompt):
            self.step((sequence, min(chunk, len(prompt) - sequence.num_computed)))
        while len(sequence.tokens) < num_tokens:
            self.step((sequence, 1))
        self.runner.forget(sequence.request_id)
        self._free += sequence.block_ids
        return sequence
