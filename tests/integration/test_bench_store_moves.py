"""The benchmark of a store's moves, at a size that takes no time: it measures what it says, and leaves nothing."""

from pathlib import Path

import pytest

from kv_store.bench.contest import MEMCPY, Move, contest, table
from kv_store.bench.moves import measure_disk, measure_host_copy
from kv_store.host_copier import HostCopier
from protocol.errors import ConfigError


def test_disk_and_host_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    disk = measure_disk(tmp_path, 8192, 6, 6)  # more rounds than the tier holds
    assert [result.name for result in disk] == [MEMCPY, "plain write", "plain read", "slots to disk", "disk to slots"]
    assert not list(tmp_path.iterdir())
    host = measure_host_copy(HostCopier, 1000, 5, 2)
    assert [result.name for result in host] == [MEMCPY, "cache to slots", "slots to cache"]
    assert all(result.best_rate >= result.median_rate > 0 for result in (*disk, *host))
    assert disk[0].memcpy_ratio == 1.0
    assert len(table(disk).splitlines()) == 7
    assert "of plain read" in table(disk).splitlines()[-1]


def test_contestants_take_turns() -> None:
    heard: list[str] = []

    def move(name: str, reference: str | None = None) -> Move:
        return Move(
            name,
            lambda round_number: heard.append(f"{name} {round_number}"),
            lambda round_number: heard.append(f"before {name} {round_number}"),
            reference,
        )

    contest([move(MEMCPY), move("ours", MEMCPY)], 1, 2)
    assert heard == [
        f"{word}{name} {number}" for number in (0, 1) for name in (MEMCPY, "ours") for word in ("before ", "")
    ]


def test_too_small_a_disk_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MiB in"):
        measure_disk(tmp_path, 1 << 40, 1 << 10, 1)
