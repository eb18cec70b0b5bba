"""Unmodified programs under `python -m reqtable.compat run`, with real clients and under load.


The programs are those in `tests/programs` and the command of `http.server`. Each runs in its own process, with all
blocking handlers under `greenlet`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import xmlrpc.client
from collections.abc import Callable, Iterator
from logging.handlers import SocketHandler
from pathlib import Path
from typing import Any

import dns.message
import dns.query
import pytest

import reqtable
from reqtable.compat import REPLACEMENT, environment
from tests.support import WAIT_S, slow_but
from tests.test_examples import program as client_program

PROGRAMS = Path(__file__).parent / "programs"
SILENT = 20
CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)  # the beginning of one
PLAIN = {
    name: value
    for name, value in os.environ.items()
    if name == "REQTABLE_PURE" or not name.startswith(("REQTABLE_", "PYTHON"))
}


class Program:
    """Runs a program under `reqtable.compat`. The program prints the port that it serves."""

    def __init__(self, arguments: list[str], folder: Path, dispatch: str | None, **variables: str) -> None:
        options = [] if dispatch is None else ["--dispatch", dispatch]
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "reqtable.compat", "run", *options, *arguments],
            cwd=folder,
            env={**PLAIN, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._said = b""
        self.port = int(self.says(rb"(?:port |http://127\.0\.0\.1:)(\d+)").group(1))

    def says(self, pattern: bytes) -> re.Match[bytes]:
        """Wait until the program has printed a match of the pattern, and return the match."""
        until = time.monotonic() + WAIT_S
        assert self.process.stdout is not None
        while not (match := re.search(pattern, self._said)):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            more = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert more, f"it never said {pattern!r}, but:\n{self._said.decode()}"
            self._said += more
        return match

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


# -- the programs, and what an honest client asks of each -------------------------------------------------------------


def ask_files(program: Program) -> None:
    content = bytes(range(256)) * 400
    (program.folder / "some file.bin").write_bytes(content)
    fetched = curl(f"http://127.0.0.1:{program.port}/some%20file.bin")
    assert fetched == content


def curl(*arguments: str) -> bytes:
    return subprocess.run(
        [client_program("curl"), "--silent", "--show-error", "--fail", "--max-time", str(WAIT_S), *arguments],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout


def ask_xml_rpc(program: Program) -> None:
    with xmlrpc.client.ServerProxy(f"http://127.0.0.1:{program.port}") as proxy:
        assert proxy.pow(2, 10) == 1024
        with pytest.raises(xmlrpc.client.Fault, match="not supported"):
            proxy.nothing()
        assert "pow" in proxy.system.listMethods()  # type: ignore[operator]


def ask_words(program: Program) -> None:
    text = b"one two  three"
    with urllib.request.urlopen(f"http://127.0.0.1:{program.port}/words", data=text, timeout=WAIT_S) as answer:
        assert b"3" in answer.read()
    assert b"3" in curl("--data-binary", text.decode(), f"http://127.0.0.1:{program.port}/words")


def ask_log_config(program: Program) -> None:
    log = program.folder / "made by the configuration.log"
    log.unlink(missing_ok=True)
    handlers = {"file": {"class": "logging.FileHandler", "filename": str(log)}}
    text = json.dumps({"version": 1, "handlers": handlers, "root": {"handlers": ["file"]}}).encode()
    with program.connect() as connection:
        connection.sendall(len(text).to_bytes(4, "big") + text)
        assert connection.recv(1) == b""
    assert log.exists()


def ask_log_receiver(program: Program) -> None:
    word = f"{random.getrandbits(64):x}"
    handler = SocketHandler("127.0.0.1", program.port)
    handler.emit(logging.LogRecord("remote", logging.WARNING, "", 0, "the word is %s", (word,), None))
    program.says(f"remote says the word is {word}".encode())
    handler.close()


def ask_dns(program: Program) -> None:
    query = dns.message.make_query("name.example", "A")
    for ask in (dns.query.udp, dns.query.tcp):
        reply = ask(query, "127.0.0.1", port=program.port, timeout=WAIT_S)
        assert [str(record) for rrset in reply.answer for record in rrset] == ["192.0.2.7"]


ASKED: dict[str, tuple[list[str], Callable[[Program], None]]] = {
    "http.server": (["-m", "http.server", "--bind", "127.0.0.1", "0"], ask_files),
    "xmlrpc.server": ([str(PROGRAMS / "xml_rpc.py")], ask_xml_rpc),
    "wsgiref and Flask": ([str(PROGRAMS / "flask_on_wsgiref.py")], ask_words),
    "logging.config.listen": ([str(PROGRAMS / "log_config.py")], ask_log_config),
    "SocketHandler": ([str(PROGRAMS / "log_receiver.py")], ask_log_receiver),
    "werkzeug": ([str(PROGRAMS / "werkzeug_server.py")], ask_words),
    "Django": ([str(PROGRAMS / "django_server.py")], ask_words),
    "dnslib": ([str(PROGRAMS / "dns_server.py")], ask_dns),
}


@contextlib.contextmanager
def running(
    name: str, folder: Path, dispatch: str | None = "greenlet", **variables: str
) -> Iterator[tuple[Program, Callable[[], None]]]:
    """Run a program. Yields it, and a function that asks it something and checks the answer."""
    arguments, ask = ASKED[name]
    program = Program(arguments, folder, dispatch, **variables)
    try:
        yield program, lambda: ask(program)
    finally:
        program.end()


HEAVY = {"wsgiref and Flask", "logging.config.listen", "Django"}  # they take longest to start, or to be asked
LIGHT = set(ASKED) - HEAVY


@pytest.mark.parametrize("name", slow_but(ASKED, *LIGHT))
def test_it_serves_past_silent_clients_with_no_thread_more(name: str, tmp_path: Path) -> None:
    with running(name, tmp_path) as (program, ask), contextlib.ExitStack() as stack:
        ask()
        threads = program.threads()
        for _ in range(SILENT):
            stack.enter_context(program.connect())
        ask()
        ask()
        assert program.threads() == threads


@pytest.mark.parametrize("name", slow_but(ASKED, *HEAVY))
def test_it_runs_as_it_says_itself_too(name: str, tmp_path: Path) -> None:
    with running(name, tmp_path, dispatch=None) as (_, ask):
        ask()
        ask()


@pytest.mark.parametrize("name", slow_but(ASKED, *LIGHT))
def test_bad_input_harms_nobody_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    garbage = random.Random(7).randbytes(3000)
    variables = {}
    if name == "logging.config.listen":
        # The handler ignores the end of file and reads for ever, under any server. This is the fix.
        (tmp_path / "limits.toml").write_text("[limits]\nrequest_timeout_s = 1\n")
        variables = {"REQTABLE_CONFIG": str(tmp_path / "limits.toml")}
    with running(name, tmp_path, **variables) as (program, ask):
        ask()
        before = program.descriptors()
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                for opening in (b"", garbage, garbage[:3], CLIENT_HELLO, b"POST /words HTTP/1.1\r\nContent-"):
                    send_what_it_takes(stack.enter_context(program.connect()), opening)
                    with contextlib.closing(program.connect()) as leaving:
                        send_what_it_takes(leaving, opening)
                    with contextlib.closing(program.connect()) as resetting:
                        send_what_it_takes(resetting, opening)
                        resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                long_line = b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 2**20
                send_what_it_takes(stack.enter_context(program.connect()), long_line)
                ask()
        until = time.monotonic() + WAIT_S
        while program.descriptors() > before:
            assert time.monotonic() < until, f"{program.descriptors()} descriptors, before {before}"
            ask()


def test_werkzeugs_reloader_serves_by_the_socket_that_it_inherits(tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    source = (PROGRAMS / "werkzeug_server.py").read_text()
    script.write_text(source.replace("threaded=True", "threaded=True, use_reloader=True, reloader_type='stat'"))
    program = Program([str(script)], tmp_path, "greenlet")
    try:
        with program.connect():
            ask_words(program)
    finally:
        for child in Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)  # the one that serves
        program.end()


def send_what_it_takes(connection: socket.socket, data: bytes) -> None:
    """Send as much as the server takes: some servers refuse in the middle of the data, or stop reading."""
    with contextlib.suppress(OSError):
        connection.setblocking(False)
        while data:
            data = data[connection.send(data) :]


def test_five_hundred_clients_trickle_their_requests_while_curl_is_served(tmp_path: Path) -> None:
    content = b"<p>hello</p>" * 100
    (tmp_path / "page.html").write_bytes(content)
    request = b"GET /page.html HTTP/1.0\r\nHost: here\r\n\r\n"
    with running("http.server", tmp_path) as (program, ask):
        ask()
        threads = program.threads()
        clients = [program.connect() for _ in range(500)]
        for number in range(len(request)):
            for client in clients:
                client.sendall(request[number : number + 1])
            if number % 10 == 0:
                ask()
                assert program.threads() == threads
        for client in clients:
            with client, client.makefile("rb") as answer:
                assert answer.read().endswith(b"\r\n\r\n" + content)
        ask()


# -- the command ------------------------------------------------------------------------------------------------------


def compat(*arguments: str, python: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "reqtable.compat", *arguments],
        env={**PLAIN, **variables},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def test_what_it_runs_is_run_as_python_would(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import socketserver, sys, os, __main__\n"
        "print(socketserver.__file__)\n"
        "print(sys.argv, sys.path[0], __main__.__file__, __name__)\n"
        "print(sys.flags.dev_mode, os.environ['REQTABLE_DISPATCH'])\n"
        "sys.exit(7)\n"
    )
    ran = compat("run", "--dispatch", "pool", str(script), "--dispatch", "x", "-m", python=("-X", "dev"))
    assert ran.returncode == 7
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [
        str(REPLACEMENT / "socketserver.py"),
        f"{[str(script), '--dispatch', 'x', '-m']} {tmp_path} {script} __main__",
        "True pool",
    ]
    parent = "import subprocess, sys; subprocess.run([sys.executable, sys.argv[1]])"
    ran = compat("run", "-c", parent, str(script))
    assert "KeyError: 'REQTABLE_DISPATCH'" in ran.stderr, "no policy is named where none was asked for"
    assert ran.stdout.splitlines()[0] == str(REPLACEMENT / "socketserver.py"), "its children have the replacement too"


@pytest.mark.parametrize(
    ("arguments", "python", "says"),
    [
        (["run"], (), "say what to run"),
        (["run", "-m"], (), "say what to run"),
        (["run", "--dispatch", "nope", "x.py"], (), "'nope' is not one of"),
        (["run", "x.py"], ("-I",), "leave them out"),
        (["run", "-I", "x.py"], (), "-I: give python's options before -m"),
        (["run", "-Xdev", "x.py"], (), "-Xdev: give python's options before -m"),
        (["ran"], (), "No such command 'ran'"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], python: tuple[str, ...], says: str) -> None:
    ran = compat(*arguments, python=python)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "python",
    [
        ["-u", "-W", "error", "-m", "reqtable.compat"],
        ["-Werror", "-um", "reqtable.compat"],
        ["-u", "-Werror", "-mreqtable.compat"],
    ],
)
def test_the_interpreters_own_options_are_kept(python: list[str]) -> None:
    program = "import sys; print(sys.warnoptions, sys.stdout.write_through)"
    command = [sys.executable, *python, "run", "-c", program]
    ran = subprocess.run(command, env=PLAIN, capture_output=True, text=True, timeout=WAIT_S)
    assert (ran.stdout, ran.stderr) == ("['error'] True\n", "")


def test_names_that_programs_patch_are_there() -> None:
    program = "import socketserver; print(socketserver.socket.socket, socketserver.threading, socketserver.os.fork)"
    assert compat("run", "-c", program).stderr == ""


OWN_NAMES = """
import socketserver

