"""PrefillRate: how fast this engine computes prompts, measured on its own steps.

A decaying average over steps that computed any part of a prompt, each with its whole duration: what decodes in the same
step cost is part of what a prompt waits for.
"""

DECAY = 0.9
"""By step: the last ten weigh two thirds."""


class PrefillRate:
    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens of contexts, maybe none."""
        if num_tokens:
            self._tokens = self._tokens * DECAY + num_tokens
            self._seconds = self._seconds * DECAY + seconds

    @property
    def tokens_per_s(self) -> float | None:
        """None before the first such step."""
        return self._tokens / self._seconds if self._seconds > 0 else None
