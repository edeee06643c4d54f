"""Every metric of every role, declared once: name, unit, labels and buckets live here and nowhere else.

One registry per process; each group of metrics belongs to the part of the process that it describes. Durations are in
seconds and sizes in bytes, and the name says so. Histogram buckets start where good systems are: at a millisecond.

| group | of | filled |
| --- | --- | --- |
| NodeMetrics | a node: requests as they end, their phases | as things happen |
| EngineMetrics | the step loop and the KV cache | from the engine's totals, before each scrape |
| TransferMetrics | hand-offs, leases, damaged blocks | from its own totals, before each scrape |
| RouterMetrics | what clients see | as things happen |
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from protocol.phases import HandoffPhases, PhaseLedger

_Metric = TypeVar("_Metric", Counter, Gauge)

_TTFT_BUCKETS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0),
)
_ITL_BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
)
_HANDOFF_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
)
_PHASE_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0),
)
_E2E_BUCKETS_S = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0),
    *(7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
_TOKEN_BUCKETS = tuple(float(1 << power) for power in range(0, 18))


def new_registry() -> CollectorRegistry:
    """The process's registry, with CPU time, memory and open files of the process in it (`process_*`)."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def render(registry: CollectorRegistry) -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(registry)


class NodeMetrics:
    """A node's requests as they end (`outcome`: "finished", "cancelled" or an error's code), and what of
    their time only this node knows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "headrace_node_requests_total", "Requests that left this node", ["outcome"], registry=registry
        )
        self.handoff_seconds = Histogram(
            "headrace_handoff_seconds",
            "End of the last prefill chunk to start of the step that computes the second token",
            registry=registry,
            buckets=_HANDOFF_BUCKETS_S,
        )
        self.handoff_phases = Histogram(
            "headrace_handoff_phase_seconds",
            "Where the exposed hand-off went: queue, wire, verify, join",
            ["phase"],
            registry=registry,
            buckets=_HANDOFF_BUCKETS_S,
        )
        self.phases = _phases(registry)

    def observe_handoff(self, handoff: HandoffPhases) -> None:
        """One hand-off that ended well, as a whole and in its parts."""
        self.handoff_seconds.observe(handoff.total_s)
        self.phases.labels("handoff").observe(handoff.total_s)
        self.handoff_phases.labels("queue").observe(handoff.queue_s)
        self.handoff_phases.labels("wire").observe(handoff.wire_s)
        self.handoff_phases.labels("verify").observe(handoff.verify_s)
        self.handoff_phases.labels("join").observe(handoff.join_s)


class EngineMetrics:
    """The step loop and the KV cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.running = Gauge("headrace_requests_running", "Requests in the running batch", registry=registry)
        self.waiting = Gauge("headrace_requests_waiting", "Admitted requests that do not run yet", registry=registry)
        self.waiting_tokens = Gauge(
            "headrace_waiting_tokens", "Prompt tokens of admitted requests still to compute", registry=registry
        )
        self.free_blocks = Gauge(
            "headrace_kv_blocks_free", "KV blocks that no request holds, cached ones included", registry=registry
        )
        self.total_blocks = Gauge("headrace_kv_blocks_total", "KV blocks of the cache", registry=registry)
        self.steps = Counter("headrace_engine_steps_total", "Engine steps", registry=registry)
        self.computed_prompt_tokens = Counter(
            "headrace_prompt_tokens_computed_total", "Prompt tokens computed", registry=registry
        )
        self.cached_prompt_tokens = Counter(
            "headrace_prompt_tokens_cached_total", "Prompt tokens found in a cache", registry=registry
        )
        self.generated_tokens = Counter("headrace_generated_tokens_total", "Tokens sampled", registry=registry)
        self.preemptions = Counter(
            "headrace_preemptions_total", "Sequences put back for want of KV blocks", registry=registry
        )
        self.step_seconds = Counter(
            "headrace_engine_step_seconds_total",
            "Where the engine's thread spent its steps: schedule, prepare, compute, sample, emit",
            ["phase"],
            registry=registry,
        )
        self.draft_tokens = Counter(
            "headrace_spec_draft_tokens_total", "Tokens guessed for a step to check", registry=registry
        )
        self.accepted_tokens = Counter(
            "headrace_spec_accepted_tokens_total", "Guessed tokens that were right", registry=registry
        )
        self.accepted_length = CountHistogram(
            "headrace_spec_accepted_length", "Guessed tokens of a step and sequence that were right", registry
        )


