"""`reqtable top` as a program: in a terminal that the test reads, and in a pipe, with a real server."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
import pytest

from tests.service import WAIT_S, Service
from tests.support import Client, Started, lines_before
from tests.test_control_commands import Controlled, command, controlled, is_ended, port_of

ROOT = Path(__file__).parent.parent
RUN = "from reqtable.run.cli import main; main()"
INTERVAL_S = 0.1
LINE_KEYS = "Enter open"  # on the last line of the screen with the rows


class Terminal:
    """Runs `reqtable top` in a terminal of its own, and shows what is on the screen."""

    def __init__(self, path: str, *words: str, program: str = RUN, columns: int = 80, lines: int = 24) -> None:
        self._ours, self.theirs = pty.openpty()
        termios.tcsetwinsize(self.theirs, (lines, columns))
        self.modes = termios.tcgetattr(self.theirs)
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.sent = b""  # everything that the program has written
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "top", "--control", path, "--interval", str(INTERVAL_S), *words],
            cwd=ROOT, stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, start_new_session=True,
            env={**environment, "TERM": "xterm-256color", "PYTHON_COLORS": "0"},
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        self.close()
        os.close(self.theirs)

    def close(self) -> None:
        """Take the terminal away."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    def press(self, *keys: str) -> Terminal:
        for key in keys:
            os.write(self._ours, key.encode())
        return self

    def until(self, condition: Callable[[], object]) -> Terminal:
        """Read what the program writes until a condition holds."""
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end, "\n".join(self.lines)
            self._read(end - time.monotonic())
        return self

    def shows(self, *patterns: str) -> Terminal:
        """Wait until each pattern is in some line of the screen."""
        return self.until(lambda: all(any(re.search(each, line) for line in self.lines) for each in patterns))

    def hides(self, pattern: str) -> Terminal:
        """Wait until a pattern is in no line of the screen."""
        return self.until(lambda: not any(re.search(pattern, line) for line in self.lines))

    def resize(self, columns: int, lines: int) -> None:
        termios.tcsetwinsize(self.theirs, (lines, columns))
        self.screen.resize(lines, columns)
        self.process.send_signal(signal.SIGWINCH)

    def ids(self) -> list[int]:
        """Return the ids of the rows on the screen, in their order."""
        return [int(found[1]) for line in self.lines if (found := re.match(r" *(\d+)  [A-Z] ", line))]

    def ends(self) -> int:
        """Wait for the end of the program. Returns its exit code. The terminal must be as before."""
        end = time.monotonic() + WAIT_S
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.01)
        code = self.process.wait(0)
        while self._read(0):
            pass
        assert termios.tcgetattr(self.theirs) == self.modes
        assert self.sent.count(b"\x1b[?1049h") == self.sent.count(b"\x1b[?1049l") == 1, "the other screen was left"
        assert self.sent.rindex(b"\x1b[?25h") > self.sent.rindex(b"\x1b[?25l"), "the cursor is shown"
        return code

    def _read(self, within_s: float) -> bool:
        if not select.select([self._ours], [], [], max(0.0, within_s))[0]:
            return False
        data = os.read(self._ours, 65_536)
        self.sent += data
        self._stream.feed(data)
        return True


@pytest.fixture
def server() -> Iterator[Controlled]:
    with controlled() as made:
        yield made


@contextlib.contextmanager
def clients(server: Controlled, count: int) -> Iterator[dict[int, Client]]:
    """Connect clients; the nth has sent n lines. Yields them by the ids of their requests, the oldest first."""
    with contextlib.ExitStack() as stack:
        made = {}
        for number in range(1, count + 1):
            client = stack.enter_context(Client(server.address))
            for _ in range(number):
                client.ask(b"a line\n")
            made[f"127.0.0.1:{port_of(client)}"] = client
        yield {row["id"]: made[row["peer"]] for row in server.rows(count, "--sort", "id")}


def test_rows_are_shown_sorted_filtered_and_searched(server: Controlled) -> None:
    with clients(server, 3) as made, Terminal(server.path) as top:
        first, second, third = made
        top.until(lambda: top.ids() == [first, second, third])
        top.shows("^reqtable top  Lines 127.0.0.1:", "^requests  3, at most", "^states +R reading 3", "^sort age")
        top.shows("^a second  in 0  out 0   accepted 0.0", "^loop +busy \\d", LINE_KEYS)
        top.press("n").shows("^sort in").until(lambda: top.ids() == [third, second, first])
        made[first].send(b"stick\n")
        top.press("f", "handler_state=stuck", "\r").shows("handler_state=stuck").until(lambda: top.ids() == [first])
        top.press("f", "\x15", "\r").until(lambda: len(top.ids()) == 3)
        top.press("/", str(port_of(made[second])), "\r").shows("with ").until(lambda: top.ids() == [second])
        top.press("\x1b").hides("with ").until(lambda: len(top.ids()) == 3)
        assert top.press("q").ends() == 0


