"""What an operator sees of movable requests: records of them, what could not move, and a restart as it goes."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import random
import socket
import stat
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

import reqtable
from reqtable import Config, ControlOptions, StateRequestHandler, exactly, line, state
from reqtable.control.joining import summed_taken
from reqtable.run.cli import main
from reqtable.run.commands.restart import news, restart_text, taken_text
from reqtable.run.operated import OPERATORS
from reqtable.server.operator import Operator as EngineOperator
from reqtable.table import plain
from reqtable.table.describing import HEAD_BYTES
from reqtable.table.errors import ReqtableError
from reqtable.table.saving import FORMAT, head_of
from tests.control import Operator, UnixConnection
from tests.pages import blocks, commands
from tests.support import Client, serving
from tests.test_control import clients
from tests.test_control_commands import Controlled, Done, command

UNDER_WAY = "a restart is under way: reqtable stats says how far it is"
LOCK = "its field 'odd': a _thread.lock is no plain data"


@dataclass
class Place:
    """Is a class of the program, which `reqtable record` does not import."""

    x: int
    name: str


class Store(StateRequestHandler):
    """Waits for `put N` and then for N bytes. `odd` has it hold what is no data."""

    key: str = ""
    at: Place | None = None
    odd: Any = None

    @state(line())
    def command(self, item: bytes) -> Any:
        if item.startswith(b"put "):
            self.key, self.at = item.decode().strip(), Place(7, "\x1b]0;title\x07")
            return self.body, exactly(int(item.split()[1]))
        if item.startswith(b"odd"):
            self.odd = threading.Lock()
        self.send(item)
        return self.command

    @state(exactly(1))
    def body(self, data: bytes) -> Any:
        return self.command


@contextlib.contextmanager
def controlled(folder: Path, restart: Any = None, handler: Any = Store) -> Iterator[tuple[Any, Operator]]:
    """Serve `handler` with a control socket, and with what restarts the program."""
    path = str(folder / "c.sock")
    server = reqtable.TCPServer(("127.0.0.1", 0), handler, config=Config(control=ControlOptions(socket=path)))
    if restart is not None:
        own = OPERATORS[server.engine] = EngineOperator(server.engine)
        own.restart = restart
    with serving(server):
        yield server, Operator(path)


def run(operator: Operator, *words: object) -> Done:
    return command(*words, "--control", operator.path)


def refusal(operator: Operator, target: str, *words: Any) -> tuple[int, str]:
    """Return the status and the error of an answer."""
    status, body = operator.ask(target, *words)
    return status, json.loads(body)["error"]


@contextlib.contextmanager
def asked(path: str, method: str, target: str, body: bytes | None = None) -> Iterator[http.client.HTTPResponse]:
    """Ask, and read the answer as it comes."""
    with contextlib.closing(UnixConnection(path)) as connection:
        connection.request(method, target, body)
        with connection.getresponse() as answer:
            yield answer


def an_id(operator: Operator, handler_state: str) -> int:
    [row] = operator.rows_once(lambda rows: len(rows) == 1, f"?handler_state={handler_state}")
    return int(row["id"])


# -- records ----------------------------------------------------------------------------------------------------------


def a_record(folder: Path, operator: Operator, server: Any) -> tuple[Path, int]:
    """Save the record of a request that has unread input."""
    with clients(server, 1) as [client]:
        client.send(b"put 100000\n\x1b[31m" + b"x" * 1000)
        [row] = operator.rows_once(lambda rows: rows and rows[0]["buffered_in"] == 1005)
        file = folder / "one.record"
        done = run(operator, "show", row["id"], "--save", file)
        size = file.stat().st_size
        assert done == (0, f"the record of request {row['id']} is in {file}: {size} bytes\n", "")
        assert operator.get(f"/v1/requests/{row['id']}")["state"] == "READING"  # it goes on
    return file, row["id"]


def test_a_request_is_saved_in_a_file_for_its_owner_alone_and_no_file_is_overwritten(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator):
        file, id = a_record(tmp_path, operator, server)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        before = file.read_bytes()
        assert head_of(before).id == id
        with clients(server, 1):
            other = an_id(operator, "command")
            done = run(operator, "show", other, "--save", file)
            assert done == (1, "", f"reqtable: {file} is there already: name another file, or remove it\n")
            assert file.read_bytes() == before
            done = run(operator, "show", other, "--save", tmp_path / "none" / "f")
            assert done == (1, "", f"reqtable: {tmp_path}/none/f: No such file or directory\n")
            done = run(operator, "show", other, "--save", tmp_path / "two.record", "--json")
            size = (tmp_path / "two.record").stat().st_size
            assert json.loads(done.out) == {"id": other, "file": f"{tmp_path}/two.record", "bytes": size}


def test_another_table_goes_on_with_a_record(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 1) as [client]:
        client.send(b"put 5\nabc")
        [row] = operator.rows_once(lambda rows: rows and rows[0]["buffered_in"] == 3)
        status, data = operator.ask(f"/v1/requests/{row['id']}/record")
        assert status == 200
    ours, theirs = socket.socketpair()
    with reqtable.TCPServer(("127.0.0.1", 0), Store) as other, theirs:
        assert other.table.restore([data], [ours]) == [row["id"]]
        [taken] = other.table.snapshot()
        assert (taken["handler_state"], taken["buffered_in"], taken["moves"]) == ("body", 3, 1)


def test_what_can_not_be_recorded_is_refused_with_the_reason(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 1) as [client]:
        client.ask(b"odd\n")
        id = an_id(operator, "command")
        reason = f"request {id} of Store can't be recorded now: {LOCK}"
        assert refusal(operator, f"/v1/requests/{id}/record") == (409, reason)
        assert run(operator, "show", id, "--save", tmp_path / "f") == (1, "", f"reqtable: {reason}\n")
        assert not (tmp_path / "f").exists()
        assert refusal(operator, "/v1/requests/99/record") == (404, "there is no such request")
        gone = "reqtable: there is no request 99: it has ended, or never was\n"
        assert run(operator, "show", 99, "--save", tmp_path / "f") == (1, "", gone)


def test_a_record_is_printed_without_the_program_and_without_what_moves_the_cursor(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator):
        file, id = a_record(tmp_path, operator, server)
    done = command("record", file)
    assert (done.code, done.err) == (0, "")
    assert done.out.replace("\n", "").isprintable()
    lines = [" ".join(each.split()) for each in done.out.splitlines()]
    address = head_of(file.read_bytes()).server
    expected = [
        f"format {FORMAT}",
        f"id {id}",
        f"server {address}",
        "handler Store",
        "version 1",
        "handler_state body",
        "state READING",
        "waits_for exactly(n=100000)",
        "bytes_out 0",
        "moves 0",
        "end_told no",
        "unsent -",
        "fields",
        "key 'put 100000'",
        f"at {__name__}:Place(x=7, name='\\x1b]0;title\\x07')",
        "odd None",
    ]
    assert [each for each in lines if each in expected] == expected
    [unread] = [each for each in lines if each.startswith("unread '")]
    assert unread == f"unread '\\x1b[31m{'x' * (HEAD_BYTES - 5)}' and more, 1005 bytes"
    found = json.loads(command("record", file, "--json").out)
    assert found["unread"] == {"bytes": 1005, "head": "\x1b[31m" + "x" * (HEAD_BYTES - 5)}
    assert found["fields"]["key"] == "'put 100000'"
    assert found["deadline_s"] > 0
    assert found["connections"] == found["files"] == []


def test_objects_are_described_and_never_made() -> None:
    data = plain.encode([Place(1, "a"), reqtable.State.READING, {(1, 2): {Place(2, "b").name}}, 2**70, "\udc80"])
    place, member, others, large, text = plain.describe(data)
    assert repr(place) == f"{__name__}:Place(x=1, name='a')"
    assert repr(member) == "reqtable.table.states:State.READING"
    assert (others, large, text) == ({(1, 2): {"b"}}, 2**70, "\udc80")
    unknown = msgspec.msgpack.encode({"!": "object", "c": "os:Anything", "v": {"a": [1]}})
    assert repr(plain.describe(unknown)) == "os:Anything(a=[1])"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not plain data: DecodeError: Input data was truncated"),
        (b"GIF89a", "not plain data: "),
        (msgspec.msgpack.encode({"a": 1}), f"not a record of format {FORMAT}"),
        (msgspec.msgpack.encode(["\x1b[31m" * 100, 1]), f"not a record of format {FORMAT}, but of format "),
        (msgspec.msgpack.encode([FORMAT]), f"not a record of format {FORMAT}: its head has other values"),
        (msgspec.msgpack.encode([FORMAT + 1, 2]), f"not a record of format {FORMAT}, but of format {FORMAT + 1}"),
        (b"\x91" * 100_000 + b"\xc0", "not plain data: "),
        (msgspec.msgpack.encode({"!": ["\x1b[31m"] * 10_000, "v": 1}), "not plain data: TypeError: "),
    ],
    ids=["empty", "picture", "mapping", "list", "cut", "newer", "deep", "kind"],
)
def test_what_is_no_record_is_one_line_and_status_1(tmp_path: Path, data: bytes, says: str) -> None:
    file = tmp_path / "f"
    file.write_bytes(data)
    done = command("record", file)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"reqtable: {file}: {says}")
    assert len(done.err) < 500
    assert done.err.count("\n") == 1
    assert done.err.rstrip("\n").isprintable()


def test_a_file_that_can_not_be_read_is_one_line(tmp_path: Path) -> None:
    assert command("record", tmp_path / "f") == (1, "", f"reqtable: {tmp_path}/f: No such file or directory\n")
    assert command("record", tmp_path) == (1, "", f"reqtable: {tmp_path}: Is a directory\n")


def test_a_damaged_record_is_printed_or_refused_in_one_line(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator):
        file, _ = a_record(tmp_path, operator, server)
    whole = file.read_bytes()
    chance = random.Random(20)
    codes: Counter[int] = Counter()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice([0, 7, 27, 0x80, 0x91, 0xC0, 0xCB, chance.randrange(256)])
        file.write_bytes(bytes(data[: chance.choice([len(data), len(data), chance.randrange(len(data))])]))
        for words in (("record", file), ("record", file, "--json")):
            done = command(*words)
            codes[done.code] += 1
            assert (done.out + done.err).replace("\n", "").isprintable()
            assert (done.err.count("\n"), done.out == "") == ((1, True) if done.code == 1 else (0, False))
    assert set(codes) == {0, 1}


# -- what could not move ----------------------------------------------------------------------------------------------


def test_operators_see_what_could_not_move_and_why(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 3) as [one, *_]:
        one.ask(b"odd\n")
        operator.rows_once(lambda rows: len(rows) == 3)
        rows = operator.get("/v1/requests?also=immovable&sort=steps")
        assert [each["immovable"] for each in rows] == [LOCK, None, None]
        assert operator.get(f"/v1/requests/{rows[0]['id']}")["immovable"] == LOCK
        other = operator.get(f"/v1/requests/{rows[1]['id']}")
        assert (other["immovable"], other["attempt"], other["moves"]) == (None, 0, 0)
        assert "immovable" not in operator.get("/v1/requests")[0]
        groups = operator.get("/v1/requests?by=immovable")
        assert {each["immovable"]: each["count"] for each in groups} == {None: 2, LOCK: 1}
        assert refusal(operator, "/v1/requests?also=lock") == (400, "also=lock: there is immovable")
        done = run(operator, "ps", "--by", "immovable")
        assert [each.split("  ")[0].strip() for each in done.out.splitlines()] == ["immovable", "-", LOCK]
        done = run(operator, "ps", "--columns", "steps,immovable", "--sort", "steps", "--limit", 1)
        assert [" ".join(each.split()) for each in done.out.splitlines()] == ["steps immovable", f"2 {LOCK}"]


def test_a_bulk_cancel_is_not_widened_by_what_only_adds_to_rows(tmp_path: Path) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 1):
        operator.rows_once(lambda rows: len(rows) == 1)
        status, body = operator.ask("/v1/requests/cancel", "POST", {"also": "immovable"})
        assert status == 400, body
        assert len(operator.get("/v1/requests")) == 1


# -- a restart as it goes ---------------------------------------------------------------------------------------------


def restart_at(phase: str, **given: Any) -> dict[str, Any]:
    """Return what a restart shows."""
    found = {
        "phase": phase,
        "check": phase == "checked",
        "pid": 4712,
        "moved": 0,
        "refused": [],
        "left": 5,
        "immovable": {},
    }
    return found | {"ago_s": 2.0, "took_s": 0.5, "longest_freeze_s": 0.0414, "problem": None} | given


class Staged:
    """Stands in for what restarts a program. It goes on each time that somebody looks."""

    def __init__(self, *stages: Mapping[str, Any]) -> None:
        self._stages = list(stages)
        self.counts: Counter[str] = Counter(done=0, failed=0)
        self.begun: list[bool] = []
        self.on_begin: Callable[[], Any] = bool
        self._on_outcome: Callable[[Mapping[str, Any]], Any] = bool

    def begin(self, only_checks: bool = False, on_outcome: Callable[[Mapping[str, Any]], Any] = bool) -> None:
        if self.begun:
            raise ReqtableError(UNDER_WAY)
        self.begun.append(only_checks)
        self.on_begin()
        self._on_outcome = on_outcome

    def shown(self) -> Mapping[str, Any] | None:
        if not self.begun:
            return None
        if len(self._stages) > 1:
            stage = self._stages.pop(0)
            if len(self._stages) == 1:
                self._on_outcome(self._stages[0])
            return stage
        return self._stages[0]

    def stop(self) -> None:
        raise AssertionError("nobody has ended it")


MOVED = restart_at("draining", moved=4988, left=12, immovable={"it is red": 2, "its connection is encrypted": 10})


def test_a_restart_says_how_far_it_is_and_last_how_it_went(tmp_path: Path) -> None:
    stages = (restart_at("starting"), restart_at("moving", moved=2, left=3), MOVED)
    with controlled(tmp_path, Staged(*stages)) as (_, operator):
        with asked(operator.path, "POST", "/v1/restart?format=ndjson", b'{"check": false}') as answer:
            assert answer.getheader("Content-Type") == "application/x-ndjson"
            lines = [json.loads(each) for each in answer.read().splitlines()]
        assert lines == list(stages)
        assert refusal(operator, "/v1/restart", "POST", {}) == (409, UNDER_WAY)
        assert operator.get("/v1/stats")["restart"] == MOVED


def test_without_lines_the_answer_is_only_how_it_went(tmp_path: Path) -> None:
    restart = Staged(restart_at("starting"), MOVED)
    with controlled(tmp_path, restart) as (_, operator):
        assert operator.post("/v1/restart", {"check": True}) == MOVED
        assert restart.begun == [True]


def test_the_command_prints_what_has_moved_and_what_ends_in_the_old_process(tmp_path: Path) -> None:
    with controlled(tmp_path, Staged(restart_at("starting"), MOVED)) as (_, operator):
        done = run(operator, "restart")
        assert (done.code, done.err) == (0, "")
        assert done.out.splitlines() == [
            "4988 requests moved to process 4712 in 500ms, frozen 41.4ms at most",
            "these can't move now; the old process ends them within 30 s (drain_timeout_s), or moves them later:",
            "  10  its connection is encrypted",
            "   2  it is red",
            "one that waits for input sees end of file after 1 s of silence (drain_idle_s); a call goes on",
        ]


def test_the_page_shows_what_a_restart_prints(tmp_path: Path) -> None:
    check, restart = (
        each for block in blocks("docs/how-to/deploy-without-a-cut.md", "console") for each in commands(block)
    )
    reasons = {"its connection is encrypted": 12}
    outcomes = {
        check: restart_at("checked", left=5000, immovable=reasons),
        restart: restart_at(
            "draining", moved=4988, left=12, immovable=reasons, pid=4711, took_s=0.93, longest_freeze_s=0.041
        ),
    }
    for typed, outcome in outcomes.items():
        with controlled(tmp_path, Staged(restart_at("starting"), outcome)) as (_, operator):
            assert run(operator, *typed.words[1:]).out == typed.output


def test_the_command_says_what_the_new_code_has_refused(tmp_path: Path) -> None:
    outcome = restart_at("draining", moved=1, left=1, refused=["KeyError: \x1b[31m"])
    with controlled(tmp_path, Staged(restart_at("starting"), outcome)) as (_, operator):
        assert run(operator, "restart").out.splitlines()[1:] == [
            "the new code has refused these, so they end in the old process:",
            "  KeyError: \\x1b[31m",
        ]


def test_a_check_counts_each_reason(tmp_path: Path) -> None:
    outcome = restart_at("checked", left=5, immovable={"it is red": 2})
    restart = Staged(restart_at("rehearsing"), outcome)
    with controlled(tmp_path, restart) as (_, operator):
        assert run(operator, "set", "limits.drain_idle_s=5", "limits.drain_timeout_s=90").code == 0
        assert run(operator, "restart", "--check").out.splitlines() == [
            "the new code starts, and can go on with 3 requests",
            "these can't move now; a restart would end them within 90 s (drain_timeout_s), or move them later:",
            "  2  it is red",
            "one that waits for input sees end of file after 5 s of silence (drain_idle_s); a call goes on",
        ]
    assert restart.begun == [True]


def test_a_drain_may_have_no_limit(tmp_path: Path) -> None:
    outcome = restart_at("checked", left=5, immovable={"it is red": 2})
    with controlled(tmp_path, Staged(restart_at("rehearsing"), outcome)) as (_, operator):
        assert run(operator, "set", "limits.drain_timeout_s=inf", "limits.drain_idle_s=inf").code == 0
        assert run(operator, "restart", "--check").out.splitlines()[1:] == [
            "these can't move now; a restart would end them when they are done, or move them later:",
            "  2  it is red",
        ]


def test_a_restart_that_fails_is_status_1_with_the_reason(tmp_path: Path) -> None:
    outcome = restart_at("failed", problem="the new process exited\n\x1b[31mwith status 2")
    why = "reqtable: not restarted, the old process goes on: the new process exited\\n\\x1b[31mwith status 2\n"
    with controlled(tmp_path, Staged(restart_at("starting"), outcome)) as (_, operator):
        assert run(operator, "restart") == (1, "", why)
        assert run(operator, "restart") == (1, "", f"reqtable: {UNDER_WAY}\n")
        stats = run(operator, "stats").out.splitlines()
        assert "restart      failed 2.0s ago: the new process exited\\n\\x1b[31mwith status 2" in stats
    (tmp_path / "other").mkdir()
    with controlled(tmp_path / "other", Staged(restart_at("starting"), outcome)) as (_, operator):
        done = run(operator, "restart", "--json")
        assert (done.code, json.loads(done.out), done.err) == (1, outcome, why)


def test_a_program_that_serves_by_itself_says_why_it_can_not_be_restarted(tmp_path: Path) -> None:
    why = (
        "this program can't be restarted from here: "
        "that needs serve(), reqtable serve, http or wsgi, and the package msgspec"
    )
    with controlled(tmp_path) as (_, operator):
        assert refusal(operator, "/v1/restart", "POST", {}) == (409, why)
        assert run(operator, "restart") == (1, "", f"reqtable: {why}\n")
        assert operator.get("/v1/stats")["restart"] is None


def test_a_server_that_ends_before_the_restart_is_known_is_status_3(tmp_path: Path) -> None:
    restart = Staged(restart_at("starting"))  # it never says how it went
    with controlled(tmp_path, restart) as (server, operator):
        restart.on_begin = server.engine.stop
        done = run(operator, "restart")
    assert (done.code, done.err) == (3, f"reqtable: {operator.path}: the server has ended while it answered\n")


class Terminal(io.StringIO):
    """Stands for standard error on a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_line_shows_how_far_it_is_and_goes_away(tmp_path: Path) -> None:
    stages = (restart_at("starting"), restart_at("moving", moved=2, left=3), MOVED)
    terminal = Terminal()
    with (
        controlled(tmp_path, Staged(*stages)) as (_, operator),
        contextlib.redirect_stderr(terminal),
        contextlib.redirect_stdout(io.StringIO()) as out,
        pytest.raises(SystemExit) as ended,
    ):
        main(["restart", "--control", operator.path])
    assert ended.value.code == 0
    clear = "\x1b[2K\r"
    assert terminal.getvalue().split(clear) == ["", *map(restart_text, stages), ""]
    assert out.getvalue().startswith("4988 requests moved to process 4712")


