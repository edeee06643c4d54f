"""Case: one quantity that every contestant is asked for, in tokens a second."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["prefill", "decode"]
Precision = Literal["fp32", "bf16", "int8"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
DECODE_STEPS = 24
QUICK_DECODE_STEPS = 12


@dataclass(frozen=True, slots=True)
class Case:
    """Prefill of one prompt of `context` random tokens, or steady decode of `streams` sequences that each have `context`
    tokens behind them, over `steps` steps. Prompt tokens a second, or output tokens a second of all streams together."""

    kind: Kind
    context: int
    streams: int = 1
    steps: int = 0

    @property
    def name(self) -> str:
        return f"prefill {self.context}" if self.kind == "prefill" else f"decode {self.streams} x {self.context}"

    @property
    def tokens_held(self) -> int:
        """What the KV cache holds at the end."""
        return self.streams * (self.context + self.steps + 1)


def all_cases() -> tuple[Case, ...]:
    prefills = tuple(Case("prefill", tokens) for tokens in (128, 512, 2048))
    return prefills + tuple(
        Case("decode", context, streams, DECODE_STEPS) for context in (512, 2048) for streams in (1, 8, 32)
    )


def quick_cases() -> tuple[Case, ...]:
    return (
        Case("prefill", 128),
        Case("prefill", 512),
        Case("decode", 512, 1, QUICK_DECODE_STEPS),
        Case("decode", 512, 8, QUICK_DECODE_STEPS),
    )
