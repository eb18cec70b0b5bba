"""A Unix socket's path belongs to the server that is bound to it, of whatever program, until its socket is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import ConfigurationError
from reqtable.run.endpoints import find_endpoints
from reqtable.run.listening import make_server, open_server
from tests.support import WAIT_S, Client, serving
from tests.test_cli import ROOT, reqtable_serve

ECHO = "examples/echo.py:StateEcho"
NOBODY = 65534
KINDS = [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET]
SERVERS = [reqtable.UnixStreamServer, reqtable.UnixDatagramServer, reqtable.TableUnixStreamServer]
ROUNDS = 50
OPTIONS = {"allow_reuse_port": True, "allow_reuse_address": True}


class Echo(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def command(self, text: bytes) -> Any:
        self.send(text)
        return self.command


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield a path that is short enough for a Unix socket. Check that no other file is left beside it."""
    monkeypatch.chdir(tmp_path)
    yield "s"
    assert {each.name for each in tmp_path.iterdir()} <= {"s", "target"}


def leave_dead(path: str, kind: int = socket.SOCK_STREAM) -> None:
    """Leave a socket file behind, as a killed server does."""
    with socket.socket(socket.AF_UNIX, kind) as dead:
        dead.bind(path)


def listener_of(path: str) -> int:
    """Return the pid of the process that listens at `path` (unix(7), SO_PEERCRED)."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid)


def wait_until_dead(path: str) -> None:
    """Wait until no socket is bound to the path: workers without a supervisor end and close their sockets."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        while probe.connect_ex(path) != errno.ECONNREFUSED:
            os.sched_yield()


def is_refused(base: Any, path: str | bytes) -> bool:
    """Check that a server can't bind to the path. Return whether the error is right and the file was left alone."""
    before = os.lstat(path)
    with pytest.raises(OSError, match="in use") as refused:
        base(path, Echo)
    return refused.value.errno == errno.EADDRINUSE and os.path.samestat(before, os.lstat(path))


# -- what is alive ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", SERVERS)
@pytest.mark.parametrize("kind", KINDS, ids=["stream", "datagram", "seqpacket"])
def test_a_path_is_in_use_from_bind_on(base: Any, kind: int, path: str) -> None:
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(path)
        assert is_refused(base, path)
        if kind != socket.SOCK_DGRAM:
            other.listen()
            assert is_refused(base, path)
            other.setblocking(False)
            with pytest.raises(BlockingIOError):  # nobody has connected to find that out
                other.accept()
    base(path, Echo).server_close()


@pytest.mark.parametrize("base", SERVERS)
def test_a_server_that_does_not_listen_yet_keeps_its_path(base: Any, path: str) -> None:
    leave_dead(path)
    with base(path, Echo, bind_and_activate=False) as first:
        first.server_bind()
        assert is_refused(reqtable.UnixStreamServer, path)
        assert is_refused(reqtable.UnixDatagramServer, os.fsencode(path))
        first.server_activate()