def test_an_operator_who_leaves_ends_no_restart(tmp_path: Path) -> None:
    restart = Staged(restart_at("starting"))
    with controlled(tmp_path, restart) as (_, operator):
        with asked(operator.path, "POST", "/v1/restart?format=ndjson", b"{}") as answer:
            assert json.loads(answer.readline()) == restart_at("starting")
        assert operator.get("/v1/stats")["restart"] == restart_at("starting")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (restart_at("starting"), "process 4712 begins"),
        (restart_at("rehearsing"), "process 4712 tries the requests"),
        (restart_at("rehearsed"), "process 4712 can go on with the requests"),
        (restart_at("failed", check=True, problem="no luck"), "the check has failed 2.0s ago: no luck"),
        (restart_at("moving", moved=3250, left=1750), "3250 of 5000 requests moved to process 4712"),
        (restart_at("listening"), "process 4712 begins to accept"),
        (
            restart_at("draining", moved=4, left=1),
            "4 of 5 requests moved to process 4712, which serves; 1 end here",
        ),
        (restart_at("failed", problem="it\nis so"), "failed 2.0s ago: it\\nis so"),
        (restart_at("checked"), "was only a check, 2.0s ago: the new code can go on"),
    ],
    ids=lambda value: value["phase"] if isinstance(value, dict) else None,
)
def test_each_phase_is_one_line(found: dict[str, Any], says: str) -> None:
    assert restart_text(found) == says


