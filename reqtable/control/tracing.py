"""OpenTelemetry traces: a span for each request, with an event for each of its transitions.

    from reqtable.control.tracing import trace
    stop = trace(server)

Needs the package opentelemetry-api. Without the call of `trace`, a request costs no instruction more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reqtable.control.watch import watch_of
from reqtable.server.engine import Engine
from reqtable.table.errors import ConfigurationError
from reqtable.table.states import Ending

_FAILED = {each.value for each in (Ending.ERROR, Ending.TIMEOUT, Ending.LIMIT, Ending.UPSTREAM)}
_NS = 1_000_000_000


def trace(served: Any, tracer: Any = None) -> Callable[[], None]:
    """Make a span of OpenTelemetry for each request that begins from now on. Returns a function that ends this.

    `served` is an engine or a server. All servers of the engine are traced. `tracer` is a `Tracer` of OpenTelemetry;
    None: the tracer "reqtable" of the global provider. Call `trace` before the loop runs, or in the loop's thread.
    Raises ConfigurationError if the package opentelemetry-api is not installed.
    """
    engine: Engine = served if isinstance(served, Engine) else served.engine
    traced = Traced(tracer)
    watch = watch_of(engine)
    watch.add(traced.look)

    def stop() -> None:
        watch.remove(traced.look)
        traced.close()

    return stop


class Traced:
    """Turns the events of requests into spans."""

    def __init__(self, tracer: Any) -> None:
        try:
            from opentelemetry import trace as opentelemetry  # an extra: most programs need no traces
        except ImportError:
            raise ConfigurationError(
                "traces need the package opentelemetry-api: pip install 'reqtable[otel]'"
            ) from None
        self._api = opentelemetry
        self._tracer = tracer or opentelemetry.get_tracer("reqtable")
        self._spans: dict[int, Any] = {}  # of the unfinished requests, by their ids

    def look(self, event: dict[str, Any]) -> None:
        """Begin, annotate or end the span of a request. Outgoing connections have none."""
        if event.get("kind") != "client":
            return
        number, at = event["id"], round(event["at"] * _NS)
        if event["event"] == "begun":
            self._spans[number] = self._begin(event, at)
        span = self._spans.get(number)
        if span is None:
            return  # it began before `trace` was called, or never did: it was refused at its preamble
        if event["event"] == "ended":
            self._end(self._spans.pop(number), event, at)
        else:
            told = {"reqtable.from": event["from"], "reqtable.by": event["by"]}
            span.add_event(event["to"], {**told, **_state_of(event)}, at)

    def close(self) -> None:
        """End the spans of the requests that go on."""
        for span in self._spans.values():
            span.end()
        self._spans.clear()

    def _begin(self, event: dict[str, Any], at: int) -> Any:
        named = {f"reqtable.{name}": event[name] for name in ("id", "handler", "policy")}
        attributes = {"client.address": event["peer"], **named}
        kind = self._api.SpanKind.SERVER
        return self._tracer.start_span(event["handler"], kind=kind, attributes=attributes, start_time=at)

    def _end(self, span: Any, event: dict[str, Any], at: int) -> None:
        named = {f"reqtable.{name}": event[name] for name in ("ending", "bytes_in", "bytes_out", "steps")}
        span.set_attributes(named)
        if event["ending"] in _FAILED:
            span.set_status(self._api.Status(self._api.StatusCode.ERROR, event["ending"]))
        span.end(at)


def _state_of(event: dict[str, Any]) -> dict[str, str]:
    """Return the handler's own state as an attribute, if the handler has states."""
    return {} if event["handler_state"] is None else {"reqtable.handler_state": event["handler_state"]}
