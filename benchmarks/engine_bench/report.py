"""Report: the figures of an engine benchmark as a table of text and as JSON. Ratios are taken within a round, because
what the machine does to one contestant of a round it does to all of them."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.engine_bench.case import PRECISIONS, Case, Precision
from benchmarks.engine_bench.contestant import OURS
from benchmarks.engine_bench.floor import Limits, ModelCost
from benchmarks.engine_bench.manifest import Manifest
from benchmarks.engine_bench.processor_watch import disturbance


@dataclass(frozen=True, slots=True)
class Spread:
    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(min(values), statistics.median(values), max(values))

    def show(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.minimum:.{digits}f}-{self.maximum:.{digits}f})"


@dataclass(frozen=True, slots=True)
class Series:
    """One contestant's tokens a second in one case, round by round."""

    contestant: str
    precision: Precision
    case: Case
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class EngineReport:
    """All contestants of a precision have a series for each case, with an entry for each round. `limits[precision]` are the
    limits as measured in each round; `waiting_share` and `foreign_share` the greatest shares of a core that waiting contestants, and processes that are none of ours, took during a measurement; `phases` the seconds of a
    decode step of each precision."""

    manifest: Manifest
    threads: int
    versions: dict[str, str]
    series: tuple[Series, ...]
    limits: dict[Precision, tuple[Limits, ...]]
    model: ModelCost
    skipped: tuple[str, ...]
    waiting_share: float
    foreign_share: float
    phases: dict[Precision, dict[str, float]]
    phases_case: str

    def text(self) -> str:
        lines = ["# Engine benchmark", "", *self.manifest.lines(), ""]
        lines += [f"{self.threads} threads each; {', '.join(f'{k} {v}' for k, v in sorted(self.versions.items()))}"]
        lines += [f"not measured: {reason}" for reason in self.skipped]
        measured = {series.precision for series in self.series}
        for precision in (precision for precision in PRECISIONS if precision in measured):
            lines += ["", f"## {precision}", "", *self._limit_lines(precision), "", *self._table(precision)]
        lines += ["", f"## A decode step of ours, {self.phases_case}", "", *self._phase_lines(), ""]
        lines += [f"waiting contestants took at most {self.waiting_share:.1%} of a core during a measurement"]
        lines += [disturbance(self.foreign_share)]
        return "\n".join(lines)

    def json(self) -> dict[str, object]:
        """Everything measured, and the ratios."""
        figures = [
            {
                **asdict(series),
                "tokens_per_s": asdict(Spread.of(series.rates)),
                "of_floor": asdict(Spread.of(self._of_floor(series))),
                "ours_over_this": None if (ratio := self._ratio(series)) is None else asdict(ratio),
            }
            for series in self.series
        ]
        return {
            "manifest": asdict(self.manifest),
            "threads": self.threads,
            "versions": self.versions,
            "limits": {name: [asdict(each) for each in rounds] for name, rounds in self.limits.items()},
            "figures": figures,
            "step_phases_s": self.phases,
            "step_phases_case": self.phases_case,
            "skipped": self.skipped,
            "waiting_share": self.waiting_share,
            "foreign_share": self.foreign_share,
        }

    def _limit_lines(self, precision: Precision) -> list[str]:
        bandwidth = Spread.of([limits.bandwidth / 1e9 for limits in self.limits[precision]])
        rate = Spread.of([limits.rate / 1e9 for limits in self.limits[precision]])
        return [f"memory {bandwidth.show(1)} GB/s, matrix products {rate.show(0)} GFLOP/s; median (lowest-highest)"]

    def _table(self, precision: Precision) -> list[str]:
        mine = [series for series in self.series if series.precision == precision]
        names = sorted({series.contestant for series in mine}, key=lambda name: (name != OURS, name))
        peers = [name for name in names if name != OURS]
        header = ["case", "floor tok/s", *(f"{name} tok/s" for name in names)]
        header += ["ours / floor"] * (OURS in names) + [f"ours / {peer}" for peer in peers if OURS in names]
        rows = [header, ["---"] * len(header)]
        for case in sorted({series.case for series in mine}, key=lambda case: (case.steps, case.context, case.streams)):
            found = {series.contestant: series for series in mine if series.case == case}
            floors = [self.model.floor_tokens_per_s(case, precision, each) for each in self.limits[precision]]
            row = [case.name, f"{statistics.median(floors):.0f}"]
            row += [Spread.of(found[name].rates).show(1) for name in names]
            if OURS in names:
                row.append(Spread.of(self._of_floor(found[OURS])).show(2))
                ratios = [self._ratio(found[peer]) for peer in peers]
                row += [ratio.show(2) for ratio in ratios if ratio is not None]
            rows.append(row)
        return [f"| {' | '.join(row)} |" for row in rows]

    def _phase_lines(self) -> list[str]:
        lines = []
        for precision, phases in self.phases.items():
            total = sum(phases.values())
            parts = ", ".join(f"{phase} {seconds * 1e3:.2f}" for phase, seconds in phases.items())
            lines.append(f"- {precision}: {total * 1e3:.1f} ms = {parts}; overhead {1 - phases['compute'] / total:.1%}")
        return lines

    def _of_floor(self, series: Series) -> list[float]:
        return [
            rate / self.model.floor_tokens_per_s(series.case, series.precision, limits)
            for rate, limits in zip(series.rates, self.limits[series.precision], strict=True)
        ]

    def _ratio(self, peer: Series) -> Spread | None:
        """Ours over the peer's, round by round. None for ours itself, or where ours was not measured."""
        wanted = (OURS, peer.precision, peer.case)
        ours = [each for each in self.series if (each.contestant, each.precision, each.case) == wanted]
        if not ours or peer.contestant == OURS:
            return None
        return Spread.of([mine / theirs for mine, theirs in zip(ours[0].rates, peer.rates, strict=True)])