def test_one_request_is_opened_and_killed_and_only_it(server: Controlled) -> None:
    with clients(server, 3) as made, Terminal(server.path) as top:
        first, second, third = made
        made[second].send(b"half a \x1b[31m[red]line")
        top.until(lambda: top.ids() == [first, second, third])
        top.press("j", "\r").shows(f"^request {second}$", r"input_head +'half a \\x1b\[31m\[red\]line'", "^  count +2")
        top.press("K").shows(rf"^End request {second} \(127.0.0.1:{port_of(made[second])}, Lines at asked\)\? y/n")
        top.press("n").shows("^q back")
        assert len(server.rows(3)) == 3
        top.press("K", "y").shows(f"^request {second}  has ended", f"^ended request {second}")
        assert is_ended(made[second])
        top.press("q").until(lambda: top.ids() == [first, third])
        for each in (first, third):
            assert made[each].ask(b"still here\n") == b"still here\n"
        assert top.press("\x03").ends() == 0


def test_pause_asks_no_more_until_it_ends(server: Controlled) -> None:
    with clients(server, 1) as made, Terminal(server.path) as top:
        top.until(lambda: top.ids() == list(made)).press("p").shows("PAUSED")
        with Client(server.address) as late:
            late.ask(b"a line\n")
            assert len(server.rows(2)) == 2
            end = time.monotonic() + 3 * INTERVAL_S
            while time.monotonic() < end:
                top.press("?").shows("any key: back").press("x").shows(LINE_KEYS).until(top.ids)
                assert top.ids() == list(made)
            top.press("p").hides("PAUSED").until(lambda: len(top.ids()) == 2)
        assert top.press("q").ends() == 0


@pytest.mark.parametrize(("is_first", "is_answered"), [(False, True), (False, False), (True, True)])
def test_pause_drops_an_answer_to_a_question_of_before(
    server: Controlled, tmp_path: Path, is_first: bool, is_answered: bool
) -> None:
    asked, taken = tmp_path / "asked", tmp_path / "taken"
    os.mkfifo(asked)
    os.mkfifo(taken)
    program = (
        "import reqtable.run.commands.servers as servers, reqtable.run.top.screen as screen\n"
        "first, look, take = iter([1]), servers.Servers.look, screen.Screen._looked\n"
        "def looked(*given):\n"
        f"    if not next(first, None) and not open({str(asked)!r}).read(): raise screen.Unanswered('no answer')\n"
        "    return look(*given)\n"
        f"def took(*given): take(*given), open({str(taken)!r}, 'w').close()\n"
        "servers.Servers.look, screen.Screen._looked = looked, took\n" + RUN
    )

    def answer(text: str) -> None:
        asked.write_text(text)  # waits for the question
        assert taken.read_text() == ""  # waits until the screen has taken the answer

    with clients(server, 1) as made, Terminal(server.path, program=program) as top:
        if not is_first:
            answer("go on")  # to the question of the first frame
        with open(asked, "w") as gate:  # opens when the next question is asked
            top.press("p").shows("PAUSED")
            with Client(server.address) as late:
                late.ask(b"a line\n")
                assert len(server.rows(2)) == 2
                gate.write("go on" if is_answered else "")
                gate.close()
                taken.read_text()
                top.press("?").shows("any key: back").press("x").shows(LINE_KEYS).until(top.ids)
                assert top.ids() == list(made)
                assert not any("no answer" in line for line in top.lines)
                top.press("p").hides("PAUSED")
                answer("go on")
                top.until(lambda: len(top.ids()) == 2)
        assert top.press("q").ends() == 0


