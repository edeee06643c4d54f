"""The pure parts of `headrace bench transfer`: which blocks move, what the numbers become, what is refused."""

import msgspec
import pytest

from kv_transfer.bench.options import BenchOptions
from kv_transfer.bench.report import Result, compare, format_bytes, format_shape, quantile, summarize
from kv_transfer.bench.shapes import make_shapes
from kv_transfer.transports.plan import coalesce
from protocol.errors import ConfigError
from protocol.transfer import Direction


def result(contestant: str, *turns: tuple[float, ...], setting: str = "", direction: Direction = "pull") -> Result:
    return summarize(
        contestant=contestant,
        setting=setting,
        block_bytes=1000,
        num_blocks=10,
        placement="contiguous",
        direction=direction,
        verified=True,
        turns=turns,
        checked_turns=[tuple(2 * seconds for seconds in turn) for turn in turns] if contestant == "tcp" else [],
        cpu_s=0.5,
    )


def test_shapes_name_every_block_once_within_the_largest_arena() -> None:
    shapes = make_shapes([1, 100, 7])
    assert [(shape.num_blocks, shape.placement) for shape in shapes] == [
        (1, "contiguous"),
        (7, "contiguous"),
        (7, "scattered"),
        (100, "contiguous"),
        (100, "scattered"),
    ]
    for shape in shapes:
        for ids in (shape.source, shape.destination):
            assert len(set(ids)) == len(ids) == shape.num_blocks
            assert set(ids) <= set(range(100))
        pieces = len(coalesce(shape.source, shape.destination))
        assert pieces == 1 if shape.placement == "contiguous" else pieces > shape.num_blocks * 0.8
    assert make_shapes([7]) == make_shapes([7])


def test_numbers_are_of_the_median_and_the_slowest_transfers() -> None:
    measured = result("shm", (1.0, 2.0, 4.0), (2.0, 2.0))
    assert (measured.num_transfers, measured.rate, measured.best_rate) == (5, 5000.0, 10000.0)
    assert (measured.latency_median_s, measured.latency_p99_s) == (2.0, 4.0)
    assert measured.cpu_s_per_gb == pytest.approx(0.5 / (5 * 10_000 / 1e9))
    assert measured.turn_rates == (5000.0, 5000.0)
    assert measured.checked_rate is None
    assert quantile([3.0], 0.99) == 3.0
    assert quantile(list(range(100)), 0.99) == 98
    assert quantile(list(range(100)), 1.0) == 99


def test_ratios_are_between_turns_of_one_round() -> None:
    """The machine was ten times as slow in the second round, for all alike."""
    memcpy = result("memcpy", (1.0,), (10.0,), (1.0,))
    raw = result("raw socket", (2.0,), (20.0,), (2.0,))
    tcp = result("tcp", (4.0,), (40.0,), (4.0,))
    compared = {entry.contestant: entry for entry in compare([memcpy, raw, tcp])}
    assert compared["tcp"].memcpy_ratio == 0.25
    assert (compared["tcp"].reference, compared["tcp"].reference_ratio) == ("raw socket", 0.5)
    assert compared["tcp"].checked_reference_ratio == 0.25
    assert compared["memcpy"].memcpy_ratio == 1.0
    assert compared["memcpy"].reference is None
    assert "0.50 of raw socket, 0.25 with sums" in format_shape(list(compared.values()))


def test_each_is_compared_under_its_own_setting_and_direction() -> None:
    results = [
        result("raw nixl", (1.0,)),
        result("raw nixl", (2.0,), direction="push"),
        result("raw nixl", (8.0,), setting="UCX_TLS=tcp"),
        result("nixl", (4.0,)),
        result("nixl", (4.0,), direction="push"),
        result("nixl", (10.0,), setting="UCX_TLS=tcp"),
    ]
    assert [entry.reference_ratio for entry in compare(results)] == [None, None, None, 0.25, 0.5, 0.8]


def test_wrong_bytes_are_shouted_about() -> None:
    bad = msgspec.structs.replace(result("shm", (1.0,)), verified=False)
    assert "WRONG BYTES" in format_shape([bad])
    assert "WRONG" not in format_shape([result("shm", (1.0,))])


@pytest.mark.parametrize(
    ("size", "text"), [(100, "100 B"), (4096, "4 KiB"), (368640, "360 KiB"), (1 << 20, "1 MiB"), (3 << 30, "3 GiB")]
)
def test_sizes_are_short(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("block_bytes", "num_blocks", "param"),
    [(5000, 1, "--block-bytes"), (0, 1, "--block-bytes"), (4096, 0, "--num-blocks"), (1 << 30, 64, "--num-blocks")],
)
def test_what_cannot_be_measured_is_refused(block_bytes: int, num_blocks: int, param: str) -> None:
    with pytest.raises(ConfigError) as refused:
        BenchOptions(("tcp",), (block_bytes,), (num_blocks,), rounds=1, slice_s=0.1, idle_s=0.1)
    assert refused.value.param == param
