"""EngineConfig: what one engine may do in a step and how much it takes on. Frozen for the engine's life."""

from dataclasses import dataclass

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises ConfigError, naming the setting, on a value that could not work.

    `max_num_batched_tokens`: token budget of one step. It also caps the rows of a step, so that prefill always gets a
    token of it. `max_num_seqs`: sequences that run or are being imported at once. `max_waiting_tokens`: context tokens
    not yet computed, of all admitted requests together, above which `submit` raises Overloaded; one request is always
    taken. `max_prefill_chunk`: tokens of one sequence in one step, at most; None leaves it to the budget.
    `watermark`: share of the blocks that admission leaves free for running sequences to grow into.
    """

    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_waiting_tokens: int = 262_144
    max_prefill_chunk: int | None = None
    enable_prefix_cache: bool = True
    watermark: float = 0.01

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_waiting_tokens", "max_prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}", param=name)
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigError(f"watermark must be in [0, 1), not {self.watermark}", param="watermark")