class Server(socketserver.TCPServer):
    def __init__(self, *args):
        super().__init__(*args)
        self.table = {}
        self.engine = "an engine of mine"
        self.stats = 0

    @property
    def dispatcher(self):
        return self._mine

    @dispatcher.setter
    def dispatcher(self, value):
        self._mine = value

    def dispatch(self, *args):
        return "dispatched"

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        server = self.server
        server.dispatcher = 3
        self.wfile.write(repr((server.table, server.engine, server.dispatcher, server.dispatch())).encode())

with Server(("127.0.0.1", 0), Handler) as server:
    print("port", server.server_address[1], flush=True)
    server.serve_forever()
"""


@pytest.mark.parametrize("dispatch", [None, "greenlet", "pool"])
def test_a_program_may_use_our_names_for_its_own(dispatch: str | None, tmp_path: Path) -> None:
    program = Program(["-c", OWN_NAMES], tmp_path, dispatch)
    try:
        with program.connect() as client:
            assert client.makefile("rb").read() == b"({}, 'an engine of mine', 3, 'dispatched')"
    finally:
        program.end()


def test_the_path_that_there_was_stays() -> None:
    assert environment("pool", {"PYTHONPATH": "/a", "X": "y"}) == {
        "PYTHONPATH": f"{REPLACEMENT}{os.pathsep}/a",
        "X": "y",
        "REQTABLE_DISPATCH": "pool",
    }
    assert environment(base={}) == {"PYTHONPATH": str(REPLACEMENT)}


# -- the names --------------------------------------------------------------------------------------------------------

# `socketserver.__all__` of 3.11 on Unix, and what 3.12 added; 3.13 and 3.14 added nothing.
PUBLIC = [
    "BaseRequestHandler",
    "BaseServer",
    "DatagramRequestHandler",
    "ForkingMixIn",
    "ForkingTCPServer",
    "ForkingUDPServer",
    "ForkingUnixDatagramServer",
    "ForkingUnixStreamServer",
    "StreamRequestHandler",
    "TCPServer",
    "ThreadingMixIn",
    "ThreadingTCPServer",
    "ThreadingUDPServer",
    "ThreadingUnixDatagramServer",
    "ThreadingUnixStreamServer",
    "UDPServer",
    "UnixDatagramServer",
    "UnixStreamServer",
]


def test_every_public_name_is_there() -> None:
    import socketserver

    assert set(PUBLIC) >= set(socketserver.__all__)
    assert set(PUBLIC) <= set(reqtable.__all__)
    namespace: dict[str, Any] = {}
    exec((REPLACEMENT / "socketserver.py").read_text(), namespace)
    assert sorted(namespace["__all__"]) == PUBLIC
    for name in PUBLIC:
        assert namespace[name] is getattr(reqtable, name)


def test_no_import_of_ours_needs_the_module_that_is_replaced() -> None:
    ran = compat("run", "-c", "import sys, reqtable, reqtable.run.cli; print('socketserver' in sys.modules)")
    assert ran.stdout == "False\n"