class TransferMetrics:
    """Hand-offs and leases, from either end.

    What moved is told by `peer` (a worker's name), `transport` (nixl, ucx, shm, tcp or inproc) and `direction` ("pull": this
    node read the peer's blocks, "push": it wrote them into the peer's memory), by the side that moves the bytes. Series of
    peers that are gone are removed: see PeerSeries.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.moved = PeerSeries(
            {
                "bytes": _per_peer(Counter, "headrace_kv_transfer_bytes_total", "KV bytes moved", registry),
                "blocks": _per_peer(Counter, "headrace_kv_transfer_blocks_total", "KV blocks moved", registry),
                "descriptors": _per_peer(
                    Counter,
                    "headrace_kv_transfer_descriptors_total",
                    "Pieces of memory that transfers were made of, neighbours merged",
                    registry,
                ),
                "transfers": _per_peer(
                    Counter, "headrace_kv_transfers_total", "Reads and writes that ended well", registry
                ),
                "failures": _per_peer(
                    Counter, "headrace_kv_transfers_failed_total", "Reads and writes that failed", registry
                ),
                "seconds": _per_peer(
                    Counter, "headrace_kv_transfer_seconds_total", "Time spent in reads and writes", registry
                ),
                "quarantined": _per_peer(
                    Gauge,
                    "headrace_kv_transfers_quarantined",
                    "Reads and writes that were given up, whose bytes may still land",
                    registry,
                ),
            }
        )
        self.links = PeerSeries(
            {
                "latency": _per_peer(
                    Gauge,
                    "headrace_kv_link_latency_seconds",
                    "Of the way that KV takes from a peer: what a transfer costs for itself, when it was chosen",
                    registry,
                ),
                "bandwidth": _per_peer(
                    Gauge,
                    "headrace_kv_link_bytes_per_second",
                    "Of the way that KV takes from a peer, when it was chosen",
                    registry,
                ),
            }
        )
        self.checksum_failures = PeerSeries(
            {
                "failures": Counter(
                    "headrace_checksum_failures_total",
                    "Hand-offs of which a KV block arrived damaged",
                    ["peer"],
                    registry=registry,
                )
            }
        )
        self.retries = Counter(
            "headrace_kv_transfer_retries_total", "Reads that were done again over a new link", registry=registry
        )
        self.queued_blocks = Gauge(
            "headrace_kv_queue_blocks", "KV blocks that are ready and wait for their turn on a link", registry=registry
        )
        self.blocks_in_flight = Gauge("headrace_kv_blocks_in_flight", "KV blocks being moved", registry=registry)
        self.queue_seconds = Counter(
            "headrace_kv_queue_seconds_total",
            "Time that hand-offs had blocks to move and none moving, summed over hand-offs",
            registry=registry,
        )
        self.imports_unsettled = Gauge(
            "headrace_kv_imports_quarantined",
            "Ended imports whose blocks are kept back because bytes may still land",
            registry=registry,
        )
        self.leases_open = Gauge("headrace_leases_open", "Exports that a reader may still read", registry=registry)
        self.leases_unsettled = Gauge(
            "headrace_leases_unsettled",
            "Exports that have ended and whose blocks are still being read for a push",
            registry=registry,
        )
        self.leases_expired = Counter(
            "headrace_leases_expired_total", "Exports that no reader showed interest in", registry=registry
        )
        self.leases_released = Counter(
            "headrace_leases_released_total", "Exports that their reader released", registry=registry
        )
        self.leases_failed = Counter(
            "headrace_leases_failed_total", "Exports whose prefill failed or was cancelled", registry=registry
        )


class RouterMetrics:
    """What clients see. `role` is prefill or decode; `decision` is remote (a prefill node computed the prompt) or local
    (the decode node did)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "headrace_router_requests_total", "HTTP requests by outcome", ["endpoint", "status"], registry=registry
        )
        self.in_flight = Gauge("headrace_router_requests_in_flight", "Requests not answered yet", registry=registry)
        self.queued_tokens = Gauge(
            "headrace_router_queued_tokens", "Prompt tokens that wait for their first output token", registry=registry
        )
        self.ttft_seconds = Histogram(
            "headrace_ttft_seconds",
            "Request read to first token sent to the client",
            registry=registry,
            buckets=_TTFT_BUCKETS_S,
        )
        self.itl_seconds = Histogram(
            "headrace_itl_seconds", "Gap between tokens of one stream", registry=registry, buckets=_ITL_BUCKETS_S
        )
        self.e2e_seconds = Histogram(
            "headrace_e2e_seconds", "Request read to last token sent", registry=registry, buckets=_E2E_BUCKETS_S
        )
        self.phases = _phases(registry)
        self.retries = Counter(
            "headrace_router_retries_total", "Sequences dispatched again, by error code", ["code"], registry=registry
        )
        self.prompt_tokens = Counter("headrace_router_prompt_tokens_total", "Tokens of prompts", registry=registry)
        self.completion_tokens = Counter(
            "headrace_router_completion_tokens_total", "Tokens sent to clients", registry=registry
        )
        self.prompt_length_tokens = Histogram(
            "headrace_router_prompt_length_tokens", "Tokens of a prompt", registry=registry, buckets=_TOKEN_BUCKETS
        )
        self.cached_tokens = Counter(
            "headrace_router_cached_tokens_total", "Tokens of prompts that a prefix cache had", registry=registry
        )
        self.expected_cached_tokens = Counter(
            "headrace_router_expected_cached_tokens_total",
            "Tokens of prompts that the router's index said a prefix cache had",
            registry=registry,
        )
        self.workers = Gauge("headrace_router_workers", "Nodes that answer, by role", ["role"], registry=registry)
        self.decisions = Counter(
            "headrace_router_decisions_total", "Where prompts were computed", ["decision"], registry=registry
        )


