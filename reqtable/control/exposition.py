"""The metrics as the text that Prometheus reads. Needs the package prometheus-client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from reqtable.control.figures import BUCKETS_S, METRICS, Figures, Metric, Value
from reqtable.table.errors import ConfigurationError

PART = 8  # values that are written at once; a histogram has fourteen lines
_HEADER_LINES = 2  # HELP and TYPE
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def check_client() -> None:
    """Raise ConfigurationError if the package prometheus-client is not installed."""
    try:
        import prometheus_client  # noqa: F401  # an extra: most programs need no metrics
    except ImportError:
        raise ConfigurationError(
            "metrics need the package prometheus-client: pip install 'reqtable[metrics]'"
        ) from None


def texts_of(figures: Figures) -> Iterator[bytes]:
    """Yield the text of each metric that has a value, in parts that take no long time to make."""
    from prometheus_client import generate_latest

    for name, metric in METRICS.items():
        values = sorted(figures.get(name, {}).items())
        for first in range(0, len(values), PART):
            text = generate_latest(_Collected(_family(metric, values[first : first + PART])))
            yield text.split(b"\n", _HEADER_LINES)[-1] if first else text


class _Collected:
    """Gives one family to what writes the text, as a registry does."""

    def __init__(self, family: Any) -> None:
        self._family = family

    def collect(self) -> Iterable[Any]:
        return (self._family,)


def _family(metric: Metric, values: list[tuple[tuple[str, ...], Value]]) -> Any:
    """Return a metric with some of its values as prometheus-client has it."""
    from prometheus_client import core

    kinds: dict[str, Any] = {
        "gauge": core.GaugeMetricFamily,
        "counter": core.CounterMetricFamily,
        "summary": core.SummaryMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    family = kinds[metric.kind](metric.name, metric.text, labels=metric.labels)
    for labels, value in values:
        if not isinstance(value, list):
            family.add_metric(labels, value)
        elif metric.kind == "summary":
            family.add_metric(labels, *value)
        else:
            *counts, whole = value
            family.add_metric(labels, _buckets(counts), whole)
    return family


def _buckets(counts: list[float]) -> list[tuple[str, float]]:
    """Return the buckets of a histogram: each counts the observations in it and in all shorter ones."""
    bounds = [*map(str, BUCKETS_S), "+Inf"]
    return [(bound, sum(counts[: place + 1])) for place, bound in enumerate(bounds)]
