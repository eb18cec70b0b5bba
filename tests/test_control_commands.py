"""The commands that ask a running server: each one, what it prints, and what it says when it can't ask."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from reqtable.config import ControlOptions
from reqtable.control.joining import summed
from reqtable.control.listening import default_path, folders
from reqtable.run import known_worker
from reqtable.run.cli import cli, main
from reqtable.run.commands import shown
from reqtable.run.commands.asking import Asked
from reqtable.run.commands.detail import detail_lines
from reqtable.run.commands.looking import _event_line
from reqtable.run.commands.rows import COLUMNS, LETTERS
from reqtable.run.commands.seconds import seconds_of
from reqtable.run.commands.stuck import GRACE_S, killed_text
from reqtable.run.operated import control_options
from reqtable.table.states import State
from tests.pages import PAGES, Command, blocks, commands, write_files
from tests.service import WAIT_S, Service
from tests.support import Client, Started, slow_but
from tests.test_workers import until

ROOT = Path(__file__).parent.parent
LINES = "tests/sticking.py:Lines"


class Done(NamedTuple):
    code: int
    out: str
    err: str


def command(*words: object, typed: str = "") -> Done:
    """Run a command in this process. `typed` is what its standard input has."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


class Controlled(Service):
    """A service with a control socket. Commands are run with its path."""

    def __init__(self, *arguments: str, workers: int | None = None, handler: str = LINES, **options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="reqtable-")
        self.path = f"{self._folder.name}/c.sock"
        super().__init__("--control", self.path, *arguments, workers=workers, handler=handler, **options)

    def __enter__(self) -> Controlled:
        self.wait_for("control: listening")
        return self

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._folder.cleanup()

    def run(self, *words: object, typed: str = "") -> Done:
        return command(*words, "--control", self.path, typed=typed)

    def json(self, *words: object) -> Any:
        done = self.run(*words, "--json")
        assert done.err == ""
        return json.loads(done.out)

    def rows(self, count: int, *words: object) -> list[dict[str, Any]]:
        """Return the rows, once there are so many."""
        found: list[dict[str, Any]] = []

        def are_there() -> bool:
            found[:] = json.loads(self.run("ps", *words, "--json").out)
            return len(found) == count

        until(are_there)
        return found


def is_ended(client: Client) -> bool:
    """Wait for the end of the connection: a reset if the server had not read everything."""
    try:
        return client.rest() == b""
    except ConnectionResetError:
        return True


def port_of(client: Client) -> int:
    return int(client.socket.getsockname()[1])


@contextlib.contextmanager
def controlled(workers: int | None = None) -> Iterator[Controlled]:
    """Serve during the block. After that, the server must end well by SIGINT."""
    with Controlled(workers=workers) as made:
        yield made
        if made.process.poll() is None:
            made.signal(signal.SIGINT)
            assert made.wait() == 0, made.lines


@pytest.fixture
def server() -> Iterator[Controlled]:
    with controlled() as made:
        yield made


