"""The metrics, from `METRICS`."""

from __future__ import annotations

from docs.site.texts import table
from reqtable.control.figures import METRICS


def metrics() -> str:
    """Return the table of the metrics."""
    rows = (
        (
            f'<span id="{each.name}"></span>`{each.name}`',
            each.kind,
            ", ".join(f"`{label}`" for label in each.labels) or "-",
            each.text,
            "the largest value" if each.takes_largest else "the sum",
        )
        for each in METRICS.values()
    )
    return table(("metric", "type", "labels", "meaning", "with workers"), rows)
