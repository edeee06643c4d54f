"""The arithmetic of the engine benchmarks: floors, spreads, ratios, percentiles of stalls, and the rule for the default budget."""

import pytest

from benchmarks.bench_interference import Interference, RoundOutcome, Trial, recommend
from benchmarks.bench_quantization import identical_prefix, windows_of
from benchmarks.engine_bench.case import Case, Precision
from benchmarks.engine_bench.contestant import LLAMA, OURS
from benchmarks.engine_bench.floor import Limits, ModelCost
from benchmarks.engine_bench.manifest import Manifest
from benchmarks.engine_bench.report import EngineReport, Series

COST = ModelCost(layer_weights=1000, head_weights=100, kv_elements=10, attention_width=4)
PREFILL, DECODE = Case("prefill", 10), Case("decode", 20, streams=2, steps=4)


def report(*series: Series, rounds: int) -> EngineReport:
    return EngineReport(
        manifest=Manifest("command", "machine", "date", "commit", 0.0),
        threads=1,
        versions={},
        series=series,
        limits={"bf16": (Limits(2200.0, 1e12),) * rounds},
        model=COST,
        skipped=("absent: why",),
        waiting_share=0.0,
        foreign_share=0.5,
        phases={"bf16": {"schedule": 0.001, "compute": 0.009}},
        phases_case="here",
    )


class TestFloor:
    def test_decode_on_slow_memory_reads_weights_and_cache_once_a_step(self) -> None:
        limits = Limits(bandwidth=100.0, rate=1e12)
        step_s = (1100 * 2 + 2 * (20 + 2) * 10 * 2) / 100.0
        assert COST.floor_tokens_per_s(DECODE, "bf16", limits) == pytest.approx(2 / step_s)

    def test_prefill_on_slow_arithmetic_computes_all_products_and_one_row_of_logits(self) -> None:
        limits = Limits(bandwidth=1e12, rate=100.0)
        flops = 2 * (10 * 1000 + 100) + 2 * (10 * 11 // 2) * 4
        assert COST.floor_tokens_per_s(PREFILL, "fp32", limits) == pytest.approx(10 / (flops / 100.0))

    @pytest.mark.parametrize(("precision", "num_bytes"), [("fp32", 4), ("bf16", 2), ("int8", 1)])
    def test_weights_have_the_precisions_size(self, precision: Precision, num_bytes: int) -> None:
        without_cache = ModelCost(layer_weights=1000, head_weights=100, kv_elements=0, attention_width=0)
        floor = without_cache.floor_tokens_per_s(Case("decode", 1), precision, Limits(1100.0, 1e12))
        assert floor == pytest.approx(1 / num_bytes)


class TestReport:
    def test_ratios_are_taken_within_a_round(self) -> None:
        ours = Series(OURS, "bf16", DECODE, (10.0, 30.0, 20.0))
        peer = Series(LLAMA, "bf16", DECODE, (10.0, 10.0, 5.0))
        figures = report(ours, peer, rounds=3).json()["figures"]
        assert isinstance(figures, list)
        assert figures[0]["ours_over_this"] is None
        assert figures[1]["ours_over_this"] == {"minimum": 1.0, "median": 3.0, "maximum": 4.0}

    def test_text_names_cases_in_order_what_is_absent_overhead_and_disturbance(self) -> None:
        text = report(Series(OURS, "bf16", DECODE, (5.0,)), Series(OURS, "bf16", PREFILL, (5.0,)), rounds=1).text()
        assert 0 < text.index(f"| {PREFILL.name} |") < text.index(f"| {DECODE.name} |")
        assert "not measured: absent: why" in text
        assert "overhead 10.0%" in text
        assert "the machine was busy" in text

    def test_a_precision_that_only_peers_have_stands_without_ratios(self) -> None:
        figures = report(Series(LLAMA, "bf16", DECODE, (1.0,)), rounds=1)
        row = next(line for line in figures.text().splitlines() if line.startswith(f"| {DECODE.name}"))
        assert len(row.split(" | ")) == 3


def interference(budget: int, ttft: float, gaps: tuple[float, ...] = (0.01,) * 10) -> Interference:
    return Interference.of(Trial(1, budget, "auto"), [RoundOutcome([list(gaps)], [ttft], 0.0)], burst_tokens=100)


class TestInterference:
    def test_stalled_time_is_that_in_gaps_above_three_medians(self) -> None:
        result = interference(64, 1.0, (0.01,) * 9 + (0.91,))
        assert result.stalled_share == pytest.approx(0.91)
        assert result.longest_stall == 0.91
        assert result.itl_p50 == 0.01
        assert result.prefill_tokens_per_s == 100.0

    def test_rounds_are_pooled(self) -> None:
        rounds = [RoundOutcome([[0.01]], [1.0], 0.1), RoundOutcome([[0.03]], [3.0], 0.4)]
        result = Interference.of(Trial(1, 64, "auto"), rounds, burst_tokens=100)
        assert (result.num_gaps, result.longest_stall, result.ttft_max, result.foreign_share) == (2, 0.03, 3.0, 0.4)

    def test_the_smallest_budget_near_the_best_ttft_is_recommended(self) -> None:
        assert recommend([interference(64, 1.3), interference(256, 1.1), interference(2048, 1.0)]) == 256

    def test_a_small_budget_that_is_also_the_fastest_wins(self) -> None:
        assert recommend([interference(64, 0.9), interference(256, 1.0)]) == 64


class TestQuality:
    def test_windows_are_whole(self) -> None:
        assert [len(window) for window in windows_of(range(1300))] == [512, 512]

    def test_a_short_text_is_one_window(self) -> None:
        assert [len(window) for window in windows_of(range(100))] == [100]

    @pytest.mark.parametrize(("tokens", "expected"), [([1, 2, 3], 3), ([1, 9, 3], 1), ([9, 2, 3], 0)])
    def test_identical_prefix(self, tokens: list[int], expected: int) -> None:
        assert identical_prefix(tokens, [1, 2, 3]) == expected
