"""When a sequence ends, and with what reason. Pure."""

from dataclasses import dataclass

from engine.sequence import Sequence
from protocol.tokens import FinishReason


@dataclass(frozen=True, slots=True)
class Ending:
    reason: FinishReason
    stop_token_id: int | None = None


def ending(sequence: Sequence, max_tokens_in_sequence: int) -> Ending | None:
    """Whether the last token ends the sequence. A stop token wins over a length that is reached with it."""
    sampling = sequence.request.sampling
    num_output = len(sequence.output_token_ids)
    last = sequence.output_token_ids[-1]
    if last in sampling.stop_token_ids and num_output > sampling.min_tokens:
        return Ending("stop", last)
    if num_output >= sampling.max_tokens or len(sequence.token_ids) >= max_tokens_in_sequence:
        return Ending("length")
    return None