@pytest.fixture
def workers() -> Iterator[Controlled]:
    with controlled(workers=2) as made:
        made.wait_for("2 of 2 workers are ready")
        yield made


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder for control sockets of its own, in which the commands look. The test may put servers into it."""
    with tempfile.TemporaryDirectory(prefix="reqtable-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        monkeypatch.setattr("reqtable.run.commands.finding.folders", lambda: [f"{folder}/reqtable"])
        monkeypatch.setattr("reqtable.run.commands.finding.glob", lambda _: [])  # the folders of others, for root
        yield Path(folder, "reqtable")


def test_a_process_that_has_handed_over_is_not_asked(empty: Path) -> None:
    """A restart has the old process start the new one. The old one goes on for a while, to end its last requests."""
    blocking = Service("--log-level", "debug", workers=None, handler="tests/sticking.py:Blocking")
    with blocking as old, Client(old.address) as client:
        old.wait_for("control: listening")
        assert client.ask(b"x\n") == b"x\n"
        assert command("set", "limits.drain_idle_s=60").code == 0
        outcome = json.loads(command("restart", "--json").out)
        assert (outcome["problem"], outcome["left"]) == (None, 1)
        assert [row["worker"] for row in json.loads(command("workers", "--json").out)] == [outcome["pid"]]
        [row] = json.loads(command("ps", "--json", "--control", old.pid).out)
        assert row["handler"] == "Blocking"
        assert command("drain").code == 0


def test_a_server_that_another_one_has_started_does_not_take_its_place(empty: Path) -> None:
    serve = ["serve", "examples/notes.py:Notes", "--bind", "tcp://127.0.0.1:0"]
    program = (
        "import subprocess, sys; from reqtable.run.cli import main\n"
        f"with subprocess.Popen([sys.executable, '-m', 'reqtable', *{serve}]) as new:\n"
        f"    sys.argv[1:] = {serve}\n"
        "    try: main()\n"
        "    finally: new.terminate()\n"
    )
    words = [sys.executable, "-c", program]
    with Started(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as old:
        try:
            assert old.stdout is not None
            ports = {old.stdout.readline().rpartition(":")[2].strip() for _ in range(2)}
            assert command("stats").err.endswith(" or by the port of a bind, as in --control :7000\n")
            for port in ports:
                assert json.loads(command("stats", "--json", "--control", f":{port}").out)["servers"]
        finally:
            old.terminate()
        assert old.wait(WAIT_S) == 0


# -- ps, show and kill ------------------------------------------------------------------------------------------------


def test_ps_prints_a_line_for_each_request(server: Controlled) -> None:
    with Client(server.address) as one, Client(server.address) as two:
        one.ask(b"a line\n")
        two.send(b"half")
        server.rows(2)
        until(lambda: "half" in server.run("show", server.json("ps", "--sort", "in", "--limit", 2)[1]["id"]).out)
        done = server.run("ps", "--sort", "id")
    heading, first, second = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert heading.split() == ["id", "st", "peer", "handler", "at", "age", "idle", "mem", "in", "out", "waits", "for"]
    shape = r"\d+ +R +127\.0\.0\.1:\d+ +Lines +asked +\d+\.\ds +\d+\.\ds +{} +{} +{} +line\(limit=4096\)"
    assert re.fullmatch(rf" *{shape.format(0, 7, 7)}", first)
    assert re.fullmatch(rf" *{shape.format(4, 4, 0)}", second)
    assert len({line.index("R") for line in (first, second)}) == 1, "the columns are aligned"


def test_ps_filters_sorts_and_limits(server: Controlled) -> None:
    with Client(server.address) as one, Client(server.address) as two:
        one.send(b"stick\n")
        two.ask(b"a longer line\n")
        stuck, other = (row["id"] for row in server.rows(2, "--sort", "id"))
        until(lambda: len(server.json("ps", "--handler-state", "stuck")) == 1)

        def found(*words: object) -> list[int]:
            return [row["id"] for row in server.json("ps", *words)]

        assert found("--handler-state", "stuck") == [stuck]
        assert found("--state", "s") == found("--state", "SLEEPING") == [stuck]
        assert found("--state", "reading") == [other]
        assert found("--sort", "in") == [other, stuck]
        assert found("--sort", "age", "--limit", 1) == [stuck]
        assert found("--limit", 0) == []
        assert found("--peer", f"127.0.0.1:{port_of(two)}") == [other]
        assert found("--policy", "inline", "--handler", "Lines", "--worker", server.pid) == [stuck, other]
        assert found("--idle", 0) == [stuck, other]
        for none in (("--older", 1000), ("--path", "/"), ("--worker", 1), ("--policy", "pool")):
            done = server.run("ps", *none, "--json")
            assert (done.code, done.out, done.err) == (1, "[]\n", "no request matches\n")
        unknown = server.run("ps", "--handler", "X\x9b", "--json")
        says = "no request matches\nthere is no handler X\\x9b: there are Lines\n"
        assert (unknown.code, unknown.out, unknown.err) == (1, "[]\n", says)
        assert server.run("ps", "--handler", "Lines", "--older", "5m").err == "no request matches\n"


def test_ps_prints_the_columns_that_are_named(server: Controlled) -> None:
    with Client(server.address):
        [row] = server.rows(1)
        out = server.run("ps", "--columns", "state,worker, id").out
        headings = [each.heading for each in COLUMNS.values()]
        [line, _] = server.run("ps", "--columns", ",".join(headings)).out.splitlines()
        assert line.split() == " ".join(headings).split()
    assert [line.split() for line in out.splitlines()] == [
        ["state", "worker", "id"],
        ["READING", str(server.pid), str(row["id"])],
    ]
    done = server.run("ps", "--columns", "id,heat")
    assert (done.code, done.out) == (2, "")
    assert "there is no column 'heat': use id, kind," in done.err


def test_ps_prints_groups(server: Controlled) -> None:
    with Client(server.address), Client(server.address) as two, Client(server.address):
        two.send(b"stick\n")
        server.rows(3)
        until(lambda: len(server.json("ps", "--handler-state", "stuck")) == 1)
        assert server.json("ps", "--by", "peer") == [{"peer": "127.0.0.1", "count": 3, "buffered": 0}]
        lines = server.run("ps", "--by", "handler_state").out.splitlines()
        assert [line.split() for line in lines] == [
            ["handler_state", "count", "buffered"],
            ["asked", "2", "0"],
            ["stuck", "1", "0"],
        ]
        assert len(server.json("ps", "--by", "handler_state", "--limit", 1)) == 1
        assert server.json("ps", "--by", "state", "--handler-state", "stuck")[0]["state"] == "SLEEPING"
        assert server.run("ps", "--by", "state", "--sort", "age").code == 2


def test_the_keys_of_a_row(server: Controlled) -> None:
    with Client(server.address):
        [row] = server.rows(1)
    named = {"handler_state", "source", "worker", "kind", "parent", "id", "peer", "state", "age_s", "waits_for"}
    assert named <= row.keys()
    assert (row["handler_state"], row["worker"], row["kind"], row["parent"]) == ("asked", server.pid, "client", None)
    assert re.search(r"/tests/sticking\.py:\d+$", row["source"])


def test_show_prints_everything_about_one_request(server: Controlled) -> None:
    with Client(server.address) as client:
        client.ask(b"one\n")
        client.send(b"half a \x1b[31mline\x9b")
        [row] = server.rows(1)
        until(lambda: server.json("show", row["id"])["buffered_in"] == 17)
        done = server.run("show", row["id"])
        as_json = server.run("show", row["id"], "--json").out
    assert (done.code, done.err) == (0, "")
    words = dict(line.split(None, 1) for line in done.out.splitlines() if line.strip() != "fields")
    assert words["count"] == "1"
    assert words["input_head"] == r"'half a \x1b[31mline\x9b'"
    assert r"half a \u001b[31mline\u009b" in as_json
    assert words["state"] == "READING"
    assert words["age"].endswith("s")
    assert "age_s" not in words
    missing = server.run("show", 77777)
    assert missing == Done(1, "", "reqtable: there is no request 77777: it has ended, or never was\n")


def test_kill_ends_the_requests_that_are_named(server: Controlled) -> None:
    with Client(server.address) as one, Client(server.address) as two:
        first, _ = server.rows(2, "--sort", "id")
        assert server.run("kill", first["id"]) == Done(0, f"ended 1 request: {first['id']}\n", "")
        assert one.rest() == b""
        assert two.ask(b"still here\n") == b"still here\n"
        done = server.run("kill", first["id"], 88888)
        text = f"there are no requests {first['id']}, 88888: they have ended, or never were\n"
        assert done == Done(1, text, "")
        assert server.run("kill", 88888).out == "there is no request 88888: it has ended, or never was\n"
        [row] = server.rows(1)
        assert server.json("kill", row["id"]) == {
            "cancelled": [row["id"]],
            "missing": [],
            "goes_on": [],
            "call_threads": None,
        }
        assert two.rest() == b""
    server.wait_for(r"control: user \d+ cancels")


@pytest.mark.parametrize(("typed", "ends"), [("y\n", True), ("n\n", False), ("", False)])
def test_kill_asks_before_it_ends_what_matches(server: Controlled, typed: str, ends: bool) -> None:
    with Client(server.address) as stuck, Client(server.address) as other:
        stuck.send(b"stick\n")
        other.ask(b"x\n")
        [row] = server.rows(1, "--handler-state", "stuck")
        done = server.run("kill", "--handler", "Lines", "--handler-state", "stuck", typed=typed)
        asked = done.err.splitlines()
        assert asked[0].split()[:3] == ["id", "st", "peer"]
        assert asked[1].split()[:2] == [str(row["id"]), "S"]
        assert asked[2].startswith("End 1 request? [y/N]: ")
        assert ("use --yes" in done.err) is (typed == "")
        assert (done.code, done.out) == ((0, f"ended 1 request: {row['id']}\n") if ends else (1, ""))
        assert len(server.rows(1 if ends else 2)) == 2 - ends
        assert other.ask(b"y\n") == b"y\n"


def test_kill_needs_ids_or_filters_and_has_a_bound(server: Controlled) -> None:
    assert server.run("kill").code == server.run("kill", 1, "--older", 1).code == 2
    nothing = server.run("kill", "--older", 1000)
    assert (nothing.code, nothing.out, nothing.err) == (1, "", "no request matches\n")
    with Client(server.address) as one, Client(server.address) as two:
        server.rows(2)
        done = server.run("kill", "--handler", "Lines", "--max", 1, "--yes")
        assert (done.code, done.out) == (1, "")
        assert done.err == "reqtable: 2 requests match, more than 1: none was ended; say --max 2\n"
        dry = server.run("kill", "--handler", "Lines", "--dry-run")
        assert (dry.code, dry.err, len(dry.out.splitlines())) == (0, "", 3)
        rows = server.json("kill", "--handler", "Lines", "--dry-run")
        assert [row["handler"] for row in rows] == ["Lines", "Lines"]
        assert server.run("kill", rows[0]["id"], "--dry-run").code == 2
        assert one.ask(b"x\n") + two.ask(b"y\n") == b"x\ny\n"
        assert len(server.json("kill", "--handler", "Lines", "--max", 2, "--yes")["cancelled"]) == 2
        assert one.rest() + two.rest() == b""


# -- a request stuck among many ---------------------------------------------------------------------------------------

BY_POLICY = [
    ("inline", "Lines", None),
    ("greenlet", "Blocking", None),
    ("thread", "Blocking", None),
    ("pool", "Blocking", None),
    ("pool", "Lines", None),
    ("executor", "Lines", None),
    ("fork", "Blocking", None),
    ("inline", "Lines", 4),
]


@pytest.mark.parametrize("others", slow_but([500, 5000], 500))
@pytest.mark.parametrize(("policy", "handler", "workers"), BY_POLICY)
def test_a_request_that_is_stuck_is_found_and_killed_and_only_it(
    policy: str, handler: str, workers: int | None, others: int, unchecked: None
) -> None:
    """Two commands: `ps --sort age --limit 1` finds the oldest, `kill ID` ends it."""
    with (
        Controlled("--dispatch", policy, workers=workers, handler=f"tests/sticking.py:{handler}") as server,
        contextlib.ExitStack() as stack,
    ):
        if workers is not None:
            server.wait_for(f"{workers} of {workers} workers are ready")
        stuck = stack.enter_context(Client(server.address))
        stuck.send(b"stick\n")
        server.rows(1)
        clients = [stack.enter_context(Client(server.address)) for _ in range(others)]
        server.rows(others + 1)
        [oldest] = server.json("ps", "--sort", "age", "--limit", 1)
        assert server.run("kill", oldest["id"]) == Done(0, f"ended 1 request: {oldest['id']}\n", "")
        assert is_ended(stuck)
        assert oldest["peer"] == f"127.0.0.1:{port_of(stuck)}"
        assert len(server.rows(others)) == others, "all others are there"
        for client in (clients[0], clients[1]):  # more could wait for a thread, a child
            assert client.ask(b"x\n") == b"x\n"
        stats = server.json("stats")
        assert sum(each["finished"]["cancelled"] for each in stats["servers"]) == 1
        server.process.kill()  # to end each of them would take longer than the test
        server.wait()


def test_the_old_ones_are_ended_by_their_age(server: Controlled) -> None:
    with Client(server.address) as old:
        server.rows(1, "--older", 2)  # it is two seconds older than those that come now
        clients = [Client(server.address) for _ in range(100)]
        try:
            rows = server.rows(101, "--sort", "age")
            assert rows[0]["age_s"] > rows[1]["age_s"] + 1.5
            done = server.run("kill", "--older", rows[0]["age_s"], "--handler", "Lines", "--yes")
            assert done == Done(0, f"ended 1 request: {rows[0]['id']}\n", "")
            assert old.rest() == b""
            assert len(server.rows(100)) == 100
        finally:
            for client in clients:
                client.close()


# -- stats, workers, watch --------------------------------------------------------------------------------------------


def test_stats_say_what_the_server_has_and_how_late_it_is(server: Controlled) -> None:
    with Client(server.address) as client:
        client.ask(b"x\n")
        out = server.run("stats").out
    words = {line.split()[0]: line.split(None, 1)[1] for line in out.split("\n\n")[0].splitlines()}
    assert words["requests"] == "1, at most 100000: READING 1"
    assert re.fullmatch(r"\d+ passes, \S+ms on average, \S+ms at most", words["loop"])
    assert re.fullmatch(r"timers by \S+ms on average, \S+ms at most; this answer took \S+ms", words["late"])
    assert words["changed"] == "the configuration never"
    heading, line = out.split("\n\n")[1].splitlines()
    assert heading.split()[:4] == ["handler", "address", "accepted", "finished"]
    assert line.split()[:4] == ["Lines", f"127.0.0.1:{server.address[1]}", "1", "0"]
    stats = server.json("stats")
    assert (stats["entries_max"], stats["changed_s"], stats["changes"]) == (100_000, None, [])


def test_workers_are_summed_and_shown(workers: Controlled) -> None:
    pids = workers.workers()
    with Client(workers.address), Client(workers.address):
        workers.rows(2)
        stats = workers.json("stats")
        rows = workers.json("workers")
        lines = [line.split() for line in workers.run("workers").out.splitlines()]
    assert stats["entries"] == 2
    assert {each["worker"] for each in stats["workers"]} == set(pids)
    assert [each["worker"] for each in rows] == pids
    assert sum(each["entries"] for each in rows) == 2
    assert lines[0] == ["worker", "is", "age", "heard", "requests", "mem"]
    assert [line[:2] for line in lines[1:]] == [[str(pid), "serving"] for pid in pids]


def test_a_stuck_worker_is_shown_with_its_age_and_its_stack(workers: Controlled) -> None:
    with Client(workers.address) as other, Client(workers.address) as held:
        workers.rows(2)
        held.send(b"hold\n")
        found: list[Any] = []

        def is_shown() -> bool:
            found[:] = [each for each in workers.json("workers") if each["is_stuck"]]
            return bool(found)

        until(is_shown)
        [stuck] = found
        done = workers.run("workers")
        assert f"worker {stuck['worker']} is stuck in:" in done.out
        assert re.search(rf"^ *{stuck['worker']}  STUCK  +\d", done.out, re.MULTILINE)
        assert re.search(r'sticking\.py", line \d+ in hold_up', done.out)
        missing = f"worker {stuck['worker']} is stuck, and has no part in this answer: see reqtable workers\n"
        for words, code in ((["ps"], 0), (["stats", "--json"], 0), (["kill", "--worker", stuck["worker"]], 1)):
            listed = workers.run(*words)
            assert (listed.code, listed.err.replace("no request matches\n", "")) == (code, missing), words
        assert re.search(r"STUCK .* tests/sticking\.py:\d+ in hold_up$", done.out, re.MULTILINE)
        assert [line.split()[-1] for line in done.out.splitlines() if "File" in line] == ["hold_up", "asked"]
        limit = f"it is killed after {30 + GRACE_S:.1f}s\n"
        assert done.out.endswith(f"\nreqtable drain --worker {stuck['worker']} replaces it: {limit}")
        drained = workers.run("drain", "--worker", stuck["worker"])
        assert drained.out.endswith(f"is stuck, and can't drain: another one takes its place; {limit}")
        assert f"\nworker {stuck['worker']} was told to end: {limit}" in workers.run("workers").out
        os.kill(stuck["worker"], signal.SIGKILL)  # no other signal gets through to it
        other.close()


def test_a_stuck_worker_may_have_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, [{"key": "limits.drain_timeout_s", "value": None}])
    assert killed_text(Asked("x.sock")) == "no limit of time ends it"


def test_the_commands_know_when_a_worker_is_killed() -> None:
    assert GRACE_S == known_worker.GRACE_S


def test_watch_prints_events_as_they_come(server: Controlled) -> None:
    def begin(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "reqtable", "watch", *words, "--control", server.path]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def has_said(watching: subprocess.Popen[str]) -> bool:
        with Client(server.address) as client:
            client.ask(b"x\n")
        assert watching.stdout is not None
        return bool(select.select([watching.stdout], [], [], 0)[0])

    with begin("--json") as as_json, begin("--kinds", "state,ended") as plain:
        for watching in (as_json, plain):
            until(lambda watching=watching: has_said(watching))
        assert as_json.stdout is not None
        event = json.loads(as_json.stdout.readline())
        as_json.send_signal(signal.SIGINT)
        assert as_json.wait(WAIT_S) == 0
        server.signal(signal.SIGINT)
        assert (
            plain.communicate(timeout=WAIT_S)[1] == f"reqtable: {server.path}: the server has ended while it answered\n"
        )
        assert (plain.returncode, server.wait()) == (3, 0)
    assert (event["event"], event["handler"]) in (("begun", "Lines"), ("ended", "Lines"))


def test_a_kind_that_there_is_not_is_refused() -> None:
    done = command("watch", "--kinds", "ended, foo", "--control", "nowhere")
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("there is no kind 'foo': use begun, state, ended\n")


def test_a_line_of_an_event() -> None:
    event = {"event": "ended", "at": 0.25, "id": 7, "peer": "\x9b2J", "ending": "done", "age_s": 61.0, "to": None}
    move = {"event": "state", "at": 0.25, "id": 7, "by": "awaits input", "to": "READING"}
    assert _event_line(move).endswith(' state  7 by="awaits input" to=READING')
    assert re.fullmatch(r"\d\d:\d\d:00\.250 ended  7 peer=\\x9b2J ending=done age=61\.0s", _event_line(event))


# -- drain, reload, set, log-level ------------------------------------------------------------------------------------


def test_drain_ends_the_server_when_it_is_empty(server: Controlled) -> None:
    with Client(server.address) as client:
        client.ask(b"x\n")
        done = server.run("drain")
        assert done == Done(0, "1 request in progress: the server accepts no more, and ends when they are done\n", "")
        client.end()
        assert client.rest() == b""
    assert server.wait() == 0


def test_an_empty_server_answers_before_it_ends(server: Controlled) -> None:
    assert server.json("drain") == {"worker": server.pid, "entries": 0}
    assert server.wait() == 0


def test_drain_can_leave_the_server_running(server: Controlled) -> None:
    with Client(server.address) as client:
        client.ask(b"x\n")
        assert server.run("drain", "--stay").out == "1 request in progress: the server accepts no more\n"
        with pytest.raises(ConnectionRefusedError):
            Client(server.address)
        assert client.ask(b"y\n") == b"y\n"
    server.rows(0)
    assert ", accepts no more" in server.run("stats").out


def test_drain_replaces_one_worker(workers: Controlled) -> None:
    pids = workers.workers()
    assert (
        workers.run("drain", "--worker", pids[0]).out == f"worker {pids[0]} drains, and another one takes its place\n"
    )
    until(lambda: len(now := workers.workers()) == 2 and pids[0] not in now)
    assert pids[1] in workers.workers()
    done = workers.run("drain", "--worker", 1)
    assert (done.code, done.out) == (2, "")
    assert "there is no worker 1: the workers are " in done.err
    assert workers.run("drain", "--worker", pids[1], "--stay").code == 2
    assert workers.run("drain").code == 0
    assert workers.wait() == 0


def test_a_server_without_workers_drains_none(server: Controlled) -> None:
    done = server.run("drain", "--worker", server.pid)
    assert (done.code, done.err) == (2, f"reqtable: worker={server.pid}: this server has no workers\n")
    with Client(server.address) as client:
        assert client.ask(b"x\n") == b"x\n"


@pytest.mark.parametrize("count", [None, 2])
def test_what_set_and_reload_change_is_printed_and_remembered(count: int | None, tmp_path: Path) -> None:
    path = tmp_path / "reqtable.toml"
    path.write_text("[limits]\nentries_max = 50\n")
    with Controlled("--config", str(path), workers=count) as server:
        if count:
            server.wait_for("2 of 2 workers are ready")
        assert server.json("set", "limits.entries_max=60", "limits.loop_stall_s=inf") == [
            {"key": "limits.entries_max", "before": 50, "now": 60, "origin": "reqtable set"},
            {"key": "limits.loop_stall_s", "before": 0.5, "now": None, "origin": "reqtable set"},
        ]
        assert server.run("set", "limits.entries_max = 70").out == "limits.entries_max: 60 -> 70  (reqtable set)\n"
        assert server.run("set", "limits.entries_max=70").out == "nothing has changed\n"
        server.run("set", "limits.idle_timeout_s=9", "limits.entries_per_peer_max=9")
        assert [each["now"] for each in server.json("set", "limits.idle_timeout_s=none")] == [None]
        assert [each["now"] for each in server.json("set", "limits.entries_per_peer_max=none")] == [None]
        assert server.run("set", "limits.entries_max=none").code == 78
        assert server.json("stats")["entries_max"] == 70 * (count or 1)
        path.write_text("[limits]\nentries_max = 80\nloop_stall_s = inf\n")
        replaced = "each worker is replaced, one after another: idle clients see end of file\n" if count else ""
        assert server.run("reload") == Done(0, f"limits.entries_max: 70 -> 80  ({path}:2)\n", replaced)
        stats = server.json("stats")
        assert 0 <= stats["changed_s"] < WAIT_S
        assert [(each["key"], each["now"]) for each in stats["changes"]] == [("limits.entries_max", 80)]
        assert "limits.entries_max: 70 -> 80" in server.run("stats").out
        if count:
            server.wait_for("2 of 2 workers are ready", times=2)
        path.write_text("[limits]\nentries_max = 0\n")
        done = server.run("reload")
        assert (done.code, done.out) == (78, "")
        assert re.fullmatch(r"reqtable: .*entries_max must be a whole number above 0, not 0.*\n", done.err)
        server.signal(signal.SIGINT)
        assert server.wait() == 0


@pytest.mark.parametrize(
    ("assignment", "code", "says"),
    [
        ("limits.entries_max", 2, "write it as KEY=VALUE, such as limits.entries_max=5000"),
        ("=3", 2, "write it as KEY=VALUE"),
        ("limits.entries=3", 78, "there is no key limits.entries: did you mean limits.entries_max?"),
        ("calls_max=64", 78, "there is no key calls_max: did you mean limits.calls_max?"),
        ("limits.entries_max=many", 78, "entries_max must be a whole number above 0, not 'many'"),
        ('limits.when_full="wait"\nx=1', 78, "when_full"),
        ("workers=3", 78, "workers can't be set while the server runs"),
    ],
)
def test_what_can_not_be_set(server: Controlled, assignment: str, code: int, says: str) -> None:
    done = server.run("set", "limits.told_max=7", assignment)
    assert (done.code, done.out) == (code, "")
    assert says in done.err
    [told] = [each for each in server.json("stats")["changes"] if each["key"] == "limits.told_max"] or [None]
    assert told is None, "all values change, or none"


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Have each command get this answer."""
    monkeypatch.setattr(Asked, "get", lambda *_, **__: answer)
    monkeypatch.setattr(Asked, "send", lambda *_, **__: answer)
    monkeypatch.setattr(Asked, "tell_found", lambda _: None)