def test_a_datagram_server_that_answers_one_peer_alone_keeps_its_path(path: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as busy, tempfile.TemporaryDirectory() as folder:
        busy.bind(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.bind(os.path.join(folder, "peer"))
            busy.connect(os.path.join(folder, "peer"))  # from now on others can't connect to it (EPERM)
            assert is_refused(reqtable.UnixDatagramServer, path)


def test_a_server_of_another_library_keeps_its_path(path: str) -> None:
    with socketserver.UnixStreamServer(path, socketserver.BaseRequestHandler):
        assert is_refused(reqtable.UnixStreamServer, path)
        with pytest.raises(OSError, match="address already in use: stop what uses it"):
            reqtable.serve(Echo, f"unix://{os.path.abspath(path)}")
        assert listener_of(path) == os.getpid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a socket that another user may not connect to")
def test_a_path_without_the_right_to_connect_is_in_use(path: str) -> None:
    code = (
        f"import fcntl, os, sys; sys.path[:] = {sys.path!r}; import reqtable\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "reqtable.UnixStreamServer(sys.argv[1], reqtable.BaseRequestHandler)\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        theirs = os.path.join(folder, path)
        leave_dead(theirs)
        os.chmod(theirs, 0o600)
        command = [sys.executable, "-c", code, theirs]
        result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
        assert result.stderr.endswith("OSError: [Errno 98] Address already in use\n")
        assert os.listdir(folder) == [path]


def test_what_is_no_socket_is_left_alone(path: str) -> None:
    leave_dead("target")
    os.symlink("target", path)
    assert is_refused(reqtable.UnixStreamServer, path)
    assert os.path.islink(path)
    os.unlink(path)
    os.mkfifo(path)
    assert is_refused(reqtable.UnixStreamServer, path)


# -- what is dead -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", SERVERS)
@pytest.mark.parametrize("kind", KINDS, ids=["stream", "datagram", "seqpacket"])
def test_a_dead_file_is_replaced_whatever_it_was(base: Any, kind: int, path: str) -> None:
    for address in (path, os.fsencode(path)):
        leave_dead(path, kind)
        with base(address, Echo):
            assert is_refused(base, path)
        os.unlink(path)


def test_a_dead_file_in_a_folder_that_may_not_be_written_to_is_in_use(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_dead(path)

    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    assert is_refused(reqtable.UnixStreamServer, path)


@pytest.mark.parametrize("mask", [0, 0o777])
def test_the_lock_is_for_its_owner_and_gone_afterwards(
    mask: int, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_dead(path)
    seen: list[int] = []
    unlink = os.unlink

    def look_first(name: Any) -> None:
        seen.extend(each.stat().st_mode & 0o777 for each in tmp_path.iterdir() if each.name.endswith(".lock"))
        unlink(name)

    monkeypatch.setattr(os, "unlink", look_first)
    before = os.umask(mask)
    try:
        reqtable.UnixStreamServer(path, Echo).server_close()
    finally:
        os.umask(before)
    assert set(seen) == {0o600 & ~mask}


def test_a_lock_that_a_crash_left_holds_up_nobody(path: str) -> None:
    leave_dead(path)
    Path(f".{path}.lock").touch()
    reqtable.UnixStreamServer(path, Echo).server_close()


# -- two at a time ----------------------------------------------------------------------------------------------------

RACER = """
import sys, time, reqtable
servers = []
for text in sys.stdin:
    path, at = text.split()
    while time.monotonic() < float(at):
        pass
    try:
        servers.append(reqtable.UnixStreamServer(path, reqtable.BaseRequestHandler))
        print("bound", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


def test_of_two_that_start_over_a_dead_file_one_serves_and_the_other_is_refused(path: str) -> None:
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        racers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", RACER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for _ in range(2)
        ]
        for number in range(-1, ROUNDS):  # the first one waits for both to be there
            place = os.path.join(folder, str(number))
            leave_dead(place)
            at = time.monotonic() + 0.003
            outcomes = {}
            for each in racers:
                assert each.stdin is not None
                each.stdin.write(f"{place} {at}\n")
                each.stdin.flush()
            for each in racers:
                assert each.stdout is not None
                outcomes[each.pid] = each.stdout.readline().strip()
            assert sorted(outcomes.values()) == [str(errno.EADDRINUSE), "bound"]
            assert outcomes[listener_of(place)] == "bound"
        assert len(os.listdir(folder)) == ROUNDS + 1


# -- the end of a server ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]], ids=["alone", "workers"])
def test_a_server_that_was_killed_leaves_what_the_next_one_replaces(workers: list[str], tmp_path: Path) -> None:
    place = str(tmp_path / "s")
    command = (ECHO, "--bind", f"unix://{place}", *workers)
    with reqtable_serve(*command) as (first, _):
        first.send_signal(signal.SIGKILL)
        first.wait(WAIT_S)
        assert os.path.exists(place)
        wait_until_dead(place)
        with reqtable_serve(*command) as (second, [line]):
            assert line == f"serving StateEcho on unix://{place}"
            assert listener_of(place) == second.pid
            with Client(place, socket.AF_UNIX) as client:
                assert client.ask(b"a\n") == b"a\n"
            assert is_refused(reqtable.UnixStreamServer, place)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[Any, Any]]:
    """Yield a server that was opened as by `serve`, and the function that removes its file."""
    [place] = find_endpoints([f"unix://{os.path.abspath(path)}"])
    with make_server(place, Echo, None, reqtable.Config()) as server:
        yield server, open_server(server)


def test_a_server_removes_its_own_file(path: str) -> None:
    for closes_first in (False, True):  # as a drain does
        with opened(path) as (server, remove):
            if closes_first:
                server.socket.close()
            remove()
            assert not os.path.exists(path)


def test_a_server_leaves_another_ones_file_there(path: str) -> None:
    with opened(path) as (_, remove):
        os.unlink(path)
        with reqtable.UnixStreamServer(path, Echo):
            remove()
            assert listener_of(path) == os.getpid()
    os.unlink(path)


def test_a_server_that_drained_leaves_its_successors_file_there(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds even if the file system has given the new file the same inode number."""
    with opened(path) as (server, remove):
        former = os.lstat(path)
        server.socket.close()
        with serving(reqtable.UnixStreamServer(path, Echo)) as successor:
            with monkeypatch.context() as patch:
                patch.setattr(os, "lstat", lambda _: former)
                remove()
            with Client(successor.server_address, socket.AF_UNIX) as client:
                assert client.ask(b"a\n") == b"a\n"
    os.unlink(path)


def test_a_file_that_can_not_be_given_its_permissions_is_removed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    leave_dead(path)
    monkeypatch.setattr(os, "chmod", refuse)
    [place] = find_endpoints([f"unix://{os.path.abspath(path)}?mode=600"])
    with make_server(place, Echo, None, reqtable.Config()) as server, pytest.raises(ConfigurationError):
        open_server(server)
    assert not os.path.exists(path)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", SERVERS)
def test_options_of_internet_sockets_are_not_set_on_others(base: Any, path: str) -> None:
    made = type("Server", (base,), OPTIONS)
    with made(path, Echo) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0


def test_they_are_set_on_internet_sockets() -> None:
    for base in (reqtable.TCPServer, reqtable.UDPServer):
        made = type("Server", (base,), OPTIONS)
        with made(("127.0.0.1", 0), Echo) as server:
            assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
            assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 1


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread"])
def test_a_handler_without_nagles_algorithm_serves_unix_sockets(dispatch: str, path: str) -> None:
    class Prompt(reqtable.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    with serving(reqtable.UnixStreamServer(path, Prompt, dispatch=dispatch)):
        with Client(path, socket.AF_UNIX) as client:
            assert client.ask(b"a\n") == b"a\n"
