"""Ledger: collects where one sequence's time went, from the nodes' own records and the router's clock."""

from protocol.phases import DecodePhases, HandoffPhases, PhaseLedger, PrefillPhases
from runtime.clock import Clock


class Ledger:
    """`arrived_at` is the moment of the client's request on `clock`."""

    def __init__(self, clock: Clock, arrived_at: float) -> None:
        self._clock = clock
        self._arrived_at = arrived_at
        self._dispatched_at: float | None = None
        self._first_token_at: float | None = None
        self._resumed_at: float | None = None
        self._last_token_at = arrived_at
        self._prefill = PrefillPhases(queue_s=0.0, prefill_s=0.0)
        self._decode: DecodePhases | None = None

    @property
    def first_token_s(self) -> float | None:
        """From arrival to the first token."""
        return None if self._first_token_at is None else self._first_token_at - self._arrived_at

    def dispatched(self) -> None:
        """Only the first dispatch ends the router's phase. All that a lost attempt took ends up in transit."""
        self._resumed_at = None
        self._prefill = PrefillPhases(queue_s=0.0, prefill_s=0.0)
        if self._dispatched_at is None:
            self._dispatched_at = self._clock.now()

    def tokens_arrived(self) -> None:
        self._last_token_at = self._clock.now()
        if self._first_token_at is None:
            self._first_token_at = self._last_token_at
        if self._resumed_at is None:
            self._resumed_at = self._last_token_at

    def prefilled(self, phases: PrefillPhases) -> None:
        self._prefill = phases

    def decoded(self, phases: DecodePhases) -> None:
        self._decode = phases

    def close(self) -> PhaseLedger:
        """The phases up to the last token. Transit is the remainder; should the nodes' records exceed the total by
        rounding or clock drift, it is 0 rather than negative.

        A sequence that the router itself ended (stop string) has no record of its decode node: the time between its
        first and last token, of the last attempt, stands in for hand-off and decode.
        """
        total_s = self._last_token_at - self._arrived_at
        router_s = total_s if self._dispatched_at is None else self._dispatched_at - self._arrived_at
        decode = self._decode
        if decode is None:
            resumed_at = self._last_token_at if self._resumed_at is None else self._resumed_at
            decode = DecodePhases(HandoffPhases(), self._last_token_at - resumed_at)
        accounted = router_s + self._prefill.queue_s + self._prefill.prefill_s + decode.handoff_s + decode.decode_s
        return PhaseLedger(
            router_s=router_s,
            queue_s=self._prefill.queue_s,
            prefill_s=self._prefill.prefill_s,
            handoff=decode.handoff,
            decode_s=decode.decode_s,
            transit_s=max(0.0, total_s - accounted),
            total_s=total_s,
        )