def test_the_levels_of_all_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {"root": "info", "reqtable.access": "warning"}
    answering(monkeypatch, {"logger": "root", "level": "info", "loggers": levels})
    assert command("log-level").out == "root: info\nreqtable.access: warning\n"
    assert command("log-level", "info").out == "root: info\n"


def test_what_counts_after_a_restart_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    change = {"key": "control.page", "before": None, "now": "a:1", "origin": "x.toml:2", "after_restart": True}
    answering(monkeypatch, [change])
    assert command("reload").out == "control.page: - -> a:1  (x.toml:2, counts after a restart)\n"


def test_kill_says_whose_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {"cancelled": [4, 7], "missing": [], "goes_on": [7]})
    goes_on = "the code of these goes on until it returns: 7\n"
    assert command("kill", 4, 7) == Done(0, "ended 2 requests: 4, 7\n", goes_on)


def test_kill_says_how_many_threads_for_calls_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"cancelled": [7], "missing": [], "goes_on": [7], "call_threads": {"busy": 1, "most": 2}}
    goes_on = "the code of these goes on until it returns: 7\n"
    answering(monkeypatch, answer)
    assert command("kill", 7).err == f"{goes_on}1 of 2 threads for calls are busy\n"
    answering(monkeypatch, {**answer, "call_threads": {"busy": 2, "most": 2}})
    full = "2 of 2 threads for calls are busy: a new call waits for one (limits.calls_max)\n"
    assert command("kill", 7).err == f"{goes_on}{full}"


