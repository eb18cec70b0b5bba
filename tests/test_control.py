"""The control API of one process: what an operator sees, and what an operator can have done."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, ControlOptions, Limits, StateRequestHandler, exactly, line, state
from reqtable.config import differences
from reqtable.control.jobs import SLICE_S, Turns
from reqtable.server.access_log import JSONFormatter, TextFormatter
from reqtable.table.errors import ConfigurationError
from tests.control import Operator, UnixConnection
from tests.support import Client, Started, serving

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="the control API is on a Unix socket")


class Store(StateRequestHandler):
    """Waits for `put N` and then for N bytes."""

    key: str = ""
    got: list[int]

    @state(line())
    def command(self, item: bytes) -> Any:
        if item.startswith(b"put "):
            self.key = item.decode().strip()
            return self.body, exactly(int(item.split()[1]))
        self.send(item)
        return self.command

    @state(exactly(1))
    def body(self, data: bytes) -> Any:
        self.send(b"%d\n" % len(data))
        return self.command


@contextlib.contextmanager
def controlled(
    folder: Path, handler: Any = Store, dispatch: str | None = None, **limits: Any
) -> Iterator[tuple[Any, Operator]]:
    """Serve `handler` with a control socket."""
    path = str(folder / "c.sock")
    config = Config(limits=Limits(**limits), control=ControlOptions(socket=path))
    server = reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=dispatch, config=config)
    with serving(server):
        yield server, Operator(path)


@contextlib.contextmanager
def clients(server: Any, count: int) -> Iterator[list[Client]]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(Client(server.server_address)) for _ in range(count)]
        for each in made:
            stack.callback(each.hang_up)  # forked children have copies of the sockets
        yield made


def test_rows_have_the_keys_of_a_snapshot_and_more(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 1) as [client]:
        client.send(b"put 12\none")
        [row] = operator.rows_once(lambda rows: rows and rows[0]["buffered_in"] == 3)
        assert {*row} == {*server.table.snapshot()[0], "worker"}
        assert (row["handler"], row["handler_state"], row["state"], row["letter"]) == ("Store", "body", "READING", "R")
        assert row["waits_for"] == "exactly(n=12)"
        assert row["worker"] == os.getpid()
        file, _, number = row["source"].rpartition(":")
        assert file == __file__
        assert "def body" in "".join(Path(file).read_text().splitlines()[int(number) - 1 : int(number) + 1])


def test_filters_sort_and_limit(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 5) as made:
        operator.rows_once(lambda rows: len(rows) == 5)
        made[3].send(b"put 100\n" + b"x" * 50)
        made[1].send(b"put 100\n" + b"x" * 20)
        operator.rows_once(lambda rows: sum(row["buffered_in"] for row in rows) == 70)
        assert [row["buffered_in"] for row in operator.get("/v1/requests?sort=mem&limit=2")] == [50, 20]
        assert [row["id"] for row in operator.get("/v1/requests?sort=age&limit=3")] == [1, 2, 3]
        assert {row["id"] for row in operator.get("/v1/requests?handler_state=body")} == {2, 4}
        port = made[0].socket.getsockname()[1]
        assert [row["id"] for row in operator.get(f"/v1/requests?peer=127.0.0.1:{port}")] == [1]
        assert len(operator.get("/v1/requests?state=READING&policy=inline&handler=Store&older=0&limit=4")) == 4
        assert operator.get("/v1/requests?older=3600") == []
        assert operator.get("/v1/requests?idle=3600") == []
        assert operator.get("/v1/requests?worker=1") == []
        assert operator.get("/v1/requests?by=handler_state&older=0") == [
            {"handler_state": "command", "count": 3, "buffered": 0},
            {"handler_state": "body", "count": 2, "buffered": 70},
        ]
        assert operator.get("/v1/requests?by=peer") == [{"peer": "127.0.0.1", "count": 5, "buffered": 70}]
        status, lines = operator.ask("/v1/requests?format=ndjson&limit=2")
        assert (status, [json.loads(each)["id"] for each in lines.splitlines()]) == (200, [1, 2])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/v1/requests?oldest=1", b"there is no filter 'oldest': use state, handler"),
        ("/v1/requests?sort=size", b"sort=size: there are id, age"),
        ("/v1/requests?state=Q", b"no state is named 'Q'"),
        ("/v1/requests?older=long", b"older=long: give a number"),
        ("/v1/requests?limit=-1", b"limit=-1: give a number"),
        ("/v1/requests?by=colour", b"by=colour: there are peer"),
        ("/v1/requests/none", b"'none' is not the id of a request"),
    ],
)
def test_a_wrong_question_is_refused_with_the_mend(tmp_path: Path, target: str, words: bytes) -> None:
    with controlled(tmp_path) as (_, operator):
        status, body = operator.ask(target)
        assert status == 400
        assert words in body


def test_one_request_in_detail(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 1) as [client]:
        client.send(b"put 12\n\x1b[31m<b>")
        operator.rows_once(lambda rows: rows and rows[0]["buffered_in"] == 8)
        found = operator.get("/v1/requests/1")
        assert found["input_head"] == "\x1b[31m<b>"
        assert found["fields"]["key"] == "'put 12'"
        assert found["fields_bytes"] > 0
        assert found["connections"] == []
        status, body = operator.ask("/v1/requests/77")
        assert (status, json.loads(body)) == (404, {"error": "there is no such request"})


def test_cancel_ends_one_request_and_only_it(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 3) as made:
        operator.rows_once(lambda rows: len(rows) == 3)
        assert operator.post("/v1/requests/2/cancel") == {
            "cancelled": [2],
            "missing": [],
            "goes_on": [],
            "call_threads": None,
        }
        assert made[1].rest() == b""
        assert made[0].ask(b"still\n") == b"still\n"
        assert made[2].ask(b"still\n") == b"still\n"
        status, body = operator.ask("/v1/requests/2/cancel", "POST", {})
        assert (status, json.loads(body)) == (
            404,
            {"cancelled": [], "missing": [2], "goes_on": [], "call_threads": None},
        )
        assert server.stats()["finished"]["cancelled"] == 1


def test_cancel_of_many_says_first_what_it_would_do(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 4) as made:
        made[0].send(b"put 9\n")
        made[3].send(b"put 9\n")
        operator.rows_once(lambda rows: sum(row["handler_state"] == "body" for row in rows) == 2 and len(rows) == 4)
        asked = {"handler_state": "body"}
        assert operator.post("/v1/requests/cancel", asked | {"dry_run": True})["would_cancel"] == [1, 4]
        status, body = operator.ask("/v1/requests/cancel", "POST", asked | {"max": 1})
        assert status == 409
        assert b"more than 1 requests match" in body
        status, body = operator.ask("/v1/requests/cancel", "POST", {})
        assert status == 400
        assert b"everything would be cancelled" in body
        assert server.stats()["finished"]["cancelled"] == 0
        assert operator.post("/v1/requests/cancel", asked) == {
            "cancelled": [1, 4],
            "missing": [],
            "goes_on": [],
            "call_threads": None,
        }
        assert operator.post("/v1/requests/cancel", {"ids": [2, 99]}) == {
            "cancelled": [2],
            "missing": [99],
            "goes_on": [],
            "call_threads": None,
        }
        assert made[2].ask(b"still\n") == b"still\n"


def test_an_action_is_logged_with_the_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 1):
        operator.rows_once(lambda rows: len(rows) == 1)
        with caplog.at_level(logging.INFO):
            operator.post("/v1/requests/1/cancel")
            assert operator.ask("/v1/requests/cancel", "POST", {"ids": [99999]})[0] == 404
            assert operator.ask("/v1/config", "PATCH", {"limits.foo": 1})[0] == 409
            assert operator.ask("/v1/log-level", "PUT", {"logger": "foo", "level": "info"})[0] == 400
            operator.post("/v1/config", {"limits.entries_max": 99}, "PATCH")
        user = f"control: user {os.getuid()}"
        actions = [each for each in caplog.messages if each.startswith(user)]
        assert actions[:2] == [f"{user} cancels 1: ended 1 request", f"{user} cancels 99999: ended 0 requests"]
        assert actions[2].startswith(f"{user} sets limits.foo = 1: refused: there is no key limits.foo: there are ")
        assert actions[3].startswith(
            f"{user} sets the log level: {{'level': 'info', 'logger': 'foo'}}: refused: there is"
        )
        assert actions[4:] == [f"{user} sets limits.entries_max = 99: done"]


def test_configuration_is_shown_and_set(tmp_path: Path) -> None:
    with controlled(tmp_path, entries_max=10) as (server, operator), clients(server, 2) as made:
        shown = {row["key"]: row for row in operator.get("/v1/config")}
        assert shown["limits.entries_max"] == {"key": "limits.entries_max", "value": 10, "origin": "default"}
        operator.rows_once(lambda rows: len(rows) == 2)
        now = operator.post("/v1/config", {"limits.entries_max": 2, "limits.idle_timeout_s": 900.0}, "PATCH")
        assert {"key": "limits.entries_max", "value": 2, "origin": "reqtable set"} in now
        assert server.engine.limits.entries_max == 2
        assert made[0].ask(b"goes on\n") == b"goes on\n"
        for changes, words in [
            ({"limits.entries_mx": 3}, b"there is no key limits.entries_mx: did you mean limits.entries_max?"),
            ({"limits.entries_max": "many"}, b"entries_max must be a whole number above 0"),
            ({"workers": 3}, b"workers can't be set while the server runs"),
            ({"takeover": True}, b"takeover can't be set while the server runs"),
            ({"control.socket": "/x"}, b"control.socket can't be set while the server runs"),
            ({"limits": 3}, b"limits is a table: name a key in it"),
            (
                {"limits.calls_max.x": 3},
                b"there is no key limits.calls_max.x: did you mean limits.calls_max?",
            ),
            ({"limits.entries_max": 3, "pool.size": -1}, b"pool.size must be a whole number above 0"),
        ]:
            status, body = operator.ask("/v1/config", "PATCH", changes)
            assert status == 409, body
            assert words in body
        assert server.engine.limits.entries_max == 2


def test_reload_says_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "reqtable.toml"
    file.write_text(f'[control]\nsocket = "{tmp_path}/c.sock"\n[limits]\nentries_max = 10\n')
    monkeypatch.setenv("REQTABLE_CONFIG", str(file))
    with serving(reqtable.TCPServer(("127.0.0.1", 0), Store)) as server:
        operator = Operator(tmp_path / "c.sock")
        file.write_text(file.read_text().replace("= 10", "= 20"))
        changes = operator.post("/v1/reload")
        own = {"key": "limits.entries_max", "before": 10, "now": 20, "origin": f"{file}:4", "after_restart": False}
        assert changes == [own]
        assert server.engine.limits.entries_max == 20
        file.write_text("[limits]\nentries_max = 0\n")
        status, body = operator.ask("/v1/reload", "POST", {})
        assert status == 409
        assert b"entries_max must be" in body
        assert server.engine.limits.entries_max == 20


def test_what_counts_only_after_a_restart_is_marked() -> None:
    def marked(before: Config, now: Config) -> dict[str, bool]:
        return {each["key"]: each["after_restart"] for each in differences(before, now)}

    page = ControlOptions(page="127.0.0.1:1")
    assert marked(Config(), Config(control=page, dispatch="pool")) == {"control.page": True, "dispatch": False}
    assert marked(Config(), Config(workers=2)) == {"workers": True}
    assert marked(Config(workers=2), Config(workers=3)) == {"workers": False}


def test_a_place_with_a_scheme_is_refused_when_it_is_read() -> None:
    with pytest.raises(
        ConfigurationError, match=r"control.page must be host:port, such as 127.0.0.1:9100, not 'tcp://"
    ):
        ControlOptions(page="tcp://127.0.0.1:9101")


def test_looking_writes_nothing_to_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 1) as [client]:
        with caplog.at_level(logging.DEBUG, "reqtable"):
            for target in ("/v1/requests", "/v1/stats", "/v1/log-level", "/v1/requests/77"):
                operator.ask(target)
            client.send(b"put 1\nx")
            assert client.line() == b"1\n"
        assert caplog.messages == []


def test_loggers_with_a_level_of_their_own_are_shown(tmp_path: Path) -> None:
    with controlled(tmp_path) as (_, operator):
        logging.getLogger("tests.levels")  # another logger than those that there are is refused
        own = {"logger": "tests.levels", "level": "error"}
        assert operator.post("/v1/log-level", own, "PUT")["loggers"]["tests.levels"] == "error"
        found = operator.get("/v1/log-level")
        assert (found["logger"], found["loggers"]["tests.levels"]) == ("root", "error")
        assert found["loggers"]["root"] == found["level"]
        logging.getLogger("tests.levels").setLevel(logging.NOTSET)
        assert "tests.levels" not in operator.get("/v1/log-level")["loggers"]


def test_without_a_file_there_is_nothing_to_reload(tmp_path: Path) -> None:
    with controlled(tmp_path) as (_, operator):
        status, body = operator.ask("/v1/reload", "POST", {})
        assert status == 409
        assert b"REQTABLE_CONFIG" in body


@pytest.mark.parametrize(("target", "known"), [("/v1/restart", b"check"), ("/v1/drain", b"stay or worker")])
def test_a_misspelt_key_does_nothing(tmp_path: Path, target: str, known: bytes) -> None:
    with controlled(tmp_path) as (_, operator):
        status, body = operator.ask(target, "POST", {"chek": True})
        assert status == 400
        assert b"'chek' is not known in the body: write " + known in body
        assert operator.get("/v1/stats")["is_draining"] is False


def test_drain_that_stays_only_stops_accepting(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 1) as [client]:
        operator.rows_once(lambda rows: len(rows) == 1)
        assert operator.post("/v1/drain", {"stay": True}) == {"worker": os.getpid(), "entries": 1}
        with pytest.raises(ConnectionRefusedError):
            Client(server.server_address)
        assert client.ask(b"goes on\n") == b"goes on\n"
        assert operator.get("/v1/stats")["is_draining"] is True


def test_drain_ends_the_server_when_it_is_empty(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sock")
    config = Config(limits=Limits(drain_idle_s=60.0), control=ControlOptions(socket=path))
    server = reqtable.TCPServer(("127.0.0.1", 0), Store, config=config)
    with serving(server), Client(server.server_address) as client:
        operator = Operator(path)
        assert client.ask(b"begun\n") == b"begun\n"
        operator.post("/v1/drain")
        assert client.ask(b"goes on\n") == b"goes on\n"
        client.close()
        server._BaseServer__is_shut_down.wait(20)  # `serve_forever` has returned
    assert not os.path.exists(path)


def test_events_tell_what_happens(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator):
        connection = UnixConnection(operator.path)
        connection.request("GET", "/v1/events")
        answer = connection.getresponse()
        assert answer.getheader("Content-Type") == "text/event-stream"
        assert answer.readline() == b":\n"
        with Client(server.server_address) as client:
            client.ask(b"x\n")
        found: list[dict[str, Any]] = []
        while len(found) < 2:
            text = answer.readline()
            if text.startswith(b"data: "):
                found.append(json.loads(text[6:]))
        answer.close()
        connection.close()
        assert [(each["event"], each["id"]) for each in found] == [("begun", 1), ("ended", 1)]
        assert found[1]["ending"] == "done"
        assert found[1]["bytes_in"] == 2


def test_nobody_looking_leaves_no_hook(tmp_path: Path) -> None:
    """Events and the recorded machine cost a request nothing once nobody looks."""
    with controlled(tmp_path) as (server, operator), clients(server, 1) as [client]:
        client.ask(b"x\n")
        hooks = len(server.engine.steps.on_release)
        connection = UnixConnection(operator.path)
        connection.request("GET", "/v1/events")
        connection.getresponse().readline()
        while server.table.on_transition is None:
            client.ask(b"x\n")
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        while server.table.on_transition is not None:
            client.ask(b"x\n")
        assert len(server.engine.steps.on_release) == hooks
        assert "_resume" not in vars(Store)


def test_the_machine_counts_ways_and_stays(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 2) as [client, other]:
        operator.rows_once(lambda rows: len(rows) == 2)
        operator.get("/v1/machine")
        client.send(b"put 2\nab")
        assert client.line() == b"2\n"
        other.send(b"put 9\n")
        operator.rows_once(lambda rows: any(row["handler_state"] == "body" for row in rows))
        [machine] = operator.get("/v1/machine")
        assert machine["handler"] == "Store"
        assert {(move["from"], move["to"]): move["count"] for move in machine["moves"]} == {
            ("command", "body"): 2,
            ("body", "command"): 1,
        }
        states = {each["name"]: each for each in machine["states"]}
        assert (states["command"]["now"], states["body"]["now"]) == (1, 1)
        assert sum(states["body"]["stays"]) == 1
        assert states["body"]["successors"] == ["command"]
        assert states["body"]["source"].startswith(__file__)
    assert "_resume" not in vars(Store)


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool", "fork"])
def test_a_program_asks_by_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatch: str) -> None:
    """An unchanged blocking handler under TableMixIn, and every other policy, can be looked at."""

    class Echo(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            for text in self.rfile:
                self.wfile.write(text)

    monkeypatch.setenv("REQTABLE_CONTROL", str(tmp_path / "c.sock"))
    handler = Store if dispatch in ("inline", "pool") else Echo
    with serving(reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=dispatch)) as server:
        operator = Operator(tmp_path / "c.sock")
        with clients(server, 2) as [client, other]:
            assert client.ask(b"one\n") == b"one\n"
            assert other.ask(b"two\n") == b"two\n"
            rows = operator.get("/v1/requests")
            assert [row["policy"] for row in rows] == [dispatch] * 2
            if dispatch in ("greenlet", "thread"):
                stack = operator.get("/v1/requests/1")["stack"]
                assert any(f"{__file__}:" in each and each.endswith(" handle") for each in stack)
            if dispatch == "greenlet":
                assert rows[0]["source"].startswith(f"{__file__}:")
            assert operator.post("/v1/requests/1/cancel")["cancelled"] == [1]
            assert client.rest() == b""
            assert other.ask(b"still\n") == b"still\n"
    assert not (tmp_path / "c.sock").exists()


def test_an_await_is_shown_with_its_line(tmp_path: Path) -> None:
    class Lines(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            await self.one()

        async def one(self) -> None:
            while text := await self.read(line()):  # the line that is shown
                await self.send(text)

    with controlled(tmp_path, Lines) as (server, operator), clients(server, 1) as [client]:
        client.ask(b"x\n")
        [row] = operator.get("/v1/requests")
        file, _, number = row["source"].rpartition(":")
        assert "the line that is shown" in Path(file).read_text().splitlines()[int(number) - 1]


# -- who gets in ------------------------------------------------------------------------------------------------------


def test_the_socket_is_the_users_alone(tmp_path: Path) -> None:
    with controlled(tmp_path) as (_, operator):
        assert stat.S_IMODE(os.stat(operator.path).st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_even_with_the_right_to_connect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with controlled(tmp_path) as (_, operator):
        os.chmod(operator.path, 0o777)
        for folder in (tmp_path, *tmp_path.parents):
            if str(folder).startswith("/tmp/"):
                os.chmod(folder, 0o755)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.setuid(65_534)
                os.environ.clear()
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as own:
                    own.connect(operator.path)
                    own.sendall(b"GET /v1/requests HTTP/1.1\r\nHost: x\r\n\r\n")
                    status = 0 if own.recv(100) == b"" else 2
            except ConnectionError:
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert "control: user 65534 may not use" in caplog.text
        assert operator.get("/v1/requests") == []


def test_operators_take_no_room_from_clients(tmp_path: Path) -> None:
    """A server that is full can still be looked at, and its operators are none of its requests."""
    with controlled(tmp_path, entries_max=2) as (server, operator), clients(server, 2):
        assert len(operator.rows_once(lambda rows: len(rows) == 2)) == 2
        assert len(server.table) == 2
        assert server.stats()["accepted"] == 2


def test_two_servers_of_one_program_share_the_socket_of_their_engine(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sock")
    config = Config(control=ControlOptions(socket=path))
    engine = reqtable.Engine()
    servers = [reqtable.TCPServer(("127.0.0.1", 0), Store, config=config) for _ in range(2)]
    for server in servers:
        engine.add(server)
    with serving(servers[0]), Client(servers[0].server_address), Client(servers[1].server_address):
        rows = Operator(path).rows_once(lambda rows: len(rows) == 2)
        assert {row["local"].rpartition(":")[2] for row in rows} == {
            str(server.server_address[1]) for server in servers
        }
    servers[1].server_close()


def test_a_path_that_cannot_be_bound_leaves_the_server_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(control=ControlOptions(socket=str(tmp_path / "none" / "c.sock")))
    with serving(reqtable.TCPServer(("127.0.0.1", 0), Store, config=config)) as server:
        with Client(server.server_address) as client:
            assert client.ask(b"x\n") == b"x\n"
    assert "can't be opened, so no operator can look" in caplog.text


def test_serving_again_opens_the_socket_again(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    config = Config(control=ControlOptions(socket=str(path)))
    server = reqtable.TCPServer(("127.0.0.1", 0), Store, config=config)
    for _ in range(2):
        server.engine.post(server.shutdown)
        server.serve_forever()
        assert not path.exists()
    with serving(server):
        assert Operator(path).get("/v1/requests") == []


# -- how long it holds the loop ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_slice_holds_the_loop_for_long(tmp_path: Path) -> None:
    """2,000 rows in slices: the median slice stays within its budget, and a request's echo comes in between."""
    with controlled(tmp_path) as (server, operator), clients(server, 2000) as made:
        operator.rows_once(lambda rows: len(rows) == 2000)
        held: list[float] = []
        run = Turns._run

        def timed(turns: Turns) -> None:
            begun = time.perf_counter()
            run(turns)
            held.append(time.perf_counter() - begun)

        Turns._run = timed  # type: ignore[method-assign]
        try:
            for query in ("", "?sort=mem", "?sort=age&limit=100", "?by=peer", "?handler_state=body"):
                operator.get(f"/v1/requests{query}")
        finally:
            Turns._run = run  # type: ignore[method-assign]
        assert made[7].ask(b"x\n") == b"x\n"
        held.sort()
        median_us, p99_us = held[len(held) // 2] * 1e6, held[-len(held) // 100] * 1e6
        print(f"{len(held)} slices: median {median_us:.0f} us, p99 {p99_us:.0f} us")
        assert held[len(held) // 2] < 2 * SLICE_S


# -- programs that know nothing of reqtable ---------------------------------------------------------------------------

MOVED = """
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        for text in self.rfile:
            self.wfile.write(text)
with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""


def test_a_moved_program_can_be_looked_at_and_survives_its_signals(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(MOVED)
    path = tmp_path / "c.sock"
    command = [sys.executable, "-m", "reqtable.compat", "run", "--dispatch", "greenlet", str(script)]
    environment = {**os.environ, "REQTABLE_CONTROL": str(path)}
    pipe = subprocess.PIPE
    with Started(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            address = ("127.0.0.1", int(process.stdout.readline()))
            with Client(address) as client:
                assert client.ask(b"one\n") == b"one\n"
                [row] = Operator(path).get("/v1/requests")
                assert row["source"] == f"{script}:5"
                for number, words in [
                    (signal.SIGUSR1, "1 request"),
                    (signal.SIGHUP, "SIGHUP: this program reads no"),
                    (signal.SIGUSR2, "SIGUSR2: this program can't be restarted from here"),
                ]:
                    process.send_signal(number)
                    while words not in process.stderr.readline():
                        assert process.poll() is None
                assert client.ask(b"two\n") == b"two\n"
        finally:
            process.kill()


def test_a_line_of_the_log_has_the_id_of_its_request() -> None:
    class Logs(StateRequestHandler):
        @state(line())
        def command(self, item: bytes) -> Any:
            logging.getLogger("a.program").warning("got %s", item)
            self.send(b"\n")
            return self.command

    record: list[str] = []

    class Keep(logging.Handler):
        def emit(self, each: logging.LogRecord) -> None:
            record.append(self.format(each))

    handlers = [Keep(), Keep()]
    handlers[0].setFormatter(TextFormatter("%(levelname)s %(of_request)s%(message)s"))
    handlers[1].setFormatter(JSONFormatter())
    logger = logging.getLogger("a.program")
    for each in handlers:
        logger.addHandler(each)
    try:
        with serving(reqtable.TCPServer(("127.0.0.1", 0), Logs)) as server, clients(server, 2) as [_, client]:
            client.ask(b"x\n")
        logger.warning("outside")
    finally:
        for each in handlers:
            logger.removeHandler(each)
    assert record[0] == r"WARNING request 2: got b'x\n'"
    assert json.loads(record[1])["id"] == 2
    assert record[2] == "WARNING outside"
    assert "id" not in json.loads(record[3])