def test_a_live_screen_shows_a_restart_only_while_that_is_news() -> None:
    taken = {"moved": 3, "giving": 0, "longest_freeze_s": 0.004, "ago_s": 5.0}
    assert news({"restart": None, "taken": None}) is None
    for over in (restart_at("checked"), restart_at("failed", check=True)):
        assert news({"restart": over, "taken": None}) is None
    assert news({"restart": restart_at("moving"), "taken": taken}) == restart_text(restart_at("moving"))
    assert news({"restart": None, "taken": taken}) == "3 requests taken over 5.0s ago, frozen 4ms at most"
    assert news({"restart": None, "taken": taken | {"ago_s": 61.0}}) is None
    draining = taken | {"ago_s": 61.0, "giving": 1}
    assert news({"restart": None, "taken": draining}) == taken_text(draining)
    assert taken_text(draining).endswith("; the process before still ends requests")


def test_what_workers_have_taken_is_added_up() -> None:
    one = {"moved": 3, "giving": 1, "longest_freeze_s": 0.004, "ago_s": 5.0}
    other = {"moved": 4, "giving": 0, "longest_freeze_s": 0.002, "ago_s": 5.5}
    whole = {"moved": 7, "giving": 1, "longest_freeze_s": 0.004, "ago_s": 5.5}
    assert summed_taken([one, None, other]) == whole
    assert summed_taken([None]) is None