def test_stats_show_what_calls_do(server: Controlled, monkeypatch: pytest.MonkeyPatch) -> None:
    found = server.json("stats")
    found["servers"][0]["calls"] = {
        "process": {"most": None, "running": 1, "given_up": 0, "queued": 0},
        "thread": {"most": 32, "running": 0, "given_up": 32, "queued": 3},
    }
    answering(monkeypatch, found)
    said = "process: 1 running; thread: 32 given up, still running, 3 queued (at most 32 run)"
    assert command("stats").out.splitlines()[-1].endswith(said)


def test_the_detail_shows_a_call_and_the_method_that_made_it() -> None:
    made = {"call": "call(f)", "on": "thread", "phase": "running", "age_s": 9.4, "asked_by": "Rank.words (app.py:10)"}
    assert [*detail_lines({"id": 1, "calls": [made], "stack": ["app.py:5 f"]})][1:] == [
        "call(f) on thread: running",
        "  asked for 9.4s ago by Rank.words (app.py:10)",
        "stack, the innermost line last",
        "  app.py:5 f",
    ]


def test_stats_show_how_busy_a_pool_is(server: Controlled, monkeypatch: pytest.MonkeyPatch) -> None:
    found = server.json("stats")
    found["servers"][0]["pool"] = {"size": 4, "busy": 4, "idle": 0, "queued": 9}
    answering(monkeypatch, found)
    assert server.run("stats").out.splitlines()[-1].endswith("  4 of 4 threads busy, 9 wait")


