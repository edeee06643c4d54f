"""The choice between transports, by tables: what was measured in, what is taken and said out."""

import pytest

from kv_transfer.meeting.link_choice import Choice, Obstacle, Trial, choose
from protocol.transfer import Direction, ProbeResult, TransportKind

GB = 1e9
REFERENCE_BYTES = 3_000_000
ORDER: tuple[TransportKind, ...] = ("shm", "nixl", "ucx", "tcp")


def trial(kind: TransportKind, gigabytes: float, direction: Direction = "pull", latency_s: float = 50e-6) -> Trial:
    return Trial(kind, direction, ProbeResult(latency_s, gigabytes * GB), device_memory=kind == "nixl")


def unmeasured(kind: TransportKind, direction: Direction = "pull") -> Trial:
    return Trial(kind, direction, None, "the probe hung", kind == "nixl")


def decide(trials: list[Trial], *obstacles: Obstacle, limits: dict[TransportKind, float] | None = None) -> Choice:
    return choose(trials, obstacles, order=ORDER, reference_bytes=REFERENCE_BYTES, limits=limits or {})


@pytest.mark.parametrize(
    ("trials", "taken"),
    [
        ([trial("tcp", 3)], ("tcp", "pull")),
        ([trial("shm", 11), trial("nixl", 6), trial("tcp", 3)], ("shm", "pull")),
        ([trial("shm", 2), trial("nixl", 6)], ("nixl", "pull")),
        ([trial("nixl", 6), trial("nixl", 8, "push")], ("nixl", "pull")),
        ([trial("nixl", 1), trial("nixl", 3, "push")], ("nixl", "push")),
        ([trial("nixl", 3, "push"), trial("nixl", 1)], ("nixl", "push")),
        ([trial("nixl", 1), trial("nixl", 3, "push"), trial("tcp", 4)], ("tcp", "pull")),
        ([trial("nixl", 1), trial("nixl", 5, "push"), trial("tcp", 4)], ("nixl", "push")),
        ([trial("nixl", 6.3), trial("shm", 6)], ("shm", "pull")),
        ([trial("nixl", 8), trial("shm", 6)], ("nixl", "pull")),
        ([trial("shm", 11, latency_s=0.1), trial("tcp", 1)], ("tcp", "pull")),
        ([unmeasured("shm"), trial("tcp", 0.1)], ("tcp", "pull")),
        ([unmeasured("tcp"), unmeasured("nixl"), unmeasured("nixl", "push")], ("nixl", "pull")),
        ([unmeasured("nixl"), trial("nixl", 1, "push")], ("nixl", "push")),
        ([trial("nixl", 1), unmeasured("nixl", "push")], ("nixl", "pull")),
    ],
)
def test_what_is_taken(trials: list[Trial], taken: tuple[TransportKind, Direction]) -> None:
    choice = decide(trials)
    assert (choice.taken.kind, choice.taken.direction) == taken


def test_device_memory_comes_first_on_a_gpu() -> None:
    trials = [trial("shm", 11), trial("nixl", 6), trial("tcp", 3)]
    choice = choose(trials, (), order=ORDER, reference_bytes=REFERENCE_BYTES, limits={}, on_device=True)
    assert choice.taken.kind == "nixl"
    choice = choose(trials[2:], (), order=ORDER, reference_bytes=REFERENCE_BYTES, limits={}, on_device=True)
    assert choice.taken.kind == "tcp"


def test_the_reason_has_the_numbers() -> None:
    choice = decide([trial("shm", 11.2), trial("nixl", 5.9), trial("nixl", 6.4, "push"), unmeasured("tcp")])
    assert choice.why == (
        "shm, pull: 11 GB/s; nixl pull 5.9 GB/s, push 6.4 GB/s; tcp pull not measured (the probe hung)"
    )
    assert choice.warning is None
    given = choose([trial("tcp", 3)], (), order=("tcp",), reference_bytes=1, limits={}, given="transport is set")
    assert given.why == "tcp, pull: 3 GB/s (transport is set)"


SHM_IS_OUT = Obstacle("shm", "another pid namespace; use hostPID")


@pytest.mark.parametrize(
    ("trials", "limits", "warns"),
    [
        ([trial("tcp", 3)], {"shm": 14 * GB}, True),
        ([trial("tcp", 6)], {"shm": 14 * GB}, False),
        ([trial("tcp", 3)], {}, False),
        ([trial("tcp", 3)], {"nixl": 50 * GB}, False),
        ([unmeasured("tcp")], {"shm": 14 * GB}, False),
    ],
)
def test_a_slow_way_out_is_a_warning_with_its_cure(
    trials: list[Trial], limits: dict[TransportKind, float], warns: bool
) -> None:
    choice = decide(trials, SHM_IS_OUT, limits=limits)
    assert (choice.warning is not None) == warns
    if choice.warning is not None:
        assert (
            choice.warning == "tcp moves KV 5 times slower than shm could (14 GB/s): another pid namespace; use hostPID"
        )


def test_a_listed_transport_whose_probe_failed_is_compared_as_well() -> None:
    choice = decide([unmeasured("shm"), trial("tcp", 2)], limits={"shm": 14 * GB})
    assert choice.warning is not None
    assert "the probe hung" in choice.warning
