"""The phase ledger: where the time of one sequence went. Durations only, in seconds; each node fills its own record.

    router | queue | prefill | handoff | decode | transit            sum = latency seen by the router

`transit` is what no node accounts for: wires, event loops, frame batching, and all that an attempt took which was lost
(its node died, and the sequence was dispatched again). It is measured as the remainder at the one
place that sees both ends of the request, so the phases add up by construction and a large remainder is visible. Of the
hand-off there is more to tell: HandoffPhases.
"""

import msgspec


class PrefillPhases(msgspec.Struct, frozen=True):
    """Of the node that computed the prompt: waited in its queue; from first scheduled to first token sampled."""

    queue_s: float
    prefill_s: float


class HandoffPhases(msgspec.Struct, frozen=True):
    """What a hand-off exposed: from the end of the last prefill chunk to the start of the step that computes the second
    token, less the one-way trip of the message between the two nodes. Blocks that moved while the prompt still computed cost
    nothing and are not in here.

    At every instant a hand-off does one of these, the first that applies, so that they add up:

    `wire_s`: bytes move. `verify_s`: checksums are compared, or blocks brought to the device. `queue_s`: until everything is
    proven, neither: checksums are taken, messages travel, blocks wait for their turn on the link. `join_s`: everything is
    proven, and the engine's next step has not begun: mostly the rest of the step under way.
    """

    queue_s: float = 0.0
    wire_s: float = 0.0
    verify_s: float = 0.0
    join_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.queue_s + self.wire_s + self.verify_s + self.join_s


class DecodePhases(msgspec.Struct, frozen=True):
    """Of the node that decoded. `handoff` is nothing where this node computed the prompt itself. `decode_s`: from the start
    of the step that computes the second token to the last token."""

    handoff: HandoffPhases
    decode_s: float

    @property
    def handoff_s(self) -> float:
        return self.handoff.total_s


class PhaseLedger(msgspec.Struct, frozen=True):
    """One sequence, as reported to the client and to metrics. All in seconds."""

    router_s: float
    queue_s: float
    prefill_s: float
    handoff: HandoffPhases
    decode_s: float
    transit_s: float
    total_s: float

    @property
    def handoff_s(self) -> float:
        return self.handoff.total_s