def test_log_level(server: Controlled) -> None:
    assert server.run("log-level", "reqtable", "debug") == Done(0, "reqtable: debug\n", "")
    found = server.json("log-level", "reqtable")
    assert (found["logger"], found["level"], found["loggers"]["reqtable"]) == ("reqtable", "debug", "debug")
    assert server.run("log-level", "WARNING").out == "reqtable: warning\n", "a lone level is that of reqtable"
    assert server.run("log-level", "root", "error").out == "root: error\n"
    levels = server.run("log-level").out
    assert "root: error\n" in levels
    assert "reqtable: warning\n" in levels
    assert server.run("log-level", "reqtable", "loud").code == 2
    for words in (("foo",), ("foo", "info")):
        done = server.run("log-level", *words)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("reqtable: there is no logger 'foo', and no such level: there are root, ")
        assert "reqtable, reqtable.access, " in done.err
        assert done.err.endswith("; the levels are debug, info, warning, error and critical\n")


def test_workers_that_start_later_have_the_level_too(workers: Controlled) -> None:
    assert workers.run("log-level", "reqtable.access", "info").out == "reqtable.access: info\n"
    [first, _] = workers.workers()
    workers.run("drain", "--worker", first)
    until(lambda: first not in workers.workers() and len(workers.workers()) == 2)
    with Client(workers.address) as one, Client(workers.address) as two:
        one.ask(b"x\n")
        two.ask(b"x\n")
        ports = [port_of(each) for each in (one, two)]
    for port in ports:
        workers.wait_for(f"{port}.*done")


# -- finding the server -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def usual() -> Iterator[Service]:
    """Run a service that has its control socket where the commands look."""
    with Service("--log-level", "debug", workers=None, handler=LINES) as service:
        service.wait_for("control: listening")
        yield service
        service.signal(signal.SIGINT)
        assert service.wait() == 0


def test_without_a_server(empty: Path) -> None:
    done = command("ps")
    assert (done.code, done.out) == (3, "")
    assert f"no server of this user is running: no control socket answers in {empty}: start a server" in done.err
    assert done.err.count("\n") == 1


def test_the_only_server_is_found_and_dead_sockets_are_not(empty: Path) -> None:
    with usual() as service, socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(empty / "1.sock"))
        assert json.loads(command("workers", "--json").out)[0]["worker"] == service.pid
        assert os.stat(empty).st_mode & 0o777 == 0o700
    assert [path.name for path in empty.iterdir()] == ["1.sock"], "the server has removed its own"


def test_several_servers_are_listed(empty: Path) -> None:
    with usual() as one, usual() as two:
        done = command("ps")
        assert (done.code, done.out) == (2, "")
        *listed, says = done.err.splitlines()
        assert re.fullmatch(
            r"reqtable: 2 servers are running: choose one by its process, as in --control \d+, or by the port "
            "of a bind, as in --control :7000",
            says,
        )
        assert sorted(line.split()[:2] for line in listed) == sorted(
            [str(each.pid), str(empty / f"{each.pid}.sock")] for each in (one, two)
        )
        assert all(LINES in line for line in listed)
        assert command("talk").err == (
            "reqtable: 2 servers are running: name the ADDRESS, such as tcp://127.0.0.1:7000\n"
        )
        assert completed("show", "") == [], "and nothing on the prompt"
        for named in (two.pid, f":{two.address[1]}", empty / f"{two.pid}.sock"):
            assert json.loads(command("workers", "--json", "--control", named).out)[0]["worker"] == two.pid
        pids = ", ".join(sorted(str(each.pid) for each in (one, two)))
        for named, what in ((1, "process 1"), (":1", "port 1")):
            assert command("drain", "--control", named) == Done(
                3, "", f"reqtable: no server of this user has {what}: these processes have sockets in {empty}: {pids}\n"
            )