def test_it_follows_a_terminal_that_is_resized(server: Controlled) -> None:
    with clients(server, 20) as made, Terminal(server.path) as top:
        ids = list(made)
        top.until(lambda: top.ids() == ids[: 24 - 9])
        top.press("p").shows("PAUSED").resize(120, 40)
        top.until(lambda: top.ids() == ids).shows(r"line\(limit=4096\)$", r"^\[R{118}\]$")
        top.press("p").hides("PAUSED")
        top.resize(60, 12)
        top.until(lambda: top.ids() == ids[: 12 - 9]).shows(r"^\[R{58}\]$")
        top.press(*["j"] * 5).shows("from row 4").until(lambda: top.ids() == ids[3:6])
        assert top.press("q").ends() == 0


def test_it_drains_the_server_and_shows_that_it_has_gone(server: Controlled) -> None:
    with clients(server, 1), Terminal(server.path) as top:
        top.press("D").shows(r"^Drain the server\? It ends when its requests are done. y/n")
        top.press("y").shows("^the server drains: 1 request in progress")
        assert server.wait() == 0
        top.shows("^reqtable top  .*there is no such socket")
        assert top.press("q").ends() == 0


def test_a_server_that_goes_away_is_told_of_and_found_again() -> None:
    with tempfile.TemporaryDirectory(prefix="reqtable-") as folder, contextlib.ExitStack() as stack:
        path = f"{folder}/c.sock"

        def serve() -> Service:
            service = Service("--control", path, workers=None, handler="tests/sticking.py:Lines")
            stack.enter_context(service).wait_for("control: listening")
            return service

        before = serve()
        client = stack.enter_context(Client(before.address))
        client.ask(b"a line\n")
        top = stack.enter_context(Terminal(path))
        top.until(lambda: len(top.ids()) == 1)
        before.process.kill()
        before.wait()
        top.shows("^reqtable top  .*no server listens there any more")
        assert len(top.ids()) == 1, "what was there is still shown"
        after = serve()
        other = stack.enter_context(Client(after.address))
        other.ask(b"a line\n")
        top.shows(rf"Lines 127.0.0.1:{after.address[1]}", rf"127.0.0.1:{port_of(other)}")
        assert top.press("q").ends() == 0


def test_keys_work_while_the_server_is_held_up(server: Controlled) -> None:
    with clients(server, 1) as made, Terminal(server.path) as top:
        top.until(lambda: len(top.ids()) == 1)
        [client] = made.values()
        client.send(b"hold\n")
        top.shows("^reqtable top  no answer for")
        top.press("?").shows("any key: back").press("q").shows(LINE_KEYS)
        assert top.press("q").ends() == 0
    server.process.kill()
    server.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_it_restores_the_terminal(server: Controlled, number: signal.Signals) -> None:
    with Terminal(server.path) as top:
        top.shows(LINE_KEYS).process.send_signal(number)
        assert top.ends() == 128 + number


@pytest.mark.parametrize("where", ["frame", "press"])
def test_an_exception_restores_the_terminal(server: Controlled, where: str) -> None:
    program = (
        "import reqtable.run.top.screen as screen\n"
        "plain, left = screen.frame, iter(range(3))\n"
        "def fail(*_): raise RuntimeError('a mistake')\n"
        f"if {where!r} == 'press': screen.press = fail\n"
        "else: screen.frame = lambda *given: plain(*given) if next(left, None) is not None else fail()\n" + RUN
    )
    with Terminal(server.path, program=program) as top:
        top.press("x")
        assert top.ends() == 1
        assert "RuntimeError: a mistake" in top.sent.decode()


def test_an_exception_of_a_question_restores_the_terminal(server: Controlled) -> None:
    program = (
        "import reqtable.run.commands.servers as servers\n"
        "first, look = iter([1]), servers._look\n"
        "def look_once(*given):\n"
        "    if not next(first, None): raise RuntimeError('a mistake')\n"
        "    return look(*given)\n"
        "servers._look = look_once\n" + RUN
    )
    with Terminal(server.path, program=program) as top:
        assert top.ends() == 1
        assert "RuntimeError: a mistake" in top.sent.decode()


def test_it_ends_if_its_terminal_goes_away(server: Controlled) -> None:
    with Terminal(server.path) as top:
        top.shows(LINE_KEYS).close()
        assert top.process.wait(WAIT_S) != 0


SINK = """
import reqtable.http
from reqtable import sleep, state
class Sink(reqtable.http.HTTPRequestHandler):
    def respond(self):
        return self.wait, sleep(600)
    @state()
    def wait(self, _):
        return self.answer(200, "x")
"""
HOSTILE = b"\x1b[2J\x9b31m\x07[red]"


