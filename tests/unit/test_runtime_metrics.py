"""Every metric is declared with a name that says what it counts, and a registry is a process's own."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from protocol.phases import HandoffPhases, PhaseLedger
from runtime.metric_feeds import CountHistogram, Total
from runtime.metrics import (
    EngineMetrics,
    NodeMetrics,
    RouterMetrics,
    StoreMetrics,
    TransferMetrics,
    new_registry,
    observe_phases,
    render,
)

MANUAL = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
GROUPS = (EngineMetrics, TransferMetrics, NodeMetrics, StoreMetrics)


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Series by name and labels."""
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(render(registry).decode())
        for sample in family.samples
    }


@pytest.mark.parametrize("groups", [GROUPS, (RouterMetrics,)])
def test_names_are_ours_and_documented(groups: tuple[type, ...]) -> None:
    registry = CollectorRegistry()
    for group in groups:
        group(registry)
    families = list(text_string_to_metric_families(render(registry).decode()))
    assert families
    for family in families:
        assert family.name.startswith("headrace_")
        assert family.documentation


def test_the_manual_names_metrics_that_exist() -> None:
    node, router = CollectorRegistry(), CollectorRegistry()
    for group in GROUPS:
        group(node)
    RouterMetrics(router)
    declared = {
        family.name
        for registry in (node, router)
        for family in text_string_to_metric_families(render(registry).decode())
    }
    named = set(re.findall(r"`(headrace_[a-z_]+)`", MANUAL.read_text(encoding="utf-8")))
    assert len(named) > 50
    assert {name for name in named if not {name, name.removesuffix("_total")} & declared} == set()
    known = named | {name.removesuffix("_total") for name in named}
    store = {name for name in declared if name.startswith(("headrace_store", "headrace_index"))}
    assert {name for name in store if not name.endswith("_created")} - known == set(), "all of it is explained"


def test_two_processes_in_one_do_not_share_metrics() -> None:
    first, second = new_registry(), new_registry()
    EngineMetrics(first).running.set(3)
    EngineMetrics(second)
    assert samples(first)["headrace_requests_running"] == 3
    assert samples(second)["headrace_requests_running"] == 0


def test_the_process_itself_is_measured() -> None:
    assert samples(new_registry())["process_open_fds"] > 0


def test_a_counter_follows_a_running_total() -> None:
    registry = CollectorRegistry()
    steps = Total(EngineMetrics(registry).steps)
    for total in (0, 5, 5, 9, 2):
        steps.set(total)
    assert samples(registry)["headrace_engine_steps_total"] == 9


def test_a_histogram_follows_running_counts() -> None:
    registry = CollectorRegistry()
    histogram = CountHistogram("headrace_test_length", "Lengths", registry)
    assert samples(registry)["headrace_test_length_bucket le=+Inf"] == 0
    histogram.set((5, 0, 2))
    histogram.set((6, 0, 3))
    assert samples(registry) == {
        "headrace_test_length_bucket le=0.0": 6,
        "headrace_test_length_bucket le=1.0": 6,
        "headrace_test_length_bucket le=2.0": 9,
        "headrace_test_length_bucket le=+Inf": 9,
        "headrace_test_length_count": 9,
        "headrace_test_length_sum": 6,
    }


def test_a_ledger_is_observed_phase_by_phase() -> None:
    registry = CollectorRegistry()
    ledger = PhaseLedger(
        router_s=1, queue_s=2, prefill_s=3, handoff=HandoffPhases(1, 1, 1, 1), decode_s=5, transit_s=6, total_s=21
    )
    observe_phases(RouterMetrics(registry).phases, ledger)
    seen = samples(registry)
    expected = {"router": 1, "queue": 2, "prefill": 3, "handoff": 4, "decode": 5, "transit": 6}
    assert {phase: seen[f"headrace_phase_seconds_sum phase={phase}"] for phase in expected} == expected


def test_series_of_peers_come_and_go() -> None:
    registry = CollectorRegistry()
    moved = TransferMetrics(registry).moved
    names = ("bytes", "blocks", "descriptors", "transfers", "failures", "seconds", "quarantined")

    def told(value: float) -> dict[str, float]:
        return dict.fromkeys(names, value)

    first, second = ("device", "prefill-0", "nixl", "pull"), ("device", "prefill-1", "shm", "pull")
    moved.set({first: told(5), second: told(7)})
    moved.set({first: told(6), second: told(3)})
    found = samples(registry)
    assert found["headrace_kv_transfer_bytes_total direction=pull memory=device peer=prefill-0 transport=nixl"] == 6
    assert found["headrace_kv_transfer_bytes_total direction=pull memory=device peer=prefill-1 transport=shm"] == 7
    assert found["headrace_kv_transfers_quarantined direction=pull memory=device peer=prefill-1 transport=shm"] == 3
    moved.set({first: told(6)})
    assert not any("prefill-1" in series for series in samples(registry))
    moved.set({first: told(8), second: told(2)})
    found = samples(registry)
    assert found["headrace_kv_transfer_bytes_total direction=pull memory=device peer=prefill-0 transport=nixl"] == 8
    assert found["headrace_kv_transfer_bytes_total direction=pull memory=device peer=prefill-1 transport=shm"] == 2


def test_the_exchanges_of_two_memories_keep_their_own_series() -> None:
    registry = CollectorRegistry()
    failures = TransferMetrics(registry).checksum_failures
    failures.set({("device", "d0"): {"failures": 2}}, ("device",))
    failures.set({("host", "d0"): {"failures": 5}}, ("host",))
    failures.set({}, ("device",))
    found = {name: value for name, value in samples(registry).items() if "failures_total" in name}
    assert found == {"headrace_checksum_failures_total memory=host peer=d0": 5}
