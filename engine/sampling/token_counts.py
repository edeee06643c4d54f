"""TokenCounts: which tokens one sequence has seen, and how often it has emitted each. Grows with the sequence.

Sparse, because a vocabulary is a hundred times larger than the set of tokens that one sequence uses.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class TokenCounts:
    """Made from a prompt; `observe` adds what was emitted since."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        prompt = np.fromiter(prompt_token_ids, np.int64, len(prompt_token_ids))
        self._token_ids = np.unique(prompt)
        self._counts = np.zeros(len(self._token_ids), np.float32)
        self._index = {int(token_id): index for index, token_id in enumerate(self._token_ids)}
        self._num_observed = 0

    @property
    def num_observed(self) -> int:
        """Output tokens counted so far."""
        return self._num_observed

    def observe(self, output_token_ids: Sequence[int]) -> None:
        """Count the output tokens that are new; `output_token_ids` is all of them, in order."""
        for position in range(self._num_observed, len(output_token_ids)):
            token_id = output_token_ids[position]
            index = self._index.setdefault(token_id, len(self._index))
            if index == len(self._token_ids):
                self._grow()
            self._token_ids[index] = token_id
            self._counts[index] += 1
        self._num_observed = len(output_token_ids)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """[n], distinct: every token of the prompt and the output."""
        return self._token_ids[: len(self._index)]

    @property
    def output_counts(self) -> npt.NDArray[np.float32]:
        """[n]: how often the output holds each of `token_ids`; 0 for those of the prompt alone."""
        return self._counts[: len(self._index)]

    def _grow(self) -> None:
        room = max(64, len(self._token_ids))
        self._token_ids = np.concatenate((self._token_ids, np.zeros(room, np.int64)))
        self._counts = np.concatenate((self._counts, np.zeros(room, np.float32)))
