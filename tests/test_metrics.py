"""The metrics: their text, their figures, their bounds, and what they cost while nobody looks."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from examples.notes import Notes
from reqtable import Config, ConfigurationError, ControlOptions, Limits, PoolOptions
from reqtable.control import watch
from reqtable.control.exposition import PART, texts_of
from reqtable.control.figures import METRICS, joined_figures
from reqtable.control.jobs import PAUSE, Job
from reqtable.control.metrics import figures_of
from reqtable.control.recorder import HANDLERS_MAX, METHODS, OTHER, recorder_of
from reqtable.control.watch import machines_of
from reqtable.http import HTTPRequestHandler
from reqtable.server.operator import Operator
from reqtable.table.states import State
from tests.pages import played
from tests.scraping import ask, samples_in, scraped, value, whole
from tests.support import WAIT_S, Client, Started, serving, wait_until

ROOT = Path(__file__).parent.parent
ANY = ("127.0.0.1", 0)
FINISHED = "reqtable_requests_finished_total"


class Site(HTTPRequestHandler):
    """Answers every path."""

    def respond(self) -> Any:
        return self.answer(200, "hello\n")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "c.sock")


@contextlib.contextmanager
def controlled(handler: Any, path: str, dispatch: str | None = None, **parts: Any) -> Iterator[Any]:
    """Run a TCP server of `handler`, with a control socket at `path`."""
    control = parts.pop("control", None) or ControlOptions(socket=path)
    config = Config(control=control, **parts)
    with serving(reqtable.TCPServer(ANY, handler, dispatch=dispatch, config=config)) as server:
        yield server


def talk(server: Any, times: int) -> None:
    for _ in range(times):
        with Client(server.server_address) as client:
            assert client.ask(b"put 3\nabccount\n") == b"1\n"
            assert client.ask(b"bye\n") == b""
    wait_until(server, lambda: not len(server.table))


def checked_by_promtool(text: str) -> None:
    found = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=WAIT_S)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


# -- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("handler", "dispatch"), [(Notes, "inline"), (Notes, "pool"), (Site, "inline")])
def test_prometheus_accepts_the_text(handler: Any, dispatch: str, path: str) -> None:
    with controlled(handler, path, dispatch) as server:
        scraped(path)
        if handler is Notes:
            talk(server, 2)
        else:
            assert ask(server.server_address, "/") == (200, "hello\n")
            wait_until(server, lambda: not len(server.table))
        text, samples = scraped(path)
    checked_by_promtool(text)
    families = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    assert families <= METRICS.keys()
    own = {"reqtable_http_responses_total", "reqtable_http_request_duration_seconds"}
    assert own.isdisjoint(families) == (handler is Notes)
    assert ("reqtable_pool_threads" in families) == (dispatch == "pool")
    assert whole(samples, FINISHED, ending="done", policy=dispatch) == (2 if handler is Notes else 1)


def test_the_figures_are_those_of_the_table(path: str) -> None:
    with controlled(Notes, path) as server:
        scraped(path)
        talk(server, 3)
        with Client(server.server_address) as client:
            assert client.ask(b"put 3\nabccount\n") == b"1\n"
            wait_until(server, lambda: any(each.state is State.READING for each in server.table))
            _, samples = scraped(path)
            labels = {"handler": "Notes", "server": "TCPServer", "worker": "1"}
            assert value(samples, "reqtable_requests", state="READING", **labels) == 1
            assert whole(samples, "reqtable_requests") == 1
            assert value(samples, "reqtable_requests_accepted_total") == 4
            assert whole(samples, FINISHED) == value(samples, FINISHED, ending="done", policy="inline") == 3
            assert value(samples, "reqtable_received_bytes_total") == 4 * len(b"put 3\nabccount\n") + 3 * len(b"bye\n")
            assert value(samples, "reqtable_sent_bytes_total") == 4 * len(b"1\n"), "open connections count, too"
            assert value(samples, "reqtable_request_duration_seconds_count", handler="Notes") == 3
            stays = {"handler": "Notes", "state": "body", "le": "+Inf"}
            assert value(samples, "reqtable_state_duration_seconds_bucket", **stays) == 4
            assert 0 < value(samples, "reqtable_loop_busy_seconds_total") < WAIT_S
            assert value(samples, "reqtable_loop_passes_total") > 3


def test_it_counts_how_http_requests_were_answered(path: str) -> None:
    with controlled(Site, path) as server:
        scraped(path)
        with Client(server.server_address) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 3 + b"nonsense\r\n\r\n")
            assert client.rest().count(b"HTTP/1.1 ") == 4
        wait_until(server, lambda: not len(server.table))
        _, samples = scraped(path)
    name = "reqtable_http_responses_total"
    assert value(samples, name, code="200", method="GET") == 3
    assert value(samples, name, code="400", method=OTHER) == 1
    assert value(samples, "reqtable_http_request_duration_seconds_count", handler="Site") == 4


def test_the_kernels_queue_is_shown(path: str) -> None:
    with controlled(Notes, path, limits=Limits(entries_max=1, when_full="wait")) as server:
        clients = [Client(server.server_address) for _ in range(3)]
        clients[0].ask(b"count\n")
        _, samples = scraped(path)
        assert value(samples, "reqtable_listen_queue", server="TCPServer") == 2
        assert value(samples, "reqtable_listen_queue_limit", server="TCPServer") > 2
        for client in clients:
            client.close()


class Waits(reqtable.StateRequestHandler):
    """Holds a thread of the pool until it is let go."""

    has_begun = threading.Event()
    go_on = threading.Event()

    @reqtable.state(reqtable.line())
    def command(self, text: bytes) -> Any:
        self.has_begun.set()
        assert self.go_on.wait(WAIT_S)
        self.send(text)


def test_the_pool_and_its_queue_are_shown(path: str) -> None:
    with controlled(Waits, path, "pool", pool=PoolOptions(size=1)) as server:
        clients = [Client(server.server_address).send(b"hold\n") for _ in range(3)]
        offloaded = [State.OFFLOADED] * 3
        wait_until(server, lambda: [each.state for each in server.table] == offloaded)
        assert Waits.has_begun.wait(WAIT_S)
        _, samples = scraped(path)
        Waits.go_on.set()
        assert [client.rest() for client in clients] == [b"hold\n"] * 3
        for client in clients:
            client.close()
        [pool] = server._policies.made()
        wait_until(server, lambda: pool.load() == (0, 1, 0))
        assert value(samples, "reqtable_pool_threads", state="busy") == 1
        assert value(samples, "reqtable_pool_threads", state="idle") == 0
        assert value(samples, "reqtable_pool_queue") == 2


def test_reloads_are_counted(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[limits]\nentries_max = 10\n")
    with controlled(Notes, path):
        monkeypatch.setenv("REQTABLE_CONFIG", str(file))
        assert ask(path, "/v1/reload", "POST")[0] == 200
        file.write_text("[limits]\nentries_max = -1\n")
        assert ask(path, "/v1/reload", "POST")[0] == 409
        _, samples = scraped(path)
    name = "reqtable_config_reloads_total"
    assert [value(samples, name, result=each) for each in ("applied", "refused")] == [1, 1]


def test_many_values_are_written_in_parts() -> None:
    values: Any = {(f"H{number:02}", "body"): [1, *[0] * 11, 0.5] for number in range(2 * PART + 1)}
    parts = list(texts_of({"reqtable_state_duration_seconds": values, "reqtable_connections": {(): 0}}))
    assert len(parts) == 1 + 3
    text = b"".join(parts).decode()
    checked_by_promtool(text)
    assert text.count("# TYPE") == 2
    assert whole(samples_in(text), "reqtable_state_duration_seconds_count") == len(values)


# -- what it costs ----------------------------------------------------------------------------------------------------


def hooks_of(server: Any, handler: Any) -> tuple[Any, ...]:
    """Return everything by which something is recorded of each request."""
    methods = [vars(handler).get(name) for name in ("_resume", "end_answer", "_last_words", "_close")]
    return [*server.engine.steps.on_release], server.table.on_transition, methods


@pytest.mark.parametrize("handler", [Notes, Site])
def test_nobody_looking_costs_nothing(handler: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = reqtable.TCPServer(ANY, handler)
    expected = hooks_of(plain, handler)
    plain.server_close()
    monkeypatch.setattr(watch, "KEPT_S", 0.05)
    with controlled(handler, path) as server:
        assert ask(path, "/v1/stats")[0] == 200
        assert hooks_of(server, handler) == expected
        for _ in range(2):
            scraped(path)
            wait_until(server, lambda: hooks_of(server, handler) == expected)


def stop_recording(server: Any) -> None:
    """End the recording, as if nobody had looked for some minutes."""
    ended = threading.Event()
    server.engine.post(machines_of(server.engine).close)
    server.engine.post(ended.set)
    assert ended.wait(WAIT_S)


def test_what_was_recorded_stays(path: str) -> None:
    with controlled(Notes, path) as server:
        scraped(path)
        talk(server, 2)
        _, before = scraped(path)
        stop_recording(server)
        talk(server, 2)
        _, after = scraped(path)
        talk(server, 1)
        _, last = scraped(path)
    for name in ("reqtable_request_duration_seconds_count", "reqtable_state_duration_seconds_count"):
        assert whole(before, name) == whole(after, name) > 0, "nobody looked meanwhile"
        assert whole(last, name) == whole(before, name) * 3 / 2


def test_a_stay_in_which_nobody_looked_is_not_counted(path: str) -> None:
    with controlled(Notes, path) as server, Client(server.server_address) as client:
        assert client.ask(b"count\n") == b"0\n"
        scraped(path)
        for _ in range(2):
            client.ask(b"count\n")
        stop_recording(server)
        client.ask(b"count\n")
        scraped(path)
        for _ in range(2):
            client.ask(b"count\n")
        _, samples = scraped(path)
    stays = {"handler": "Notes", "state": "command"}
    assert value(samples, "reqtable_state_duration_seconds_count", **stays) == 2, "between the two lines of each loop"


class Spent(Job):
    """Is spent at every look, so each slice is as short as it can be."""

    is_spent = True  # type: ignore[assignment]


def test_a_request_that_ends_between_two_slices_counts_once(path: str) -> None:
    found: list[Any] = []
    looked = threading.Event()
    with controlled(Notes, path) as server, Client(server.server_address) as client:
        assert client.ask(b"count\n") == b"0\n"

        def look() -> None:
            slices = figures_of(server.engine, Operator(server.engine), Spent(server.engine.post))
            assert next(slices) is PAUSE
            server.engine.end_requests(server)
            server.engine.steps.reap()
            found.extend(slices)
            looked.set()

        server.engine.post(look)
        assert looked.wait(WAIT_S)
    assert found[-1]["reqtable_received_bytes_total"] == {(): len(b"count\n")}
    assert found[-1]["reqtable_sent_bytes_total"] == {(): len(b"0\n")}


def test_with_an_address_for_metrics_it_records_from_the_start(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "KEPT_S", 0.001)
    control = ControlOptions(socket=path, metrics="127.0.0.1:0")
    with controlled(Notes, path, control=control) as server:
        passed = threading.Event()
        server.engine.call_later(0.05, passed.set)
        assert passed.wait(WAIT_S)
        talk(server, 2)
        _, samples = scraped(path)
        assert value(samples, "reqtable_request_duration_seconds_count", handler="Notes") == 2
    assert "_resume" not in vars(Notes), "the class is left as it was"


def test_no_counter_goes_down_when_a_server_of_the_engine_closes(path: str) -> None:
    with controlled(Notes, path) as server:
        other = reqtable.TCPServer(ANY, Notes)
        server.engine.post(server.engine.add, other)
        wait_until(server, lambda: other in server.engine.servers)
        other._counts.policies["inline"].accepted = 7
        _, before = scraped(path)
        server.engine.post(other.server_close)
        wait_until(server, lambda: other not in server.engine.servers)
        _, after = scraped(path)
    assert whole(before, "reqtable_requests_accepted_total") == whole(after, "reqtable_requests_accepted_total") == 7


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_clients_can_make_no_labels(path: str) -> None:
    with controlled(Site, path) as server:
        scraped(path)
        with Client(server.server_address) as client:
            for method in (*METHODS, "STRANGE"):
                client.send(f"{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode())
            client.end().rest()
        wait_until(server, lambda: not len(server.table))
        _, before = scraped(path)
        with Client(server.server_address) as client:
            sender = threading.Thread(target=_send_strange, args=(client,))
            sender.start()
            assert client.rest().count(b"HTTP/1.1 200 OK") == 1000
            sender.join(WAIT_S)
        wait_until(server, lambda: not len(server.table))
        text, after = scraped(path)
    assert after.keys() == before.keys()
    assert value(after, "reqtable_http_responses_total", code="200", method=OTHER) == 1001
    assert "evil" not in text.lower()


def _send_strange(client: Client) -> None:
    for number in range(1000):
        fields = f"Host: evil{number}.example\r\nUser-Agent: evil{number}\r\n"
        client.send(f"EVIL{number} /evil{number}?evil={number} HTTP/1.1\r\n{fields}\r\n".encode())
    client.end()


def test_names_of_handlers_are_bounded() -> None:
    engine = reqtable.Engine()
    recorder = recorder_of(engine)
    names = [recorder.name_of(type(f"Handler{number}", (), {})) for number in range(HANDLERS_MAX + 10)]
    assert names[:HANDLERS_MAX] == [f"Handler{number}" for number in range(HANDLERS_MAX)]
    assert set(names[HANDLERS_MAX:]) == {OTHER}
    assert recorder.name_of(type("Handler3", (), {})) == "Handler3"
    engine.close()


def test_a_strange_status_makes_no_label(path: str) -> None:
    class Strange(HTTPRequestHandler):
        def respond(self) -> Any:
            return self.answer(int(self.request.path[1:]), "x")

    with controlled(Strange, path) as server:
        scraped(path)
        assert ask(server.server_address, "/299")[0] == 299
        assert ask(server.server_address, "/799")[0] == 799
        wait_until(server, lambda: not len(server.table))
        _, samples = scraped(path)
    codes = {dict(labels)["code"] for name, labels in samples if name == "reqtable_http_responses_total"}
    assert codes == {"299", OTHER}


# -- where it listens -------------------------------------------------------------------------------------------------


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "reqtable.control")
    return caplog


def address_in(told: pytest.LogCaptureFixture) -> tuple[str, int]:
    [port] = re.findall(r"control: listening on 127.0.0.1:(\d+)", told.text)
    return "127.0.0.1", int(port)


def test_tcp_is_read_only_and_has_nothing_else(path: str, told: pytest.LogCaptureFixture) -> None:
    control = ControlOptions(metrics="127.0.0.1:0")
    with controlled(Notes, path, control=control):
        place = address_in(told)
        assert scraped(place)[1]
        assert ask(place, "/healthz") == (200, "ok\n")
        assert ask(place, "/readyz") == (200, "ready\n")
        for other in ("/", "/v1/requests", "/v1/stats", "/v1/config", "/v1/events"):
            assert ask(place, other)[0] == 404
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert ask(place, "/metrics", method, b"{}")[0] == 405
        assert ask(place, "/v1/drain", "POST", b"{}")[0] == 404


def test_an_address_in_use_is_logged_and_left_out(path: str, told: pytest.LogCaptureFixture) -> None:
    with reqtable.TCPServer(ANY, Notes) as taken:
        here = f"127.0.0.1:{taken.server_address[1]}"
        with controlled(Notes, path, control=ControlOptions(socket=path, metrics=here)):
            assert ask(path, "/healthz") == (200, "ok\n")
    assert f"control: {here} can't be opened" in told.text


def test_ready_until_it_drains(path: str) -> None:
    with controlled(Notes, path) as server:
        assert ask(path, "/readyz") == (200, "ready\n")
        with Client(server.server_address) as client:
            client.ask(b"count\n")
            assert ask(path, "/v1/drain", "POST", b'{"stay": true}')[0] == 200
            assert ask(path, "/readyz") == (503, "not ready\n")
            assert ask(path, "/healthz") == (200, "ok\n")
            assert client.ask(b"count\n") == b"0\n"


def test_without_the_package_one_line_names_the_extra(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    line = "metrics need the package prometheus-client: pip install 'reqtable[metrics]'"
    with controlled(Notes, path):
        assert ask(path, "/metrics") == (501, f"501 Not Implemented: {line}\n")
        assert ask(path, "/healthz") == (200, "ok\n")
    server = reqtable.TCPServer(ANY, Notes, config=Config(control=ControlOptions(metrics="127.0.0.1:0")))
    with server, pytest.raises(ConfigurationError) as error:
        server.serve_forever()
    assert str(error.value) == line
    assert "_resume" not in vars(Notes), "nothing is recorded"


# -- a real Prometheus ------------------------------------------------------------------------------------------------


def test_a_real_prometheus_scrapes_it(path: str, tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    control = ControlOptions(metrics="127.0.0.1:0")
    with controlled(Notes, path, control=control) as server:
        talk(server, 3)
        host, port = address_in(told)
        settings = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "notes", "static_configs": [{"targets": [f"{host}:{port}"]}]}],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
        with prometheus(tmp_path) as api:
            wait_for_answer(api, 'up{job="notes"}', 1)
            wait_for_answer(api, "sum(reqtable_requests_finished_total)", 3)
            wait_for_answer(api, 'reqtable_request_duration_seconds_count{handler="Notes"}', 3)


@contextlib.contextmanager
def prometheus(folder: Path) -> Iterator[str]:
    """Run a Prometheus on loopback during the block. Yields the address of its API."""
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += ["--web.listen-address=127.0.0.1:0", "--storage.tsdb.retention.size=10MB"]
    with Started(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        timer = threading.Timer(WAIT_S, process.kill)
        timer.start()
        rest = threading.Thread(target=process.stderr.read)
        address = ""
        try:
            for line in process.stderr:
                if found := re.search(r'msg="Listening on" address=(\S+)', line):
                    address = found[1]
                if "ready to receive web requests" in line:
                    rest.start()
                    yield f"http://{address}/api/v1/query?"
                    break
            else:
                pytest.fail("prometheus has ended")
        finally:
            process.terminate()
            process.wait(WAIT_S)
            timer.cancel()
            timer.join()
            if rest.ident is not None:
                rest.join()


def wait_for_answer(api: str, query: str, expected: float) -> None:
    """Wait until a query has the expected value."""
    until = time.monotonic() + WAIT_S
    while True:
        with urllib.request.urlopen(api + urllib.parse.urlencode({"query": query}), timeout=WAIT_S) as answer:
            found = json.load(answer)["data"]["result"]
        if [float(each["value"][1]) for each in found] == [expected]:
            return
        assert time.monotonic() < until, f"{query}: {found}"


# -- sums -------------------------------------------------------------------------------------------------------------


def test_sums_add_everything_but_what_is_shared() -> None:
    one: Any = {
        "reqtable_requests_accepted_total": {(): 3},
        "reqtable_loop_lag_seconds": {(): [2, 0.5]},
        "reqtable_listen_queue": {("A",): 4},
        "reqtable_loop_lag_max_seconds": {(): 0.25},
    }
    other: Any = {
        "reqtable_requests_accepted_total": {(): 4},
        "reqtable_loop_lag_seconds": {(): [1, 0.25]},
        "reqtable_listen_queue": {("A",): 5, ("B",): 1},
        "reqtable_loop_lag_max_seconds": {(): 0.125},
    }
    assert joined_figures([one, other]) == {
        "reqtable_requests_accepted_total": {(): 7},
        "reqtable_loop_lag_seconds": {(): [3, 0.75]},
        "reqtable_listen_queue": {("A",): 5, ("B",): 1},
        "reqtable_loop_lag_max_seconds": {(): 0.25},
    }
    assert joined_figures([]) == {}


# -- what is written about it -----------------------------------------------------------------------------------------


def test_the_program_of_the_page_on_traces_can_stop(tmp_path: Path) -> None:
    with played("docs/how-to/trace-requests.md", tmp_path) as names:
        trace = names["trace"]
    with reqtable.TCPServer(ANY, Notes) as server:
        plain = hooks_of(server, Notes)
        stop = trace(server)
        assert hooks_of(server, Notes) != plain
        stop()
        assert hooks_of(server, Notes) == plain


def test_the_dashboard_names_only_metrics_that_there_are() -> None:
    dashboard = json.loads((ROOT / "examples/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 10
    known = {*METRICS}
    for name, each in METRICS.items():
        parts = {"summary": ("_sum", "_count"), "histogram": ("_bucket", "_sum", "_count")}.get(each.kind, ())
        known |= {name + part for part in parts}
    named = {name for query in queries for name in re.findall(r"\breqtable_\w+", query)}
    assert named <= known
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} == {*METRICS}, "every metric has a panel"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    _check_labels(queries)


def _check_labels(queries: list[str]) -> None:
    """Check that a query groups and selects by labels that its metric has."""
    for query in queries:
        [name, *_] = re.findall(r"\breqtable_\w+", query)
        metric = METRICS.get(name) or METRICS[re.sub(r"_(bucket|sum|count)$", "", name)]
        used = [label for group in re.findall(r"\bby \((.*?)\)", query) for label in group.split(", ")]
        used += re.findall(r'(\w+)=~?"', query)
        assert {*used} <= {*metric.labels, "le", "job", "instance"}, query