# -- real restarts ----------------------------------------------------------------------------------------------------


def figures(server: Controlled, *names: str) -> dict[str, float]:
    text = Operator(server.path).ask("/metrics")[1].decode()
    values = dict(each.rsplit(" ", 1) for each in text.splitlines() if not each.startswith("#"))
    return {name: float(values[name]) for name in names}


def events_of(answer: http.client.HTTPResponse, count: int) -> Iterator[dict[str, Any]]:
    """Yield so many events."""
    while count:
        field, _, value = answer.readline().decode().partition(": ")
        if field == "data":
            count -= 1
            yield json.loads(value)


@pytest.mark.parametrize("workers", [None, 2], ids=["alone", "workers"])
def test_a_restart_is_seen_from_both_sides(workers: int | None) -> None:
    with Controlled(workers=workers) as server, Client(server.address) as one, Client(server.address) as two:
        if workers:
            server.wait_for(r"2 of 2 workers are ready")
        one.ask(b"a line\n")
        two.send(b"half")
        rows = server.rows(2)
        assert [each["moves"] for each in rows] == [0, 0]
        assert server.json("stats")["restart"] is server.json("stats")["taken"] is None
        assert server.json("restart", "--check")["phase"] == "checked"
        assert server.json("stats")["restart"]["phase"] == "checked"
        with asked(server.path, "GET", "/v1/events?kinds=state,ended") as events:
            outcome = server.json("restart")
            assert (outcome["moved"], outcome["immovable"], outcome["problem"]) == (2, {}, None)
            found = list(events_of(events, 4))
        assert Counter((each["event"], each.get("to"), each.get("ending")) for each in found) == {
            ("state", "MOVING", None): 2,
            ("ended", None, "moved"): 2,
        }
        assert [each["moves"] for each in server.rows(2)] == [1, 1]
        assert [each.split()[-1] for each in server.run("ps", "--columns", "id,moves").out.splitlines()] == [
            "moves",
            "1",
            "1",
        ]
        with tempfile.TemporaryDirectory() as folder:
            [first, _] = server.rows(2)
            done = server.run("show", first["id"], "--save", f"{folder}/f")
            assert (done.code, done.err) == (0, "")
            assert json.loads(command("record", f"{folder}/f", "--json").out)["moves"] == 1
        taken = server.json("stats")["taken"]
        assert taken["moved"] == 2
        assert 0 < taken["longest_freeze_s"] < 60
        assert figures(server, 'reqtable_restarts_total{result="done"}', "reqtable_requests_taken_total") == {
            'reqtable_restarts_total{result="done"}': 1,
            "reqtable_requests_taken_total": 2,
        }
        assert one.ask(b"more\n") == b"more\n"
        assert server.run("drain").code == 0