def test_a_command_that_changes_the_only_server_says_which_it_is(empty: Path) -> None:
    with usual() as service:
        port = service.address[1]
        says = f"the only server is Lines at 127.0.0.1:{port}, process {service.pid}\n"
        assert command("ps").err == ""
        assert command("kill", 99) == Done(1, "there is no request 99: it has ended, or never was\n", says)
        assert command("set", "limits.calls_max=3").err == says
        assert command("log-level", "debug") == Done(0, "reqtable: debug\n", says)
        assert command("reload").err == says
        assert command("drain", "--stay").err == says
        assert command("drain", "--stay", "--control", f":{port}").err == "", "it is known"
        assert command("restart", "--check").err.startswith(says)


def test_only_sockets_of_the_usual_name_are_found_and_those_of_killed_servers_are_removed(empty: Path) -> None:
    with Controlled() as other, usual() as service:
        os.link(other.path, empty / "other.sock")  # it is alive, but has a name of its own
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        left, foreign = empty / f"{gone.pid}.sock", empty / "dead.sock"
        for path in (left, foreign):
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
        assert json.loads(command("workers", "--json").out)[0]["worker"] == service.pid
        assert not left.exists()
        assert foreign.exists()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(left))
        with usual():
            assert not left.exists(), "a new server removes it, too"
        other.process.kill()
        other.wait()


def test_top_shows_all_running_servers(empty: Path) -> None:
    with usual() as one, usual() as two:
        done = command("top", "--json", "--once", "--interval", "0.1")
        [frame] = map(json.loads, done.out.splitlines())
        pids = {str(each.pid): each.pid for each in (one, two)}
        assert {own["control"]: own["worker"] for own in frame["stats"]["workers"]} == pids


def test_a_folder_that_others_can_write_is_not_trusted(empty: Path) -> None:
    with usual():
        empty.chmod(0o777)
        assert command("ps").code == 3
        empty.chmod(0o700)
        assert command("ps").code == 0


