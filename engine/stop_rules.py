"""When a sequence ends, and with what reason. Pure."""

from dataclasses import dataclass

from engine.request import Mode
from engine.sequence import Sequence
from protocol.tokens import FinishReason


@dataclass(frozen=True, slots=True)
class Ending:
    reason: FinishReason
    stop_token_id: int | None = None


def ending(sequence: Sequence, max_tokens_in_sequence: int) -> Ending | None:
    """Whether the last token ends the sequence. A stop token wins over a length that is reached with it."""
    sampling = sequence.request.sampling
    last = sequence.output_token_ids[-1]
    if last in sampling.stop_token_ids and len(sequence.output_token_ids) > sampling.min_tokens:
        return Ending("stop", last)
    if _num_tokens_left(sequence, max_tokens_in_sequence) <= 0:
        return Ending("length")
    return None


def num_draws_left(sequence: Sequence, max_tokens_in_sequence: int) -> int:
    """How many more tokens may be drawn for it here, after those that steps in flight draw."""
    if sequence.request.mode is Mode.PREFILL_ONLY:
        return 1 - sequence.num_sampled - sequence.num_draws_in_flight
    return _num_tokens_left(sequence, max_tokens_in_sequence) - sequence.num_draws_in_flight


def _num_tokens_left(sequence: Sequence, max_tokens_in_sequence: int) -> int:
    by_request = sequence.request.sampling.max_tokens - len(sequence.output_token_ids)
    return min(by_request, max_tokens_in_sequence - len(sequence.token_ids))
