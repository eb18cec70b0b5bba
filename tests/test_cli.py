"""The command line as a user sees it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support import WAIT_S, Client, Started, slow_but

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "reqtable"]
NOTES = "examples/notes.py:Notes"


@contextmanager
def reqtable_command(
    *arguments: str, listeners: int = 1, **options: object
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run a command that serves during the block. Yields its process and the lines printed for its listeners."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert process.stdout is not None
    try:
        yield process, [process.stdout.readline().strip() for _ in range(listeners)]
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=WAIT_S)


def reqtable_serve(*arguments: str, **options: Any) -> AbstractContextManager[tuple[subprocess.Popen[str], list[str]]]:
    """Run `reqtable serve …` during the block."""
    return reqtable_command("serve", *arguments, **options)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False)


def port_of(line: str) -> int:
    return int(line.rpartition(":")[2])


FAILING = """
import reqtable

class Failing(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def one(self, text):
        raise ValueError(text.decode("utf-8", "surrogateescape"))
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_client_writes_no_lines_of_its_own_into_the_log(form: str, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    command = (f"{tmp_path}/failing.py:Failing", "--bind", "tcp://127.0.0.1:0", "--log-format", form)
    with reqtable_serve(*command) as (process, [line]):
        said = json.loads(line)["message"] if form == "json" else line
        with Client(("127.0.0.1", port_of(said))) as client:
            client.send(b"\r\x1b[2J\xff\xc2\x9b\xe2\x80\xae forged\n").rest()
        process.terminate()
        _, log = process.communicate(timeout=WAIT_S)
    failure, *others = [each for each in log.splitlines() if not each.startswith(" ")]
    assert log.replace("\n", "").isprintable()
    if form == "text":
        said = r"ValueError: \x1b[2J\udcff\x9b\u202e forged"
        assert failure.endswith(f", request 1: {said}, in Failing.one ({tmp_path}/failing.py:7)")
        assert "    ValueError: \\r\\x1b[2J\\udcff\\x9b\\u202e forged\n" in log
    else:
        assert json.loads(failure)["traceback"].endswith("ValueError: \r\x1b[2J\udcff\x9b\u202e forged\n")
    assert not any("forged" in each for each in others)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_a_signal(number: int) -> None:
    with reqtable_serve(NOTES, "--bind", "tcp://127.0.0.1:0") as (process, [line]):
        assert re.fullmatch(r"serving Notes on tcp://127\.0\.0\.1:\d+", line)
        with Client(("127.0.0.1", port_of(line))) as client:
            assert client.ask(b"put 3\na b" + b"count\n") == b"2\n"
            if number == signal.SIGTERM:
                assert client.end().rest() == b""  # else it would be waited for: see test_drain.py
            process.send_signal(number)
            out, err = process.communicate(timeout=WAIT_S)
            assert client.rest() == b""
    assert (process.returncode, out, err) == (0, "", "")


STAYING = """
import reqtable, time

class Lines(reqtable.StreamRequestHandler):
    def handle(self):
        for text in self.rfile:
            self.wfile.write(text)

class Calling(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def first(self, text):
        self.send(text)
        return self.last, reqtable.call(time.sleep, 10_000)

    @reqtable.state()
    def last(self, _):
        return None
"""


@pytest.mark.parametrize(
    ("handler", "dispatch"),
    [
        *slow_but((("Lines", dispatch) for dispatch in ("greenlet", "thread", "pool", "fork")), ("Lines", "fork")),
        *slow_but((("Calling", dispatch) for dispatch in ("inline", "thread", "pool", "fork")), ("Calling", "inline")),
    ],
)
def test_sigint_ends_at_once_whoever_stays(handler: str, dispatch: str, tmp_path: Path) -> None:
    file = tmp_path / "staying.py"
    file.write_text(STAYING)
    arguments = [f"{file}:{handler}", "--bind", "tcp://127.0.0.1:0", "--dispatch", dispatch]
    with reqtable_serve(*arguments) as (process, [line]), Client(("127.0.0.1", port_of(line))) as client:
        assert client.ask(b"hello\n") == b"hello\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
        assert client.rest() == b""


DOUBLING = """
import operator
import reqtable

class Doubling(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def first(self, text):
        return self.doubled, reqtable.call(operator.mul, text, 2, on="process")

    @reqtable.state()
    def doubled(self, text):
        self.send(text)
        return self.first
"""


def test_ctrl_c_ends_the_processes_of_a_pool_without_a_word(tmp_path: Path) -> None:
    file = tmp_path / "doubling.py"
    file.write_text(DOUBLING)
    arguments = [f"{file}:Doubling", "--bind", "tcp://127.0.0.1:0"]
    with reqtable_serve(*arguments, start_new_session=True) as (process, [line]):
        with Client(("127.0.0.1", port_of(line))) as client:
            assert client.ask(b"a\n") + client.line() == b"a\na\n"
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out, err) == (0, "", "")


WITHOUT_GREENLET = """
import sys
sys.modules["greenlet"] = None
from reqtable.__main__ import main
main()
"""


@pytest.mark.parametrize("is_there", [True, False])
def test_a_blocking_handler_for_which_nothing_is_named_stops_nobody(is_there: bool, tmp_path: Path) -> None:
    (tmp_path / "staying.py").write_text(STAYING)
    command = COMMAND if is_there else [sys.executable, "-c", WITHOUT_GREENLET]
    policy = "greenlet" if is_there else "thread"
    serve = [*command, "serve", f"{tmp_path}/staying.py:Lines", "--bind", "tcp://127.0.0.1:0"]
    with Started(serve, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = "127.0.0.1", port_of(process.stdout.readline())
        with Client(address), Client(address) as client:
            assert client.ask(b"hello\n") == b"hello\n"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=WAIT_S)
    assert re.fullmatch(rf".* INFO Lines is a blocking handler: dispatch policy '{policy}'\n", err)
    shown = subprocess.run([*command, "config"], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S)
    first = shown.stdout.splitlines()[0]
    assert re.fullmatch(rf'dispatch +"inline" +default; for a blocking handler "{policy}"', first)
    shown = subprocess.run(
        [*command, "config", "--dispatch", "pool"], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S
    )
    assert re.fullmatch(r'dispatch +"pool" +argument', shown.stdout.splitlines()[0])


def test_a_blocking_handler_runs_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "staying.py").write_text(STAYING)
    arguments = [f"{tmp_path}/staying.py:Lines", "--bind", "tcp://127.0.0.1:0", "--dispatch", "thread"]
    with reqtable_serve(*arguments) as (process, [line]):
        with Client(("127.0.0.1", port_of(line))) as client:
            assert client.ask(b"hello\n") == b"hello\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=WAIT_S) == ("", "")


