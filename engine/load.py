"""EngineLoad: a moment of the engine, taken between two steps."""

from dataclasses import dataclass, field

from engine.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The first fields describe now, those from `steps` on count since the start.

    `running` and `waiting` count sequences; `num_importing` those whose blocks belong to a transfer (cancelled ones
    included, until they are given back); `num_held` ended prefills whose blocks are not yet released; `num_pins` prefixes
    that are held for others to read; `num_offered_blocks` are being saved by the store.
    `waiting_tokens`: context tokens not yet computed of everything admitted; of imports, while they wait for room.
    `computed_prompt_tokens` are tokens that prefill chunks ran, recomputation included; `cached_prompt_tokens` those
    that prefix-cache hits saved, `imported_prompt_tokens` those that came from elsewhere before the rest was computed;
    `loaded_prompt_tokens` of these, those that the store behind the prefix cache had promised. `lost_blocks`: forgotten
    although the store wanted them, because saving was slower.
    `prefill_tokens_per_s`: of late, None before the first prompt. `draft_tokens` were guessed, and `accepted_drafts[i]` times exactly i guesses of a step and
    sequence were right; it is empty without speculation.
    """

    running: int
    waiting: int
    waiting_tokens: int
    num_importing: int
    num_held: int
    num_pins: int
    num_offered_blocks: int
    free_blocks: int
    total_blocks: int
    steps: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    imported_prompt_tokens: int = 0
    loaded_prompt_tokens: int = 0
    lost_blocks: int = 0
    prefill_tokens_per_s: float | None = None
    sampled_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_drafts: tuple[int, ...] = ()
    times: StepTimes = field(default_factory=StepTimes)