def test_nothing_that_a_client_sent_reaches_the_terminal_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "sink.py").write_text(SINK)
    with Controlled(handler=f"{tmp_path}/sink.py:Sink") as server, Client(server.address) as client:
        client.send(b"GET /[red]%1b[2J[/red] HTTP/1.1\r\nHost: a\r\n\r\n" + HOSTILE)
        server.rows(1, "--handler-state", "wait")
        with Terminal(server.path, columns=200) as top:
            top.shows(r"  /\[red\]%1b\[2J\[/red\] ").press("\r")
            top.shows(r"input_head +'\\x1b\[2J\\x9b31m\\x07\[red\]'", r"path +/\[red\]%1b\[2J\[/red\]")
            assert top.press("q", "q").ends() == 0
            assert [each for each in (b"\x1b[2J", b"\xc2\x9b", b"\x9b3", b"\x07") if each in top.sent] == []
        once = server.run("top", "--once", "--interval", INTERVAL_S)
        assert all(each.isprintable() or each == "\n" for each in once.out)
        assert "[red]" in once.out
        client.reset()
        server.signal(signal.SIGINT)
        assert server.wait() == 0


# -- in a pipe --------------------------------------------------------------------------------------------------------


def test_one_frame(server: Controlled) -> None:
    with clients(server, 2) as made:
        done = server.run("top", "--once", "--interval", INTERVAL_S)
        as_json = json.loads(server.run("top", "--once", "--json").out)
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert lines[0].startswith("reqtable top  Lines 127.0.0.1:")
    assert re.match(r"a second  in \d", lines[2])
    assert [int(line.split()[0]) for line in lines[-2:]] == list(made)
    assert lines[-3].split() == ["id", "st", "peer", "handler", "at", "age", "idle", "mem", "in", "out", "waits", "for"]
    assert [row["id"] for row in as_json["requests"]] == list(made)
    assert as_json["stats"]["entries"] == 2


def test_frames_in_a_pipe_are_plain_text(server: Controlled) -> None:
    with clients(server, 1):
        words = [sys.executable, "-c", RUN, "top", "--control", server.path, "--interval", str(INTERVAL_S)]
        with Started(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            frames = [lines_before("\n", process.stdout) for _ in range(3)]
            process.send_signal(signal.SIGINT)
            process.stdout.read()
            assert process.stderr.read() == ""
            assert process.wait(WAIT_S) == 0
    for each in frames:
        assert each[0].startswith("reqtable top  Lines")
        assert "\x1b" not in "".join(each)
        assert "127.0.0.1" in each[-1]
    assert "a second  -\n" in frames[0]
    assert any(line.startswith("a second  in 0  out 0   accepted 0.0") for line in frames[2])


def test_the_reader_of_a_pipe_may_leave(server: Controlled) -> None:
    words = f"{sys.executable} -m reqtable top --control {server.path} --interval 0.1 | head -n 3"
    done = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert (len(done.stdout.splitlines()), done.stderr) == (3, "")


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = command("top", "--control", f"{tmp_path}/c.sock")
    assert (done.code, done.out) == (3, "")
    assert re.fullmatch(r"reqtable: \S+/c.sock: there is no such socket: .*\n", done.err)


# -- several servers --------------------------------------------------------------------------------------------------


def test_a_kill_on_the_screen_of_two_servers_ends_a_request_of_the_chosen_one(server: Controlled) -> None:
    with controlled() as other, clients(server, 1) as ours, clients(other, 1) as theirs:
        with Terminal(server.path, "--control", other.path, columns=120) as top:
            top.shows(
                "^requests  2, at most .* in all servers", "^workers   c .*, c-2 ", "^control +id", "^c +1 ", "^c-2 +1 "
            )
            top.press("w", "w").shows("control=c-2").hides("^c +1 ")
            top.press("K").shows("^End request 1 of c-2 ").press("y").shows("^ended request 1")
            [kept], [killed] = ours.values(), theirs.values()
            assert is_ended(killed)
            assert kept.ask(b"still here\n") == b"still here\n"
            assert top.press("q").ends() == 0


def test_a_server_that_ends_leaves_the_other_on_the_screen(server: Controlled) -> None:
    with clients(server, 1), controlled() as other:
        with Terminal(server.path, "--control", other.path, columns=160) as top:
            top.shows("^requests  1", "^workers   c .*, c-2 ")
            other.signal(signal.SIGINT)
            assert other.wait() == 0
            top.shows("^reqtable top .* c-2: .*there is no such socket", "^c +1 ")
            assert top.press("q").ends() == 0