def test_the_environment_names_the_socket(server: Controlled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQTABLE_CONTROL", server.path)
    assert json.loads(command("workers", "--json").out)[0]["worker"] == server.pid


def test_the_environment_names_one_server_by_its_port(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with usual() as service, usual():
        monkeypatch.setenv("REQTABLE_CONTROL", f":{service.address[1]}")
        for words in (("stats", "--json"), ("top", "--json", "--once", "--interval", "0.1")):
            done = command(*words)
            assert (done.code, done.err) == (0, "")
            assert f'"worker": {service.pid}' in done.out


@pytest.mark.parametrize("named", [":7000", "4711"])
def test_a_new_server_is_not_at_a_running_one(
    empty: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str
) -> None:
    monkeypatch.setenv("REQTABLE_CONTROL", named)
    monkeypatch.chdir(tmp_path)
    assert control_options(ControlOptions()).socket is None
    with usual() as service:
        assert [path.name for path in empty.iterdir()] == [f"{service.pid}.sock"]


def test_a_server_without_a_control_socket(empty: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REQTABLE_CONTROL", str(tmp_path / "unused.sock"))
    with Service("--no-control", workers=None, handler=LINES) as service, Client(service.address) as client:
        assert client.ask(b"x\n") == b"x\n"
        assert not empty.exists()
        assert list(tmp_path.iterdir()) == []


def test_a_socket_that_can_not_be_opened_is_a_warning(tmp_path: Path) -> None:
    with Service("--control", str(tmp_path / "no" / "c.sock"), workers=None, handler=LINES) as service:
        with Client(service.address) as client:
            assert client.ask(b"x\n") == b"x\n"
        service.wait_for("WARNING control: .* can't be opened")


def test_no_place_for_a_socket_is_a_warning(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty.parent.joinpath("reqtable").write_text("no folder")
    others = [folder for folder in folders() if not folder.startswith(str(empty.parent))]
    assert others, "there are other places"
    monkeypatch.setattr("reqtable.control.listening.folders", lambda: [str(empty)])
    with pytest.raises(OSError, match=r"File exists|not a folder"):
        default_path()


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_an_old_path(tmp_path: Path) -> None:
    missing = command("ps", "--control", tmp_path / "old.sock")
    assert missing == Done(
        3, "", f"reqtable: {tmp_path}/old.sock: there is no such socket: the server has ended, or has another one\n"
    )
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    gone = command("ps", "--control", tmp_path / "dead.sock")
    assert (gone.code, gone.out) == (3, "")
    assert gone.err.endswith("no server listens there any more: it has ended without removing its socket\n")
    (tmp_path / "file").touch()
    other = command("ps", "--control", tmp_path / "file")
    assert (other.code, other.out) == (3, "")
    assert other.err.endswith("this is no socket, but another file: name the control socket of a server\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_users_server(server: Controlled) -> None:
    os.chmod(Path(server.path).parent, 0o755)
    code = "import os, sys; from reqtable.run.cli import main; os.setuid(65534); main(sys.argv[1:])"
    for open_to_all in (False, True):
        if open_to_all:
            os.chmod(server.path, 0o666)
        done = subprocess.run(
            [sys.executable, "-c", code, "ps", "--control", server.path], cwd=ROOT, capture_output=True, text=True,
            timeout=WAIT_S,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (3, "")
        reason = "the server closed the connection" if open_to_all else "permission refused: it belongs to user root"
        assert f"{server.path}: {reason}" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_server_whose_loop_is_held_up(server: Controlled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asked.__init__, "__defaults__", (0.2,))
    with Client(server.address) as client:
        client.send(b"hold\n")
        until(lambda: server.run("ps").code == 3)
        done = server.run("ps")
        assert done.err == (
            f"reqtable: {server.path}: the server does not answer within 0.2 s: its loop is held up: "
            f"kill -USR1 {server.pid} logs its table\n"
        )
        assert server.run("drain", "--stay").err.endswith("logs its table; what was asked for may still be done\n")
        server.signal(signal.SIGUSR1)
        server.wait_for("INFO 1 request$")  # not "request 1: 1 request", though its step is running
    server.process.kill()
    server.wait()


def test_a_server_that_is_held_up_is_not_said_to_be_absent(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asked.__init__, "__defaults__", (0.2,))
    held = Service("--log-level", "debug", workers=None, handler=LINES)
    with held as service, Client(service.address) as client:
        service.wait_for("control: listening")
        client.send(b"hold\n")
        until(lambda: command("ps").code == 3)
        done = command("talk")
        assert (done.code, done.out) == (3, "")
        assert "the server does not answer within 0.2 s: its loop is held up" in done.err
        port = service.address[1]
        assert command("ps", "--control", f":{port}").err == (
            f"reqtable: no server of this user has port {port}: these processes have sockets in {empty}: "
            f"{service.pid}; the ports of {service.pid} are not known, as no answer has come\n"
        )
        service.process.kill()
        service.wait()


def test_no_worker_answers(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with usual() as service:
        monkeypatch.setattr(Asked, "get", lambda *_: summed([]))
        assert command("stats") == Done(3, "", "reqtable: no worker answers: see reqtable workers\n")
        assert command("kill", 99).err == f"the only server is process {service.pid}: no worker answers\n"
        assert command("talk").err.startswith("reqtable: no worker of the server answers: name the ADDRESS, such as ")


def test_a_program_that_the_signal_would_end_gets_no_such_advice() -> None:
    with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory() as folder:
        listener.bind(f"{folder}/c.sock")
        listener.listen()
        with pytest.raises(click.ClickException, match=rf"its loop is held up, in process {os.getpid()}$"):
            Asked(f"{folder}/c.sock", 0.05).get("/v1/stats")


@pytest.mark.parametrize(
    "framing", ["Transfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n", "Content-Length: 9\r\n\r\n{}\n"]
)
def test_a_server_that_ends_while_it_answers(framing: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory() as folder:
        listener.bind(f"{folder}/c.sock")
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(f"HTTP/1.1 200 OK\r\n{framing}".encode())

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(click.ClickException, match="the server has ended while it answered"):
            list(Asked(f"{folder}/c.sock").lines("/v1/requests"))
        thread.join(WAIT_S)


# -- programs that serve by themselves --------------------------------------------------------------------------------

PROGRAM = """
import socketserver, reqtable
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())
class Server(reqtable.TableMixIn, socketserver.ThreadingTCPServer):
    daemon_threads = True
with Server(("127.0.0.1", 0), Handler) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""


def test_a_program_with_the_mix_in(tmp_path: Path, empty: Path) -> None:
    path = f"{empty.parent}/program.sock"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "REQTABLE_CONTROL": path}
    )
    with process:
        try:
            assert process.stdout is not None
            with Client(("127.0.0.1", int(process.stdout.readline()))) as client:
                assert client.ask(b"hello\n") == b"HELLO\n"
                [row] = json.loads(command("ps", "--json", "--control", path).out)
                assert (row["handler"], row["server"]) == ("Handler", "Server")
                assert command("kill", row["id"], "--control", path).code == 0
                assert client.rest() == b""
            assert command("set", "limits.entries_max=9", "--control", path).out.startswith("limits.entries_max: ")
            reload = command("reload", "--control", path)
            assert (reload.code, reload.out) == (78, "")
            assert "name its file in REQTABLE_CONFIG" in reload.err
            assert command("drain", "--control", path).code == 0
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()


# -- what people see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (42.14, "42.1s"),
        (99.94, "99.9s"),
        (99.96, "1m40s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (172_799, "47h59m"),
        (180_000, "2d02h"),
        (-3, "-3.0s"),
        (None, "-"),
    ],
)
def test_ages(seconds: float | None, text: str) -> None:
    assert shown.age(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("40", 40.0),
        ("0.5", 0.5),
        ("5s", 5.0),
        ("42.1s", 42.1),
        ("2m23s", 143.0),
        ("5h07m", 18_420.0),
        ("2d02h", 180_000.0),
        ("", None),
        ("5x", None),
        ("-3", None),
        ("nan", None),
        ("3s2m", None),
    ],
)
def test_times_are_read_as_they_are_printed(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0K"), (1229, "1.2K"), (10_240, "10K"), (2**20, "1.0M"), (5 * 2**30, "5.0G")],
)
def test_sizes(count: int, text: str) -> None:
    assert shown.size(count) == text


def test_wide_characters_take_two_columns() -> None:
    assert shown.width_of("日本") == 4
    assert shown.cut("日本語", 5) == "日本…"
    assert shown.cut("e\u0301", 1) == "e\u0301"


def test_every_letter_is_explained() -> None:
    assert list(LETTERS) == [state for state in State if state is not State.CLOSED]
    page = command("ps", "--help").out
    assert [state for state in LETTERS if not re.search(rf"^ +{state.value}  {state.name}  ", page, re.MULTILINE)] == []


HOSTILE = "/\x1b[2J\x9b31m\u202e\x07" + "x" * 300


def test_nothing_that_a_client_sent_reaches_the_terminal_as_it_is(tmp_path: Path) -> None:
    """In 80 columns on a terminal, whole in a pipe, escaped in both."""
    (tmp_path / "sink.py").write_text(
        "import reqtable.http\n"
        "from reqtable import sleep, state\n"
        "class Sink(reqtable.http.HTTPRequestHandler):\n"
        "    def respond(self):\n"
        "        return self.wait, sleep(600)\n"
        "    @state()\n"
        "    def wait(self, _):\n"
        "        return self.answer(200, 'x')\n"
    )
    with Controlled(handler=f"{tmp_path}/sink.py:Sink") as server, Client(server.address) as client:
        target = "".join(f"%{byte:02x}" for byte in HOSTILE[:12].encode()) + "y" * 200
        client.send(f"GET /{target} HTTP/1.1\r\nHost: a\r\nX-Evil: \x9b2J\r\n\r\n".encode("latin-1"))
        [row] = server.rows(1, "--handler-state", "wait")
        for words in (
            ["ps"],
            ["ps", "--json"],
            ["show", row["id"]],
            ["show", row["id"], "--json"],
            ["ps", "--by", "peer"],
        ):
            done = server.run(*words)
            assert done.code == 0
            assert all(each.isprintable() or each == "\n" for each in done.out), words
        assert "y" * 200 in server.run("ps").out
        on_terminal = in_terminal("ps", "--control", server.path)
        assert [line for line in on_terminal if shown.width_of(line) > 80] == []
        assert on_terminal[1].endswith("…")
        client.reset()
        server.signal(signal.SIGINT)
        assert server.wait() == 0


def in_terminal(*words: str) -> list[str]:
    """Run a command in a terminal of 80 columns. Return the lines that it prints."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with open(ours, "rb", closefd=True) as screen:
        command = [sys.executable, "-m", "reqtable", *words]
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        with Started(command, cwd=ROOT, stdout=theirs, stderr=theirs, env=environment) as process:
            os.close(theirs)
            data = b""
            with contextlib.suppress(OSError):  # the end, in a terminal
                while more := screen.read1(65_536):  # type: ignore[attr-defined]
                    data += more
        assert process.returncode == 0, data
    return data.decode().splitlines()


def test_many_rows_are_printed_as_they_come_and_a_reader_may_leave(server: Controlled) -> None:
    clients = [Client(server.address) for _ in range(1200)]
    try:
        server.rows(1200)
        lines = server.run("ps").out.splitlines()
        assert len({line.index("Lines") for line in lines[1:]}) == 1
        assert len(lines) == 1201
        command = f"{sys.executable} -m reqtable ps --control {server.path} | head -n 2"
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
        assert (len(done.stdout.splitlines()), done.stderr) == (2, "")
    finally:
        for client in clients:
            client.close()


# -- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_each_shell(shell: str) -> None:
    done = command("completion", shell)
    assert done.code == 0
    assert f"_REQTABLE_COMPLETE={shell}_complete" in done.out


def completed(*words: str, path: str | None = None) -> list[str]:
    """Return what bash completes after these words. Nothing may come in between on standard error."""
    environment = {
        **os.environ,
        "_REQTABLE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["reqtable", *words]),
        "COMP_CWORD": str(len(words)),
        **({} if path is None else {"REQTABLE_CONTROL": path}),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from reqtable.run.cli import main; main()"],
        cwd=ROOT, capture_output=True, text=True, env=environment, timeout=WAIT_S,
    )  # fmt: skip
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_the_shell_completes_commands_options_and_ids(server: Controlled) -> None:
    with Client(server.address):
        [row] = server.rows(1)
        assert completed("wo") == ["workers"]
        assert completed("ps", "--han") == ["--handler", "--handler-state"]
        for name in ("kill", "show"):
            assert completed(name, str(row["id"])[:1], path=server.path) == [str(row["id"])]
    assert completed("drain", "--worker", "", path=server.path) == [str(server.pid)]
    assert "limits.idle_timeout_s=" in completed("set", "limits.id", path=server.path)
    server.process.kill()
    server.wait()
    assert completed("show", "", path=server.path) == []


@pytest.mark.parametrize(
    ("words", "completes"),
    [
        ("ps --state rea", ["READING", "READY"]),
        ("ps --policy gr", ["greenlet"]),
        ("ps --sort ag", ["age"]),
        ("ps --by handler_", ["handler_state"]),
        ("ps --columns id,pe", ["id,peer"]),
        ("watch --kinds begun,en", ["begun,ended"]),
        ("log-level reqtable d", ["debug"]),
        ("log-level reqtable.a", ["reqtable.access", "reqtable.access.http"]),
    ],
)
def test_the_shell_completes_words_that_are_known(words: str, completes: list[str]) -> None:
    assert completed(*words.split()) == completes


# -- the pages ---------------------------------------------------------------------------------------------------------


def shown_on(*pages: str) -> list[Command]:
    """Return the commands of how-to pages whose output is shown."""
    found = [block for page in pages for block in blocks(f"docs/how-to/{page}.md", "console")]
    return [each for block in found for each in commands(block) if each.output]


def shape(text: str) -> list[str]:
    """Return the lines without what differs from run to run: numbers, places, the width of columns."""
    text = re.sub(r'File "[^"]*"|\S*/(notes|report|sticking)\.py|\S*reqtable.toml|0x[0-9a-f]+', "0", text)
    text = re.sub(r"\d[\d.]*(e-?\d+)?(ms|s|m\d\ds|[KMG])?", "0", text)
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_pages_show_what_the_commands_print(tmp_path: Path) -> None:
    path = tmp_path / "reqtable.toml"
    path.write_text("[limits]\nentries_max = 50000\n")
    with (
        Controlled("--config", str(path), handler="examples/notes.py:Notes") as server,
        contextlib.ExitStack() as stack,
    ):
        sent = 0
        for count, (source, data) in enumerate(
            [
                ("127.0.0.1", b"put 10\nhal"),
                ("127.0.0.2", b"put 100000\n" + b"x" * 70_000),
                ("127.0.0.2", b""),
                ("127.0.0.2", b""),
                ("127.0.0.3", b""),
            ]
        ):
            client = socket.create_connection(server.address, WAIT_S, (source, 0))
            stack.enter_context(client)
            client.sendall(data)
            sent += len(data)
            server.rows(count + 1)
            # the next one comes later than this one's data, so that the order by idle time is known
            until(lambda sent=sent: sum(each["bytes_in"] for each in server.json("ps")) == sent)
        until(lambda: len(server.json("ps", "--handler-state", "body")) == 2)
        path.write_text("[limits]\nentries_max = 20000\n")
        assert server.run("reload").code == 0
        for each in shown_on("find-a-stuck-request", "see-who-uses-the-server", "read-the-figures"):
            if each.words == ("reqtable", "stats"):
                until(lambda: server.json("stats")["servers"][0]["finished"]["cancelled"] == 1)
            assert shape(server.run(*each.words[1:]).out) == shape(each.output), each.words
        server.signal(signal.SIGINT)
        assert server.wait() == 0


def test_the_page_shows_a_worker_that_is_stuck(workers: Controlled) -> None:
    with Client(workers.address) as held:
        held.send(b"hold\n")
        until(lambda: "STUCK" in workers.run("workers").out)
        [command] = shown_on("find-a-stuck-worker")
        out = "\n".join(shape(workers.run(*command.words[1:]).out))
        for part in "\n".join(shape(command.output)).split("…"):
            rows = part.strip()
            if rows.startswith("worker"):  # either worker may be the stuck one
                assert sorted(rows.splitlines()) == sorted(out.splitlines()[: rows.count("\n") + 1])
            else:
                assert rows in out
        [stuck] = [each["worker"] for each in workers.json("workers") if each["is_stuck"]]
        os.kill(stuck, signal.SIGKILL)


def test_the_page_shows_workers_that_serve(workers: Controlled) -> None:
    [command] = shown_on("run-several-workers")
    until(lambda: shape(workers.run(*command.words[1:]).out) == shape(command.output))


def test_the_readme_shows_its_server(tmp_path: Path) -> None:
    write_files("README.md", tmp_path)
    serving, looking = blocks("README.md", "console")
    _, talk = commands(serving)
    *typed, answer = talk.output.splitlines(keepends=True)
    with Controlled(handler=f"{tmp_path}/notes.py:Notes") as server, Client(server.address) as client:
        assert client.send("".join(typed).encode()).line() == answer.encode()
        (ps,) = commands(looking)
        until(lambda: shape(server.run(*ps.words[1:]).out) == shape(ps.output))


def test_the_page_shows_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Controlled(handler=str(ROOT / "examples" / "notes.py") + ":Notes") as server, Client(server.address) as client:
        client.send(b"put 10\nhal")
        until(lambda: server.rows(1)[0]["buffered_in"] == 3)
        save, record = shown_on("save-a-request")
        assert shape(server.run(*save.words[1:]).out) == shape(save.output)
        lines = iter(shape(command(*record.words[1:]).out))
        assert [each for each in shape(record.output) if each != "…" and each not in lines] == []


def test_the_pages_show_every_command_that_asks_a_server() -> None:
    asking = {name for name, each in cli.commands.items() if any(option.name == "as_json" for option in each.params)}
    assert len(asking) == 14
    typed = {
        each.words[1]
        for page in PAGES
        for block in blocks(page, "console", "sh")
        for each in commands(block)
        if each.words[0] == "reqtable"
    }
    assert asking - typed == set()
