"""A sequence's instants, turned into the phases of protocol.phases. Pure."""

from engine.sequence import Sequence
from protocol.phases import DecodePhases, HandoffPhases, PrefillPhases


def prefill_phases(sequence: Sequence) -> PrefillPhases:
    """Of a sequence whose context was computed here and whose first token is sampled."""
    times = sequence.times
    assert times.first_scheduled_at is not None, "it was computed without having been scheduled"
    assert times.computed_at is not None, "its first token came before its context"
    return PrefillPhases(
        queue_s=times.first_scheduled_at - times.submitted_at, prefill_s=times.computed_at - times.first_scheduled_at
    )


def decode_phases(sequence: Sequence, ended_at: float, *, imported: bool) -> DecodePhases:
    """`ended_at` is when its last token came. An import that ends with its first token was all hand-off."""
    times = sequence.times
    assert times.computed_at is not None, "a token came before its context"
    started_at = ended_at if times.decode_started_at is None else times.decode_started_at
    decode_s = ended_at - started_at
    if not imported:
        return DecodePhases(HandoffPhases(), decode_s)
    landing = times.landing
    # The instant is an estimate when another node computed the context, and may lie after the start.
    join_s = max(0.0, started_at - times.computed_at - landing.total_s)
    return DecodePhases(HandoffPhases(landing.queue_s, landing.wire_s, landing.verify_s, join_s), decode_s)