STUCK = """
import reqtable, signal, threading
from reqtable import line, state

held = threading.Lock()
held.acquire()

def told(number, frame):
    print("told", flush=True)
    before[number](number, frame)

before = {}

class Stuck(reqtable.StateRequestHandler):
    @state(line())
    def command(self, text):
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, told)
        print("stuck", flush=True)
        while not held.acquire(timeout=0.01):
            pass  # a signal that comes just before a wait without an end would not end it
"""


@pytest.mark.parametrize("numbers", [[signal.SIGINT] * 2, [signal.SIGTERM] * 3, [signal.SIGTERM, *[signal.SIGINT] * 2]])
def test_told_again_it_interrupts_a_step_that_does_not_return(numbers: list[int], tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(STUCK)
    with reqtable_serve(f"{tmp_path}/app.py:Stuck", "--bind", "tcp://127.0.0.1:0") as (process, [line]):
        assert process.stdout is not None
        with Client(("127.0.0.1", port_of(line))) as client:
            client.send(b"x\n")
            assert process.stdout.readline() == "stuck\n"
            for number in numbers:
                process.send_signal(number)
                assert process.stdout.readline() == "told\n"
            _, err = process.communicate(timeout=WAIT_S)
            assert client.rest() == b""
    assert process.returncode == 0
    assert err.endswith("WARNING interrupted while the loop was held up\n")


def test_certificates_that_no_bind_uses_are_said(tmp_path: Path) -> None:
    (tmp_path / "reqtable.toml").write_text('[tls]\ncert = "any.pem"\n')
    options = ("--config", f"{tmp_path}/reqtable.toml", "--bind", "tcp://127.0.0.1:0")
    with reqtable_serve(NOTES, *options) as (process, [line]):
        assert line.startswith("serving Notes on tcp://")
        process.terminate()
        _, err = process.communicate(timeout=WAIT_S)
    assert "WARNING [tls] names a certificate, but no bind uses it: write tls:// in place of tcp://" in err


def test_several_binds_over_one_table_and_the_table_on_sigusr1(tmp_path: Path) -> None:
    binds = ["tcp://127.0.0.1:0", f"unix://{tmp_path}/notes.sock", "tcp://[::1]:0"]
    arguments = [word for bind in binds for word in ("--bind", bind)]
    with reqtable_serve(NOTES, *arguments, listeners=3) as (process, lines):
        assert [re.sub(r"\d+$", "N", line) for line in lines] == [
            "serving Notes on tcp://127.0.0.1:N",
            f"serving Notes on unix://{tmp_path}/notes.sock",
            "serving Notes on tcp://[::1]:N",
        ]
        with (
            Client(("127.0.0.1", port_of(lines[0]))) as one,
            Client(f"{tmp_path}/notes.sock", socket.AF_UNIX) as two,
            Client(("::1", port_of(lines[2])), socket.AF_INET6) as three,
        ):
            assert one.ask(b"count\n") == two.ask(b"count\n") == three.ask(b"count\n") == b"0\n"
            two.send(b"put 100\nnot all of it")
            one.ask(b"count\n")
            process.send_signal(signal.SIGUSR1)
            assert process.stderr is not None
            heading = process.stderr.readline()
            rows = [process.stderr.readline() for _ in range(4)]
    assert heading.rstrip().endswith("INFO 3 requests")
    assert rows[0].split()[:3] == ["id", "st", "peer"]
    assert [row.split()[1] for row in rows[1:]] == ["R", "R", "R"]
    assert "exactly(n=100)" in rows[2]
    assert not (tmp_path / "notes.sock").exists()


def test_datagrams_and_a_descriptor_that_is_open(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        number = listening.fileno()
        with reqtable_serve(
            "examples/echo.py:StateEcho", "--bind", f"fd://{number}", "--bind", "udp://127.0.0.1:0",
            listeners=2, pass_fds=[number],
        ) as (_, lines):  # fmt: skip
            assert lines[0] == f"serving StateEcho on tcp://127.0.0.1:{listening.getsockname()[1]}"
            with Client(listening.getsockname()) as client:
                assert client.ask(b"through a descriptor\n") == b"through a descriptor\n"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
                peer.settimeout(WAIT_S)
                peer.sendto(b"datagram\n", ("127.0.0.1", port_of(lines[1])))
                assert peer.recv(100) == b"datagram\n"


def test_on_a_terminal_it_shows_that_it_is_alive() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "serve", NOTES, "--bind", "tcp://127.0.0.1:0"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    try:
        while b"0 in the table, 0 so far" not in seen:
            assert select.select([ours], [], [], WAIT_S)[0]
            seen += os.read(ours, 1000)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGHUP)
        while not seen.endswith(b"read again\r\n0 in the table, 0 so far "):
            assert select.select([ours], [], [], WAIT_S)[0], seen
            seen += os.read(ours, 1000)
        assert re.search(rb"\x1b\[2K\r[^\r]+ INFO the configuration was read again\r\n", seen)
        process.terminate()
        while not seen.endswith(b"\x1b[2K\r"):
            assert select.select([ours], [], [], WAIT_S)[0], seen
            seen += os.read(ours, 1000)
    finally:
        process.terminate()
        process.wait(WAIT_S)
        os.close(ours)


def test_what_an_operator_asks_for_is_seen_whatever_the_level_of_the_log_is() -> None:
    with reqtable_serve(NOTES, "--bind", "tcp://127.0.0.1:0", "--log-level", "error") as (process, [line]):
        with Client(("127.0.0.1", port_of(line))) as client:
            client.ask(b"count\n")
            process.send_signal(signal.SIGUSR1)
            assert process.stderr is not None
            assert process.stderr.readline().endswith(" INFO 1 request\n")


PROGRAM = """
import logging, sys
import reqtable
from examples.notes import Notes
{setup}
reqtable.serve(Notes, "tcp://127.0.0.1:0", on_listening=lambda names: print(*names, flush=True))
"""


@pytest.mark.parametrize(
    ("setup", "said", "shown"),
    [
        ("", "serving Notes on {}", "1 request"),
        ("logging.basicConfig()", "", "INFO:reqtable.table:1 request"),
        ("logging.basicConfig(level=20)", "INFO:reqtable.serving:serving Notes on {}", "INFO:reqtable.table:1 request"),
    ],
    ids=["no logging", "warnings", "all"],
)  # fmt: skip
def test_a_program_that_serves_says_so_in_the_log_and_shows_its_table(setup: str, said: str, shown: str) -> None:
    program = PROGRAM.format(setup=setup)
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        name = process.stdout.readline().strip()
        with Client(("127.0.0.1", port_of(name))) as client:
            client.ask(b"count\n")
            process.send_signal(signal.SIGUSR1)
            lines = [process.stderr.readline().rstrip() for _ in range(3 if said else 2)]
            client.end()
        assert lines[:-1] == [*([said.format(name)] if said else []), shown]
        assert lines[-1].split()[:2] == ["id", "st"]
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0


def test_the_log_as_json_is_json_from_its_first_line_on() -> None:
    arguments = [NOTES, "--bind", "tcp://127.0.0.1:0", "--log-format", "json", "--log-level", "error", "--access-log"]
    with reqtable_serve(*arguments) as (process, [line]):
        begun = json.loads(line)
        assert (begun["logger"], begun["level"], begun["pid"]) == ("reqtable.serving", "INFO", process.pid)
        name = re.fullmatch(r"serving Notes on (tcp://127\.0\.0\.1:\d+)", begun["message"])
        assert name is not None
        with Client(("127.0.0.1", port_of(name[1]))) as client:
            assert client.ask(b"count\n") == b"0\n"
        assert process.stderr is not None
        ended = json.loads(process.stderr.readline())
    assert (ended["id"], ended["local"], ended["handler"]) == (1, name[1].removeprefix("tcp://"), "Notes")
    for each in (begun, ended):
        at = datetime.fromisoformat(each["at"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", each["at"])  # RFC 3339
        assert abs(at.timestamp() - time.time()) < WAIT_S


def test_a_thing_that_can_not_be_looked_at_is_no_candidate(tmp_path: Path) -> None:
    (tmp_path / "proxied.py").write_text(
        "from examples.notes import Notes\n"
        "class Proxy:\n"
        "    def __getattr__(self, name): raise RuntimeError('Working outside of request context.')\n"
        "request = Proxy()\n"
        "class Own(Notes): pass\n"
    )
    result = run("serve", f"{tmp_path}/proxied.py:Owm")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.endswith("proxied.py has no Owm; handlers and servers there: Own\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve", "nosuch:Handler"], 2, ["'nosuch:Handler'", "No module named 'nosuch'"]),
        (["serve", "nosuch.py:Handler"], 2, ["'nosuch.py:Handler'", "no such file"]),
        (["serve", "examples/notes.py:Nothing"], 2, ["has no Nothing", "handlers and servers there: Notes"]),
        (["serve", "string:digits"], 2, ["digits is not a handler class", "StateRequestHandler"]),
        (["serve", "examples/notes.py"], 2, ["write it as module:Handler"]),
        (["serve"], 2, ["Missing argument"]),
        (["serve", NOTES, "--workers", "0"], 2, ["--workers", "0 is not in the range x>=1"]),
        (["serve", NOTES, "--dispatch", "magic"], 2, ["'magic'", "greenlet", "inline"]),
        (["states", "examples/echo.py:AsyncEcho"], 2, ["AsyncEcho is not a state machine", "StateRequestHandler"]),
        (["nosuch"], 2, ["nosuch"]),
        (["serve", NOTES, "--log-file", "/absent/x.log"], 1, ["reqtable: /absent/x.log: no such file or directory"]),
        (["new", f"{'long' * 70}.py"], 1, [f"{'long' * 70}.py: file name too long"]),
    ],
)  # fmt: skip
def test_an_error_is_one_line_that_names_it_and_the_mend(arguments: list[str], code: int, words: list[str]) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (code, "", 1), result.stderr
    assert result.stderr.startswith("reqtable: ")
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("dispatch", ["inline", "executor"])
def test_a_file_imports_what_lies_beside_it(dispatch: str, tmp_path: Path) -> None:
    """It can from any directory, as with `python app.py`, and also in the process that steps are shipped to."""
    (tmp_path / "words.py").write_text("def of(text):\n    return b'%d\\n' % len(text.split())\n")
    (tmp_path / "app.py").write_text(
        "import reqtable, words\n"
        "class Count(reqtable.StateRequestHandler):\n"
        "    @reqtable.state(reqtable.line())\n"
        "    def count(self, text):\n"
        "        self.send(words.of(text))\n"
    )
    with (
        reqtable_serve(f"{tmp_path}/app.py:Count", "--dispatch", dispatch, "--bind", "tcp://127.0.0.1:0") as (
            _,
            [line],
        ),
        Client(("127.0.0.1", port_of(line))) as client,
    ):
        assert client.ask(b"one two\n") == b"2\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os\n\nxyzzy\n", "can't be imported: NameError: name 'xyzzy' is not defined ({file}:3)"),
        ("def f(:\n", "can't be imported: SyntaxError: invalid syntax ({file}:1)"),
        ("import sys\nsys.exit(3)\n", "ends the program when it is imported: SystemExit: 3 ({file}:2): put what runs"),
        (
            "import reqtable\nreqtable.serve(reqtable.AsyncRequestHandler, 'tcp://127.0.0.1:0')\n",
            "can't be imported: ConfigurationError: serve() is called by the import: put it under "
            'if __name__ == "__main__": ({file}:2)',
        ),
        (
            "from reqtable import *\nclass H(StateRequestHandler):\n    @state()\n    def send(self, _): ...\n",
            "can't be imported: HandlerError: H.send: StateRequestHandler has a send of its own: rename the state "
            "({file}:3)\n",
        ),
    ],
)
def test_an_error_of_the_file_is_said_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "app.py"
    file.write_text(text)
    result = run("serve", f"{file}:H")
    first, *traceback = result.stderr.splitlines(keepends=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"'{file}:H' {said.format(file=file)}" in first
    assert set(re.findall(r'File "(.*?)"', "".join(traceback))) <= {str(file)}


@pytest.mark.parametrize(
    ("text", "code", "said", "frames"),
    [
        ("def f():\n    return 1 / 0\nf()\n", 2, "ZeroDivisionError: division by zero, in f ({file}:2)", [3, 2]),
        (
            "import reqtable as r\nclass H(r.StateRequestHandler):\n    @r.state()\n    def one(self, _): return None\n"
            "    @classmethod\n    def on_start(cls, server):\n        raise OSError('no database')\n",
            1,
            "OSError: no database, in H.on_start ({file}:7)",
            [7],
        ),
    ],
)
def test_the_traceback_of_an_error_at_the_start_has_the_users_frames(
    text: str, code: int, said: str, frames: list[int], tmp_path: Path
) -> None:
    file = tmp_path / "app.py"
    file.write_text(text)
    result = run("serve", f"{file}:H", "--bind", "tcp://127.0.0.1:0")
    first, *traceback = result.stderr.splitlines()
    assert result.returncode == code
    assert first.endswith(said.format(file=file))
    assert re.findall(r'File "(.*?)", line (\d+)', "\n".join(traceback)) == [(str(file), str(each)) for each in frames]
    assert all(each.startswith("    ") for each in traceback)


def test_it_serves_without_a_standard_error() -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "serve", NOTES, "--bind", "tcp://127.0.0.1:0"]
    with Started(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with Client(("127.0.0.1", port_of(process.stdout.readline().strip()))) as client:
            assert client.ask(b"count\n") == b"0\n"
            process.terminate()
        assert process.wait(WAIT_S) == 0


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        result = run("serve", NOTES, "--bind", bind)
    assert result.returncode == 1
    name = Path("/proc/self/comm").read_text().rstrip()
    assert result.stderr == (
        f"reqtable: bind '{bind}': address already in use by {name} (process {os.getpid()}): "
        "stop it, or choose another one\n"
    )


@pytest.mark.parametrize("kind", ["a regular file", "a live server", "a dead server"])
def test_a_unix_path_that_exists(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.sock"
    bind = f"unix://{path}"
    with socket.socket(socket.AF_UNIX) as other:
        if kind == "a regular file":
            path.write_text("precious")
        else:
            other.bind(str(path))
        if kind == "a live server":
            other.listen()
        if kind == "a dead server":
            other.close()
            with reqtable_serve(NOTES, "--bind", bind) as (_, [line]), Client(str(path), socket.AF_UNIX) as client:
                assert line == f"serving Notes on {bind}"
                assert client.ask(b"count\n") == b"0\n"
            return
        result = run("serve", NOTES, "--bind", bind)
    assert result.returncode == 1
    assert result.stderr.startswith(f"reqtable: bind '{bind}': address already in use")
    assert path.exists()


def test_states_as_a_table() -> None:
    result = run("states", NOTES)
    assert (result.returncode, result.stderr) == (0, "")
    assert [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()] == [
        ["state", "waits for", "timeout", "then"],
        ["> command", "line(limit=512)", "30 s", "body, command, ranked, done", "Read a command."],
        ["body", "by the transition", "60 s", "command", "Take the note."],
        ["ranked", "by the transition", "-", "command", "The slow work is done."],
    ]


def test_states_as_a_diagram_and_as_data() -> None:
    assert run("states", NOTES, "--format", "mermaid").stdout.splitlines()[:5] == [
        "stateDiagram-v2",
        "    [*] --> command",
        "    command: command · line(limit=512)",
        "    command --> body",
        "    command --> command",
    ]
    assert run("states", NOTES, "--format", "dot").stdout.splitlines()[4:8] == [
        '    "begin" -> "state command";',
        '    "state command" [label="command\\nline(limit=512)"];',
        '    "state command" -> "state body";',
        '    "state command" -> "state command";',
    ]
    assert [each["name"] for each in json.loads(run("states", NOTES, "--format", "json").stdout)] == [
        "command",
        "body",
        "ranked",
    ]


def test_help() -> None:
    assert "Usage: reqtable serve [OPTIONS] HANDLER" in run("serve", "--help").stdout
