"""The command `reqtable wsgi`: its options, its workers, and its errors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading

import pytest

from tests.pages import write_files
from tests.support import WAIT_S, Client

HELLO = """
import os
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{environ['SCRIPT_NAME']} {environ['PATH_INFO']} {os.getpid()} {environ['wsgi.multiprocess']}".encode()]
def make():
    return app
"""

PROXY = """
class Proxy:
    def __call__(self): pass
    def __getattr__(self, name): raise RuntimeError("Working outside of request context.")
request = Proxy()  # as Flask has it
"""


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site_of_tests.py").write_text(textwrap.dedent(HELLO))
    return tmp_path


class Running:
    """A running command, its port, and the lines that it has written so far."""

    def __init__(self, process, folder):
        self.process = process
        self.folder = folder
        self.lines = []
        self.came = threading.Condition()
        self.readers = [threading.Thread(target=self._read, args=(each,)) for each in (process.stdout, process.stderr)]
        for each in self.readers:
            each.start()

    def _read(self, stream):
        with stream:
            for line in stream:
                with self.came:
                    self.lines.append(line.rstrip("\n"))
                    self.came.notify_all()

    def line(self, pattern, count=1):
        """Wait for the `count`th line that matches. Returns the match."""

        def found():
            return [match for match in (re.search(pattern, each) for each in list(self.lines)) if match][count - 1 :][
                :1
            ]

        with self.came:
            assert self.came.wait_for(found, WAIT_S), (pattern, self.lines)
            return found()[0]

    def port(self, count=1):
        return int(self.line(r"^serving WSGI on tcp://127.0.0.1:(\d+)", count)[1])

    def get(self, target=b"/", count=1):
        with Client(("127.0.0.1", self.port(count))) as client:
            client.send(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % target)
            return client.rest()


@contextlib.contextmanager
def running(folder, *arguments):
    """Run `reqtable wsgi` in a folder during the block."""
    command = [sys.executable, "-m", "reqtable", "wsgi", "--bind", "tcp://127.0.0.1:0", *arguments]
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command, cwd=folder, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    command = Running(process, folder)
    try:
        yield command
    finally:
        process.terminate()
        try:
            process.wait(WAIT_S)
        finally:
            process.kill()
            process.wait()
        for each in command.readers:
            each.join(WAIT_S)


def refused(folder, *arguments):
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "reqtable", "wsgi", *arguments], cwd=folder, capture_output=True, text=True,
        timeout=WAIT_S, check=False, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["site_of_tests:app", "site_of_tests.py:app", "site_of_tests", "site_of_tests:make()"])
def test_an_application_is_named(site, name):
    with running(site, name, "--prefix", "/p") as command:
        assert b"\r\n\r\n/p /a " in command.get(b"/p/a")


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "fork"])
def test_every_policy(site, dispatch):
    with running(site, "site_of_tests:app", "--dispatch", dispatch, "--health-path", "/up") as command:
        assert command.get(b"/a").endswith(b" True" if dispatch == "fork" else b" False")
        assert command.get(b"/up").endswith(b"ok\n")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_access_log_goes_to_the_output(site, log_format):
    options = ["--access-log", "--log-format", log_format, "--health-path", "/up"]
    with running(site, "site_of_tests:app", *options) as command:
        port = int(command.line(r"serving WSGI on tcp://127.0.0.1:(\d+)")[1])
        for path in (b"/up", b"/a?b"):
            with Client(("127.0.0.1", port)) as client:
                client.send(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path)
                client.rest()
        line = command.line("^.*/a.b.*$")[0]
        if log_format == "json":
            fields = json.loads(line)
            assert (fields["target"], fields["status"], fields["is_whole"]) == ("/a?b", 200, True)
        else:
            number = r'"GET /a\?b HTTP/1.1" 200 \d+ "-" "-" [0-9a-f]{8}-\d+ \d+\.\d{3}$'
            assert re.search(r"^127.0.0.1 - - \[.*\] " + number, line), line
        assert not [each for each in command.lines if "/up" in each]


def test_a_worker_ends_after_its_requests(site):
    with running(site, "site_of_tests:app", "--workers", "2", "--max-requests", "3") as command:
        command.line("2 of 2 workers are ready|2 workers")
        seen = set()
        for _ in range(200):
            seen.add(command.get().rsplit(b" ", 2)[1])
            if len(seen) > 2:
                break
        assert len(seen) > 2
        command.line("has had its requests")


def test_the_code_is_reloaded(site):
    with running(site, "site_of_tests:app", "--reload-code") as command:
        assert command.get().startswith(b"HTTP/1.1 200")
        file = site / "site_of_tests.py"
        file.write_text("def app(environ, start_response: broken")
        command.line("waiting for a change")
        file.write_text(HELLO.replace("200 OK", "203 New"))
        assert command.get(count=2).startswith(b"HTTP/1.1 203")


def test_a_thing_that_can_not_be_looked_at_is_no_candidate(site):
    (site / "proxied_of_tests.py").write_text(f"{PROXY}\n{HELLO}")
    code, text = refused(site, "proxied_of_tests:appp")
    assert code == 2
    assert text.endswith("proxied_of_tests has no appp; applications there: app\n"), text


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["site_of_tests:none"], 2, "site_of_tests has no none; applications there: app"),
        (["site_of_tests:make"], 2, "if it makes the application, write site_of_tests:make()"),
        (["site_of_tests:app", "--threads", "2", "--dispatch", "fork"], 78, "--threads is for policy 'pool'"),
        (["site_of_tests:HOST"], 2, "has no HOST"),
        (["none_of_tests:app"], 2, "can't be imported"),
        (["site_of_tests:app", "--dispatch", "executor"], 78, "can't run a WSGI application"),
        (["site_of_tests:app", "--max-requests", "5"], 78, "needs --workers"),
        (["site_of_tests:app", "--reload-code", "--workers", "2"], 78, "leave --workers out"),
        (["site_of_tests:app", "--timeout", "2", "--dispatch", "thread"], 78, "set [limits] request_timeout_s"),
        (["site_of_tests:app", "--trust-proxy", "home"], 78, "--trust-proxy has 'home'"),
        (["site_of_tests:app", "--prefix", "app/"], 2, "with a slash before it"),
    ],
)
def test_errors_are_one_line(site, arguments, status, words):
    code, text = refused(site, *arguments)
    assert (code, words in text) == (status, True), text


SLEEPS = """
import time
def app(environ, start_response):
    try:
        time.sleep(30)
    except Exception:
        pass
    start_response("200 OK", [])
    return []
"""


def test_the_loop_is_interrupted_at_the_deadline(site):
    (site / "sleeps_of_tests.py").write_text(SLEEPS)
    with running(site, "sleeps_of_tests:app", "--dispatch", "inline", "--timeout", "0.2") as command:
        assert command.get().startswith(b"HTTP/1.1 504 ")
        assert command.get().startswith(b"HTTP/1.1 504 ")


@pytest.mark.parametrize("module", ["hello", "program"])
def test_the_applications_of_the_page_on_wsgi_run(module, tmp_path):
    write_files("docs/how-to/serve-wsgi.md", tmp_path)
    with running(tmp_path, f"{module}:app") as command:
        assert command.get().endswith(b"\r\n\r\nHello\n")
