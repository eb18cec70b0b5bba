"""The metrics: their names, labels and meanings, and how the figures of several workers are added up.

Figures are plain data: for each metric, its values by the values of its labels. The value of a histogram is a list: how
many observations were within each bucket, how many were longer, and the sum of all. That of a summary is a list of the
number of observations and their sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Value = float | list[float]
Figures = dict[str, dict[tuple[str, ...], Value]]

BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """Describes a metric. With `takes_largest`, it shows the largest value of the workers, else their sum."""

    name: str
    kind: str  # "gauge", "counter", "summary" or "histogram"
    text: str
    labels: tuple[str, ...] = ()
    takes_largest: bool = False

    @property
    def only_grows(self) -> bool:
        """Whether the value never becomes smaller, not even when a worker ends."""
        return self.kind != "gauge"


METRICS: dict[str, Metric] = {
    each.name: each
    for each in (
        Metric(
            "reqtable_requests",
            "gauge",
            "Unfinished requests, by what they wait for.",
            ("state", "handler", "server", "worker"),
        ),
        Metric("reqtable_connections", "gauge", "Outgoing connections that requests have opened."),
        Metric("reqtable_requests_accepted_total", "counter", "Requests that got a place in the table."),
        Metric(
            "reqtable_requests_finished_total",
            "counter",
            "Requests that have ended, by how they ended.",
            ("ending", "policy"),
        ),
        Metric(
            "reqtable_requests_refused_total",
            "counter",
            "Requests that were refused or evicted, by the limit that was reached.",
            ("reason",),
        ),
        Metric("reqtable_received_bytes_total", "counter", "Bytes received from clients."),
        Metric("reqtable_sent_bytes_total", "counter", "Bytes sent to clients."),
        Metric("reqtable_buffered_bytes", "gauge", "Bytes that the buffers of all requests hold."),
        Metric(
            "reqtable_request_duration_seconds",
            "histogram",
            "How long requests lasted, from their arrival to their end.",
            ("handler",),
        ),
        Metric(
            "reqtable_state_duration_seconds",
            "histogram",
            "How long requests stayed in each state of their handler.",
            ("handler", "state"),
        ),
        Metric(
            "reqtable_http_responses_total",
            "counter",
            "Answers of HTTP handlers, by their status and the method of their request.",
            ("code", "method"),
        ),
        Metric(
            "reqtable_http_request_duration_seconds",
            "histogram",
            "How long HTTP requests lasted, from their head to the end of their answer.",
            ("handler",),
        ),
        Metric("reqtable_loop_lag_seconds", "summary", "How late deadlines and timers fired."),
        Metric("reqtable_loop_lag_max_seconds", "gauge", "How late a deadline or a timer has fired at most.", (), True),
        Metric("reqtable_loop_busy_seconds_total", "counter", "Seconds that passes of the loop took, without waiting."),
        Metric("reqtable_loop_passes_total", "counter", "Passes of the loop."),
        Metric("reqtable_pool_threads", "gauge", "Threads of policy pool, busy or idle.", ("state",)),
        Metric("reqtable_pool_queue", "gauge", "Steps and requests that wait for a thread of policy pool."),
        Metric(
            "reqtable_calls",
            "gauge",
            "Calls by their executor: they run, run though they were given up, or are queued.",
            ("executor", "state"),
        ),
        Metric(
            "reqtable_listen_queue",
            "gauge",
            "Connections in the kernel's queue, which the server has not accepted yet.",
            ("server",),
            True,
        ),
        Metric(
            "reqtable_listen_queue_limit",
            "gauge",
            "How many connections the kernel's queue can hold.",
            ("server",),
            True,
        ),
        Metric(
            "reqtable_config_reloads_total",
            "counter",
            "Times that the configuration was read again, by whether it was applied or refused.",
            ("result",),
        ),
        Metric(
            "reqtable_restarts_total",
            "counter",
            "Times that the program was restarted with its requests, by whether that was done or has failed.",
            ("result",),
        ),
        Metric(
            "reqtable_requests_taken_total",
            "counter",
            "Requests that were taken over from the process before, or from a worker that has crashed.",
        ),
        Metric(
            "reqtable_restart_freeze_max_seconds",
            "gauge",
            "How long a request was frozen at most when it was taken over.",
            (),
            True,
        ),
        Metric("reqtable_workers", "gauge", "Workers by what they do.", ("state",)),
        Metric(
            "reqtable_worker_restarts_total",
            "counter",
            "Workers that another one had to replace, by the reason.",
            ("reason",),
        ),
    )
}


def joined_figures(parts: Iterable[Figures]) -> Figures:
    """Return the figures of several workers as one: added up, or the largest where the metric says so."""
    whole: Figures = {}
    for part in parts:
        for name, values in part.items():
            known = whole.setdefault(name, {})
            for labels, value in values.items():
                known[labels] = _joined(known.get(labels), value, METRICS[name].takes_largest)
    return whole


def growing(figures: Figures) -> Figures:
    """Return the figures that never become smaller: they stay when a worker ends."""
    return {name: values for name, values in figures.items() if METRICS[name].only_grows}


def _joined(one: Value | None, other: Value, takes_largest: bool) -> Value:
    if one is None:
        return other
    if isinstance(one, list) and isinstance(other, list):
        return [sum(pair) for pair in zip(one, other, strict=True)]
    assert not isinstance(one, list)
    assert not isinstance(other, list)
    return max(one, other) if takes_largest else one + other
