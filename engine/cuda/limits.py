"""BatchLimits: what one step holds at most. The sizes of everything that persists follow from it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`max_num_seqs`: sequences that draw tokens. `max_drafts`: guesses of one sequence."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_drafts: int = 0

    @property
    def max_rows(self) -> int:
        """Sequences in one step: each has a token in it at least."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)
