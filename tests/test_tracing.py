"""OpenTelemetry traces: a span for each request, an event for each transition, and nothing if nobody asks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import reqtable
from examples.notes import Notes
from reqtable import ConfigurationError, call, line, state
from reqtable.control.tracing import trace
from tests.support import Client, serving, wait_until

ANY = ("127.0.0.1", 0)


class Asks(reqtable.StateRequestHandler):
    """Waits for a line, then for a call, which fails if the line says so."""

    @state(line())
    def command(self, text: bytes) -> Any:
        return self.answered, call(int, text)

    @state()
    def answered(self, number: int) -> Any:
        self.send(b"%d\n" % number)
        return self.command


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Any:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("test")


def test_a_request_is_a_span_and_a_transition_an_event(tracer: Any, exporter: InMemorySpanExporter) -> None:
    server = reqtable.TCPServer(ANY, Asks)
    trace(server, tracer)
    with serving(server):
        with Client(server.server_address) as client:
            assert client.ask(b"7\n") == b"7\n"
            assert client.end().rest() == b""
            peer = "{}:{}".format(*client.socket.getsockname())
        wait_until(server, lambda: not len(server.table))
    [span] = exporter.get_finished_spans()
    assert (span.name, span.kind, span.status.status_code) == ("Asks", SpanKind.SERVER, StatusCode.UNSET)
    assert span.attributes == {
        "client.address": peer,
        "reqtable.id": 1,
        "reqtable.handler": "Asks",
        "reqtable.policy": "inline",
        "reqtable.ending": "done",
        "reqtable.bytes_in": 2,
        "reqtable.bytes_out": 2,
        "reqtable.steps": 4,
    }
    moves = [(event.name, event.attributes["reqtable.handler_state"]) for event in span.events]
    waits = [move for move in moves if move[0] != "RUNNING"]
    assert waits == [("READING", "command"), ("OFFLOADED", "answered"), ("READING", "command")]
    times = [span.start_time, *[event.timestamp for event in span.events], span.end_time]
    assert times == sorted(times)
    assert all({"reqtable.from", "reqtable.by"} <= event.attributes.keys() for event in span.events)


def test_a_request_that_fails_is_an_error(tracer: Any, exporter: InMemorySpanExporter) -> None:
    server = reqtable.TCPServer(ANY, Asks)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    trace(server.engine, tracer)
    with serving(server):
        with Client(server.server_address) as client:
            client.send(b"seven\n").rest()
        wait_until(server, lambda: not len(server.table))
    [span] = exporter.get_finished_spans()
    assert (span.status.status_code, span.attributes["reqtable.ending"]) == (StatusCode.ERROR, "error")


def test_it_ends_when_told_to(tracer: Any, exporter: InMemorySpanExporter) -> None:
    server = reqtable.TCPServer(ANY, Notes)
    plain = server.table.on_transition, [*server.engine.steps.on_release]
    stop = trace(server, tracer)
    assert (server.table.on_transition, server.engine.steps.on_release) != plain
    with serving(server):
        with Client(server.server_address) as client:
            client.ask(b"count\n")
            server.engine.post(stop)
            wait_until(server, lambda: len(exporter.get_finished_spans()) == 1)
            assert (server.table.on_transition, server.engine.steps.on_release) == plain
            client.ask(b"bye\n")
    assert len(exporter.get_finished_spans()) == 1


def test_without_the_package_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with reqtable.TCPServer(ANY, Notes) as server, pytest.raises(ConfigurationError) as error:
        trace(server)
    assert str(error.value) == "traces need the package opentelemetry-api: pip install 'reqtable[otel]'"
