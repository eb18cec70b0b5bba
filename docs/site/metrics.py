"""The metrics, from `METRICS`."""

from __future__ import annotations

from reqtable.control.figures import METRICS, Metric


def metrics() -> str:
    """Return a part for each metric."""
    return "\n\n".join(
        f"## `{each.name}` {{ #{each.name} }}\n\n{_facts(each)}\n{{ .facts }}\n\n{each.text}"
        for each in METRICS.values()
    )


def _facts(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
    workers = "largest value" if metric.takes_largest else "sum"
    return f"{metric.kind} · labels: {labels} · of several workers: the {workers}"
