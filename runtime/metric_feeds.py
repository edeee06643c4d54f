"""How metrics follow totals that someone else keeps: a counter, series that come and go, a histogram of running counts.

Names and labels are in runtime.metrics; nothing here knows any.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class Total:
    """Feeds a counter from a running total that someone else keeps; a total that stands still or falls adds nothing."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._reached = 0.0

    def set(self, total: float) -> None:
        if total > self._reached:
            self._counter.inc(total - self._reached)
            self._reached = total


class LabelledSeries:
    """Metrics that share their labels, fed from totals and values that someone else keeps.

    What is no longer told of is removed: nodes get new names when they restart on a free port, tenants come and go, and a series
    of each for ever would be a leak here and in every scraper.
    """

    def __init__(self, metrics: Mapping[str, Counter | Gauge]) -> None:
        self._metrics = metrics
        self._totals: dict[tuple[str, ...], dict[str, Total]] = {}

    def set(self, told: Mapping[tuple[str, ...], Mapping[str, float]], of: tuple[str, ...] = ()) -> None:
        """All label values with, for each, all metrics by the names that the constructor got. Of several who tell, each
        tells of all those that begin with `of`."""
        for labels in [each for each in self._totals if each[: len(of)] == of and each not in told]:
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
