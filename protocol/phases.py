"""The phase ledger: where the time of one sequence went. Durations only, in seconds; each node fills its own record.

    router | queue | prefill | handoff | decode | transit            sum = latency seen by the router

`transit` is what no node accounts for: wires, event loops, frame batching, and all that an attempt took which was lost
(its node died, and the sequence was dispatched again). It is measured as the remainder at the one
place that sees both ends of the request, so the phases add up by construction and a large remainder is visible.
"""

import msgspec


class PrefillPhases(msgspec.Struct, frozen=True):
    """Of the node that computed the prompt: waited in its queue; from first scheduled to first token sampled."""

    queue_s: float
    prefill_s: float


class DecodePhases(msgspec.Struct, frozen=True):
    """Of the node that decoded.

    `handoff_s`: from the end of the last prefill chunk to the start of the step that computes the second token, less
    the one-way trip of the message between the two nodes; 0 where this node computed the prompt itself.
    `decode_s`: from the start of that step to the last token.
    """

    handoff_s: float
    decode_s: float


class PhaseLedger(msgspec.Struct, frozen=True):
    """One sequence, as reported to the client and to metrics. All in seconds."""

    router_s: float
    queue_s: float
    prefill_s: float
    handoff_s: float
    decode_s: float
    transit_s: float
    total_s: float
