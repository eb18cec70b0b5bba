"""A monitoring system, for the tests of the metrics: it asks over a Unix socket or TCP, and reads the text."""

from __future__ import annotations

import http.client
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.control import UnixConnection
from tests.support import WAIT_S

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def ask(place: str | tuple[str, int], path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, str]:
    """Return the status and the body of an answer. `place` is the path of a Unix socket, or an address."""
    connection = UnixConnection(place) if isinstance(place, str) else http.client.HTTPConnection(*place, timeout=WAIT_S)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def scraped(place: str | tuple[str, int]) -> tuple[str, Samples]:
    """Return the metrics as text, and their samples by name and labels."""
    status, text = ask(place, "/metrics")
    assert status == 200, text
    return text, samples_in(text)


def samples_in(text: str) -> Samples:
    """Return the samples that Prometheus's own parser finds."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: Any) -> float:
    return samples[name, frozenset(labels.items())]


def whole(samples: Samples, name: str, **labels: Any) -> float:
    """Return the sum of all samples of that name that have these labels."""
    return sum(
        number for (own, found), number in samples.items() if own == name and labels.items() <= dict(found).items()
    )