class Total:
    """Feeds a counter from a running total that someone else keeps; a total that stands still or falls adds nothing."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._reached = 0.0

    def set(self, total: float) -> None:
        if total > self._reached:
            self._counter.inc(total - self._reached)
            self._reached = total


PEER_LABELS = ("peer", "transport", "direction")


class PeerSeries:
    """Metrics that share their labels, a peer among them, fed from totals and values that someone else keeps.

    Who is no longer told of is removed: nodes get new names when they restart on a free port, and a series of each for ever
    would be a leak here and in every scraper.
    """

    def __init__(self, metrics: Mapping[str, Counter | Gauge]) -> None:
        self._metrics = metrics
        self._totals: dict[tuple[str, ...], dict[str, Total]] = {}

    def set(self, told: Mapping[tuple[str, ...], Mapping[str, float]]) -> None:
        """All label values with, for each, all metrics by the names that the constructor got."""
        for labels in self._totals.keys() - told.keys():
            del self._totals[labels]
            for metric in self._metrics.values():
                metric.remove(*labels)
        for labels, values in told.items():
            totals = self._totals.setdefault(labels, {})
            for name, metric in self._metrics.items():
                series = metric.labels(*labels)
                if isinstance(series, Gauge):
                    series.set(values[name])
                else:
                    totals.setdefault(name, Total(series)).set(values[name])


class CountHistogram(Collector):
    """A histogram of small whole numbers from running counts that someone else keeps: `counts[i]` observations of i."""

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._counts: tuple[int, ...] = ()
        registry.register(self)

    def set(self, counts: Sequence[int]) -> None:
        self._counts = tuple(counts)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        buckets = [(f"{number}.0", total) for number, total in enumerate(accumulate(self._counts))]
        buckets.append(("+Inf", sum(self._counts)))
        total = sum(number * count for number, count in enumerate(self._counts))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=total)


def observe_phases(phases: Histogram, ledger: PhaseLedger) -> None:
    """One finished sequence's ledger, phase by phase."""
    phases.labels("router").observe(ledger.router_s)
    phases.labels("queue").observe(ledger.queue_s)
    phases.labels("prefill").observe(ledger.prefill_s)
    phases.labels("handoff").observe(ledger.handoff_s)
    phases.labels("decode").observe(ledger.decode_s)
    phases.labels("transit").observe(ledger.transit_s)


def _phases(registry: CollectorRegistry) -> Histogram:
    return Histogram(
        "headrace_phase_seconds",
        "Where the time of a sequence went: queue, prefill, handoff, decode, router, transit",
        ["phase"],
        registry=registry,
        buckets=_PHASE_BUCKETS_S,
    )


def _per_peer(kind: type[_Metric], name: str, documentation: str, registry: CollectorRegistry) -> _Metric:
    return kind(name, documentation, PEER_LABELS, registry=registry)
