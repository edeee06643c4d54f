"""Every metric of every role, declared once: name, unit, labels and buckets live here and nowhere else.

One registry per process; each group of metrics belongs to the part of the process that it describes. Durations are in
seconds and sizes in bytes, and the name says so. Histogram buckets start where good systems are: at a millisecond.

| group | of | filled |
| --- | --- | --- |
| NodeMetrics | a node: requests as they end, their phases | as things happen |
| EngineMetrics | the step loop and the KV cache | from the engine's totals, before each scrape |
| TransferMetrics | hand-offs, leases, damaged blocks | from its own totals, before each scrape |
| StoreMetrics | the KV store and its index | totals before each scrape, distributions as things happen |
| RouterMetrics | what clients see | as things happen |
"""

from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from protocol.phases import HandoffPhases, PhaseLedger
from runtime.metric_feeds import CountHistogram, LabelledSeries

PEER_LABELS = ("memory", "peer", "transport", "direction")

_Metric = TypeVar("_Metric", Counter, Gauge)

KVMemory = Literal["device", "host"]
"""Whose blocks move: the engine's own KV cache, wherever that lies, or a host tier."""

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
_STORE_BUCKETS_S = (
    *(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
    *(1800.0, 3600.0, 10_800.0, 43_200.0, 86_400.0, 604_800.0),
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
        self.imported_prompt_tokens = Counter(
            "headrace_prompt_tokens_borrowed_total",
            "Prompt tokens whose KV was not computed here but brought",
            registry=registry,
        )
        self.loaded_prompt_tokens = Counter(
            "headrace_prompt_tokens_loaded_total",
            "Of the borrowed prompt tokens, those that this node's own store brought back",
            registry=registry,
        )
        self.offered_blocks = Gauge(
            "headrace_kv_blocks_offered", "KV blocks being saved in the store", registry=registry
        )
        self.lost_blocks = Counter(
            "headrace_kv_blocks_lost_total",
            "KV blocks that were forgotten before they could be saved",
            registry=registry,
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
    """Hand-offs and leases, from either end, each series by the `memory` (KVMemory) that the exchange is over.

    What moved is told by `peer` (a worker's name), `transport` (nixl, ucx, shm, tcp or inproc) and `direction` ("pull": this
    node read the peer's blocks, "push": it wrote them into the peer's memory), by the side that moves the bytes. Series of
    peers that are gone are removed: see LabelledSeries.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, documentation: str) -> Counter:
            return Counter(name, documentation, ["memory"], registry=registry)

        def gauge(name: str, documentation: str) -> Gauge:
            return Gauge(name, documentation, ["memory"], registry=registry)

        def per_peer(kind: type[_Metric], name: str, documentation: str) -> _Metric:
            return kind(name, documentation, PEER_LABELS, registry=registry)

        self.moved = LabelledSeries(
            {
                "bytes": per_peer(Counter, "headrace_kv_transfer_bytes_total", "KV bytes moved"),
                "blocks": per_peer(Counter, "headrace_kv_transfer_blocks_total", "KV blocks moved"),
                "descriptors": per_peer(
                    Counter,
                    "headrace_kv_transfer_descriptors_total",
                    "Pieces of memory that transfers were made of, neighbours merged",
                ),
                "transfers": per_peer(Counter, "headrace_kv_transfers_total", "Reads and writes that ended well"),
                "failures": per_peer(Counter, "headrace_kv_transfers_failed_total", "Reads and writes that failed"),
                "seconds": per_peer(Counter, "headrace_kv_transfer_seconds_total", "Time spent in reads and writes"),
                "quarantined": per_peer(
                    Gauge,
                    "headrace_kv_transfers_quarantined",
                    "Reads and writes that were given up, whose bytes may still land",
                ),
            }
        )
        self.links = LabelledSeries(
            {
                "latency": per_peer(
                    Gauge,
                    "headrace_kv_link_latency_seconds",
                    "Of the way that KV takes from a peer: what a transfer costs for itself, when it was chosen",
                ),
                "bandwidth": per_peer(
                    Gauge,
                    "headrace_kv_link_bytes_per_second",
                    "Of the way that KV takes from a peer, when it was chosen",
                ),
            }
        )
        self.checksum_failures = LabelledSeries(
            {
                "failures": Counter(
                    "headrace_checksum_failures_total",
                    "Hand-offs of which a KV block arrived damaged",
                    ["memory", "peer"],
                    registry=registry,
                )
            }
        )
        self.retries = counter("headrace_kv_transfer_retries_total", "Reads that were done again over a new link")
        self.queued_blocks = gauge(
            "headrace_kv_queue_blocks", "KV blocks that are ready and wait for their turn on a link"
        )
        self.blocks_in_flight = gauge("headrace_kv_blocks_in_flight", "KV blocks being moved")
        self.queue_seconds = counter(
            "headrace_kv_queue_seconds_total",
            "Time that hand-offs had blocks to move and none moving, summed over hand-offs",
        )
        self.imports_unsettled = gauge(
            "headrace_kv_imports_quarantined", "Ended imports whose blocks are kept back because bytes may still land"
        )
        self.leases_open = gauge("headrace_leases_open", "Exports that a reader may still read")
        self.leases_unsettled = gauge(
            "headrace_leases_unsettled", "Exports that have ended and whose blocks are still being read for a push"
        )
        self.leases_expired = counter("headrace_leases_expired_total", "Exports that no reader showed interest in")
        self.leases_released = counter("headrace_leases_released_total", "Exports that their reader released")
        self.leases_failed = counter("headrace_leases_failed_total", "Exports whose prefill failed or was cancelled")


class StoreMetrics:
    """What a node keeps beside its device, in blocks. `tier` is host or disk; `move` is save (device to host), load (host to
    device), demote (host to disk), promote (disk to host) or receive (another node's to host); `tenant` stands for a
    cache salt and tells nothing of it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"headrace_store_{name}_total", documentation, labels, registry=registry)

        def gauge(name: str, documentation: str, *labels: str) -> Gauge:
            return Gauge(f"headrace_store_{name}", documentation, labels, registry=registry)

        def histogram(name: str, documentation: str) -> Histogram:
            name = f"headrace_store_{name}_seconds"
            return Histogram(name, documentation, ["tier"], registry=registry, buckets=_STORE_BUCKETS_S)

        self.tiers = LabelledSeries(
            {
                "capacity": gauge("capacity_blocks", "Room of a tier", "tier"),
                "used": gauge("used_blocks", "Blocks in a tier", "tier"),
                "pinned": gauge("pinned_blocks", "Blocks that an operator keeps", "tier"),
                "held": gauge("held_blocks", "Blocks that are being read", "tier"),
                "found": counter("found_blocks", "Leading blocks that requests were told of", "tier"),
                "stored": counter("stored_blocks", "Blocks taken in", "tier"),
                "damaged": counter("checksum_failures", "Blocks whose bytes had changed; dropped", "tier"),
            }
        )
        self.evicted = counter("evicted_blocks", "Blocks given up: used, unused, or with a file", "tier", "reason")
        self.tenants = LabelledSeries(
            {
                "used": gauge("tenant_blocks", "Blocks of the largest tenants", "tenant", "tier"),
                "quota": gauge("tenant_quota_blocks", "Blocks that they may have", "tenant", "tier"),
            }
        )
        self.requests = counter("requests", "Requests that asked, by whether any block was there: hit, miss", "outcome")
        self.missed_blocks = counter("missed_blocks", "Blocks that requests wanted and no tier had")
        self.refused = counter(
            "refused_blocks", "Blocks not taken in: admission, quota, room, or the disk's backlog", "reason"
        )
        self.second_touch = gauge("second_touch", "Whether only what is wanted twice is kept: 1 or 0")
        self.quarantined = gauge("quarantined_blocks", "Slots kept back because bytes may still land")
        self.moved_blocks = counter("moved_blocks", "Blocks moved", "move")
        self.moved_bytes = counter("moved_bytes", "Bytes moved", "move")
        self.move_failures = counter("move_failures", "Batches that were not moved", "move")
        self.move_seconds = Histogram(
            "headrace_store_move_seconds",
            "One batch, checksums included",
            ["move"],
            registry=registry,
            buckets=_HANDOFF_BUCKETS_S,
        )
        self.reuse_gap = histogram("reuse_gap", "Since a block that is read was stored or last read")
        self.lifetime = histogram("block_lifetime", "From a block's storing to its eviction")
        self.idle = histogram("idle_before_eviction", "From a block's last use to its eviction")
        self.put_blocks = counter("put_blocks", "Blocks for store nodes: kept there, refused, dropped", "outcome")
        self.put_waiting = gauge("put_waiting_blocks", "Blocks on their way to a store node")
        self.disk_paused = gauge("disk_paused_seconds", "For how long the disk tier writes nothing, having failed")
        self.disk_failures = counter("disk_failures", "Reads and writes of the disk that failed", "operation", "cause")
        self.index_lookups = Counter(
            "headrace_index_lookups_total",
            "Questions to the index: hit, miss, timeout, error, or skipped while it was given up",
            ["outcome"],
            registry=registry,
        )
        self.index_late = Counter(
            "headrace_index_late_total",
            "Timeouts of lookups by who was late: the index server, or this process's own event loop",
            ["cause"],
            registry=registry,
        )
        self.index_writes = Counter(
            "headrace_index_writes_total",
            "Entries told to the index: published, withdrawn, crowded out, or fenced off",
            ["outcome"],
            registry=registry,
        )
        self.index_incidents = Counter(
            "headrace_index_incidents_total",
            "What it took to keep the index true: drift mended, resyncs, overflows, outages, garbage, dead owners' places swept",
            ["kind"],
            registry=registry,
        )
        self.index_up = Gauge(
            "headrace_index_up", "1 while the index is asked, 0 while it is given up", registry=registry
        )
        self.index_lag = Gauge("headrace_index_lag_seconds", "Age of the oldest change to tell it", registry=registry)
        self.index_queue = Gauge("headrace_index_queued_blocks", "Blocks whose changes wait", registry=registry)
        self.index_entries = Gauge("headrace_index_entries", "Entries of this node's in the index", registry=registry)


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
