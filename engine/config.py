"""EngineConfig: what one engine may do in a step and how much it takes on. Frozen for the engine's life."""

from dataclasses import dataclass
from typing import Literal

from protocol.errors import ConfigError

Switch = Literal["auto", "on", "off"]

MAX_DRAFTS = 15
"""With the token before them they are the 16 rows up to which the C++ kernels attend as they do for one row, bit for bit
(kFewQueries in kernels/native/attention_plan.h)."""

MAX_NGRAM = 8
"""Tokens of the longest n-gram that is looked up. Each length costs time and memory for every token of a sequence, and who
agrees on eight tokens seldom disagrees on the ninth."""


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """`num_draft_tokens`: guesses a step and sequence, at most. `ngram_min` and `ngram_max`: how many of the last tokens
    must have stood together before, at most MAX_NGRAM; see engine.speculation."""

    num_draft_tokens: int = 4
    ngram_min: int = 2
    ngram_max: int = 4

    def __post_init__(self) -> None:
        for name in ("num_draft_tokens", "ngram_min"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}", param=name)
        for name, limit in (("num_draft_tokens", MAX_DRAFTS), ("ngram_min", MAX_NGRAM), ("ngram_max", MAX_NGRAM)):
            if getattr(self, name) > limit:
                raise ConfigError(f"{name} must be at most {limit}, not {getattr(self, name)}", param=name)
        if self.ngram_max < self.ngram_min:
            raise ConfigError(
                f"ngram_max must be at least ngram_min ({self.ngram_min}), not {self.ngram_max}", param="ngram_max"
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises ConfigError, naming the setting, on a value that could not work.

    `max_num_batched_tokens`: token budget of one step. It also caps the rows of a step, so that prefill always gets a
    token of it. `max_num_seqs`: sequences that run or are being imported at once. `max_waiting_tokens`: context tokens
    not yet computed, of all admitted requests together, above which `submit` raises Overloaded; one request is always
    taken. `max_prefill_chunk`: tokens of one sequence in one step, at most; None leaves it to the budget.
    `watermark`: share of the blocks that admission leaves free for running sequences to grow into.
    `async_scheduling`: plan and launch a step while the one before it computes; "auto" where the runner gains by it.
    `speculation`: guess tokens by prompt lookup; None guesses nothing.
    """

    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_waiting_tokens: int = 262_144
    max_prefill_chunk: int | None = None
    enable_prefix_cache: bool = True
    watermark: float = 0.01
    async_scheduling: Switch = "auto"
    speculation: SpeculationConfig | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_waiting_tokens", "max_prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}", param=name)
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigError(f"watermark must be in [0, 1), not {self.watermark}", param="watermark")
