"""The servers that are restarted: reqtable's, and those of others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from tests.moving import versions
from tests.moving.load import ROOT
from tests.moving.tally import WAIT_S
from tests.service import children_of, state_of

HOST = "127.0.0.1"
GRACE_S = 5  # how long an old process has for its connections, if its successor serves already
STOP_S = 1  # the same, if nothing serves meanwhile
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


class NotStarted(Exception):
    """A program is not installed, or did not start. The message says which."""


def until(condition: Callable[[], object], what: str, within_s: float = WAIT_S) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            raise NotStarted(f"{what}: not within {within_s:.0f} s")
        time.sleep(0.005)


def free_port() -> int:
    with socket.create_server((HOST, 0)) as bound:
        port: int = bound.getsockname()[1]
        return port


def family_of(pid: int) -> list[int]:
    """Return the living descendants of a process."""
    return [other for child in children_of(pid) for other in (child, *family_of(child))]


class Server:
    """A program, and all processes that it leaves or starts, while it is entered.

    A process in between adopts each process whose parent ends, so that none of them is lost sight of.
    """

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.log = folder / f"{type(self).__name__}.log"

    def command(self) -> list[str]:
        raise NotImplementedError

    def restart(self) -> None:
        """Restart without cutting off a client, as its pages say. Returns when that is done."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._adopter: subprocess.Popen[bytes] | None = None
        self._start()
        return self

    def _start(self) -> None:
        command = self.command()
        if shutil.which(command[0]) is None:
            raise NotStarted(f"{command[0]} is not installed")
        with self.log.open("ab") as log:
            self._adopter = subprocess.Popen(
                [sys.executable, "-m", "tests.moving.servers", *command],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        until(self._answers, f"{command[0]} listens (see {self.log})")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), WAIT_S):
            return True
        if self._adopter is not None and self._adopter.poll() is not None:
            raise NotStarted(f"{self.command()[0]} has ended:\n{self.log.read_text()[-2000:]}")
        return False

    def __exit__(self, *_: object) -> None:
        if self._adopter is not None:
            while pids := self.processes():
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._adopter.wait(WAIT_S)

    def processes(self) -> list[int]:
        """Return all processes of the program, zombies left out."""
        assert self._adopter is not None
        return [pid for pid in family_of(self._adopter.pid) if state_of(pid) not in "ZX"]

    def wait_gone(self, old: list[int]) -> None:
        """Wait until these processes have ended."""
        until(lambda: not set(old) & set(self.processes()), f"the old processes {old} have ended")

    def first(self) -> int:
        """Return the process that the others come from."""
        return self.processes()[0]

    def seen(self, pattern: str) -> int:
        """Return how many times something is in the log."""
        return len(re.findall(pattern, self.log.read_text(errors="replace")))


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def adopt() -> int:
    """Run a command, and wait until it and all of its descendants have ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1)
    subprocess.Popen(sys.argv[1:])
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return 0


# -- reqtable ---------------------------------------------------------------------------------------------------------


class Reqtable(Server):
    """`reqtable serve` of one process, with a handler that another version takes the place of at each restart."""

    name = "reqtable, `reqtable restart`"
    write = staticmethod(versions.write_ledger)
    handler = "Ledger"
    options: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.version = 1
        self.control = folder / "control.sock"
        self.path = folder / "served.py"
        self.write(self.path, self.version)

    def command(self) -> list[str]:
        bind = f"tcp://{HOST}:{self.port}"
        return [
            sys.executable, "-m", "reqtable", "serve", f"{self.path}:{self.handler}", "--bind", bind,
            "--control", str(self.control), *self.options,
        ]  # fmt: skip

    def ask(self, *words: str) -> str:
        """Run a command that asks the server. Returns what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "reqtable", *words, "--control", str(self.control)],
            cwd=ROOT, capture_output=True, text=True, timeout=4 * WAIT_S,
        )  # fmt: skip
        if done.returncode:
            raise NotStarted(f"reqtable {' '.join(words)} exits with {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def renew(self) -> None:
        """Write the next version of the handler."""
        self.version += 1
        self.write(self.path, self.version)

    def restart(self) -> None:
        self.renew()
        before = self.processes()
        self.said = self.ask("restart")
        self.wait_gone(before)


class ReqtableHttp(Reqtable):
    """The same, with a handler of HTTP."""

    name = "reqtable, HTTP, `reqtable restart`"
    write = staticmethod(versions.write_http)
    handler = "Shop"


class ReqtableWebSockets(ReqtableHttp):
    """The same, with WebSockets."""

    handler = "Echo"


class StoppedReqtable(Reqtable):
    """Stopped by SIGTERM, and started again: what a restart costs if nothing moves."""

    name = "reqtable, stopped and started"

    @property
    def options(self) -> tuple[str, ...]:  # type: ignore[override]
        path = self.folder / "reqtable.toml"
        path.write_text(f"[limits]\ndrain_timeout_s = {STOP_S}\n")
        return "--config", str(path)

    def restart(self) -> None:
        self.renew()
        assert self._adopter is not None
        os.kill(self.first(), signal.SIGTERM)
        self._adopter.wait(WAIT_S)
        self._start()


class ReloadedReqtable(Reqtable):
    """Two workers, which are replaced one after another: the old ones are drained."""

    name = "reqtable --workers 2, `reqtable reload`"
    _changes = 0

    @property
    def options(self) -> tuple[str, ...]:  # type: ignore[override]
        self._configure()
        return "--workers", "2", "--config", str(self.folder / "reqtable.toml")

    def _configure(self) -> None:
        """Change a value that matters to nobody here: else a reload would replace no worker."""
        self._changes += 1
        new = self.folder / "reqtable.new"
        new.write_text(f"[limits]\ndrain_timeout_s = {GRACE_S}\n[fork]\nmax_children = {1000 + self._changes}\n")
        os.replace(new, self.folder / "reqtable.toml")

    def restart(self) -> None:
        self.renew()
        self._configure()
        master, *old = self.processes()
        ready = self.seen(r"2 of 2 workers are ready")
        os.kill(master, signal.SIGHUP)
        until(lambda: self.seen(r"2 of 2 workers are ready") > ready, "two new workers are ready")
        self.wait_gone(old)


# -- others -----------------------------------------------------------------------------------------------------------

WEB = """
import zlib

PIECE = {piece}


def pieces_of(path):
    return [(b"%d." % left * PIECE)[:PIECE] for left in reversed(range(int(path.rpartition("/")[2])))]


def wsgi(environ, start_response):
    path, size, crc = environ["PATH_INFO"], 0, 0
    while piece := environ["wsgi.input"].read(65536):
        size, crc = size + len(piece), zlib.crc32(piece, crc)
    if path.startswith("/give/"):
        body = pieces_of(path)
    elif path == "/take":
        body = [b"%d %d" % (size, crc)]
    else:
        body = [path.rpartition("/")[2].encode()]
    start_response("200 OK", [("Content-Length", str(sum(map(len, body))))])
    return body


async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        while (message := await receive()) and message["type"] == "lifespan.startup":
            await send({{"type": "lifespan.startup.complete"}})
        await send({{"type": "lifespan.shutdown.complete"}})
        return
    path, size, crc = scope["path"], 0, 0
    while True:
        message = await receive()
        piece = message.get("body", b"")
        size, crc = size + len(piece), zlib.crc32(piece, crc)
        if not message.get("more_body"):
            break
    if path.startswith("/give/"):
        body = pieces_of(path)
    elif path == "/take":
        body = [b"%d %d" % (size, crc)]
    else:
        body = [path.rpartition("/")[2].encode()]
    length = str(sum(map(len, body))).encode()
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]}})
    for piece in body:
        await send({{"type": "http.response.body", "body": piece, "more_body": True}})
    await send({{"type": "http.response.body"}})
"""


class Web(Server):
    """Serves an application in Python, by two workers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "web.py").write_text(WEB.format(piece=versions.PIECE_BYTES))

    def _start(self) -> None:
        super()._start()
        until(lambda: self.seen(self.booted) >= 2, "two workers have started")

    booted = ""

    def signal(self, master: int, number: signal.Signals) -> None:
        """Send a signal, and wait until two new workers have started."""
        started = self.seen(self.booted)
        os.kill(master, number)
        until(lambda: self.seen(self.booted) >= started + 2, "new workers have started")


class Uvicorn(Web):
    """Two workers: SIGHUP replaces one after another."""

    name = "uvicorn --workers 2, HUP"
    booted = "Application startup complete"
    grace_s = GRACE_S

    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "uvicorn", "web:asgi", "--app-dir", str(self.folder), "--workers", "2",
            "--port", str(self.port), "--timeout-keep-alive", "60", "--no-access-log", "--lifespan", "on",
            "--timeout-graceful-shutdown", str(self.grace_s),
        ]  # fmt: skip

    def restart(self) -> None:
        workers = [pid for pid in self.processes() if pid != self.first() and "resource_tracker" not in command_of(pid)]
        self.signal(self.first(), signal.SIGHUP)
        self.wait_gone(workers)


class RestartedUvicorn(Uvicorn):
    """One process, stopped by SIGTERM and started again by its manager."""

    name = "uvicorn, stopped and started"
    grace_s = STOP_S

    def command(self) -> list[str]:
        return [each for each in super().command() if each not in ("--workers", "2")]

    def _start(self) -> None:
        Server._start(self)

    def restart(self) -> None:
        assert self._adopter is not None
        os.kill(self.first(), signal.SIGTERM)
        self._adopter.wait(WAIT_S)
        self._start()


class Gunicorn(Web):
    """Two workers with four threads each: SIGHUP replaces them."""

    name = "gunicorn --workers 2 --threads 4, HUP"
    booted = "Booting worker with pid"

    @property
    def pid_file(self) -> Path:
        return self.folder / "gunicorn.pid"

    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "gunicorn", "web:wsgi", "--chdir", str(self.folder), "--workers", "2",
            "--worker-class", "gthread", "--threads", "4", "--keep-alive", "60", "--bind", f"{HOST}:{self.port}",
            "--graceful-timeout", str(GRACE_S), "--no-control-socket", "--daemon", "--pid", str(self.pid_file),
            "--log-file", str(self.log),
        ]  # fmt: skip

    def restart(self) -> None:
        master, *old = self.processes()
        self.signal(master, signal.SIGHUP)
        self.wait_gone(old)


class UpgradedGunicorn(Gunicorn):
    """Two masters for a while: USR2 to the old one, then WINCH and QUIT."""

    name = "gunicorn --workers 2 --threads 4, USR2 WINCH QUIT"

    def restart(self) -> None:
        master, *old = self.processes()
        self.signal(master, signal.SIGUSR2)
        os.kill(master, signal.SIGWINCH)
        self.wait_gone(old)
        os.kill(master, signal.SIGQUIT)
        self.wait_gone([master])
        until(lambda: self.pid_file.exists() and self.pid_file.read_text().strip() == str(self.first()), "the pid file")


NGINX = """
user {user}; worker_processes 2; worker_shutdown_timeout {grace_s}s;
pid {folder}/nginx.pid; error_log {folder}/error.log notice;
events {{ worker_connections 1024; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    keepalive_timeout 60s; keepalive_requests 1000000; sendfile on;
    server {{
        listen {host}:{port};
        location ~ ^/echo/(?<text>.*)$ {{ return 200 $text; }}
        location /give/ {{ root {folder}; }}
    }}
}}
"""


class Nginx(Server):
    """Two workers, replaced by a reload."""

    name = "nginx, reload"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "give").mkdir()
        pieces = [(b"%d." % left * versions.PIECE_BYTES)[: versions.PIECE_BYTES] for left in reversed(range(40))]
        (folder / "give" / "40").write_bytes(b"".join(pieces))
        user = pwd.getpwuid(os.getuid()).pw_name  # can read the folder
        values = {"folder": folder, "host": HOST, "port": self.port, "user": user, "grace_s": GRACE_S}
        (folder / "nginx.conf").write_text(NGINX.format(**values))
        self.pid_file = folder / "nginx.pid"

    def command(self) -> list[str]:
        program = os.environ.get("NGINX") or shutil.which("nginx") or "/usr/sbin/nginx"
        return [program, "-e", str(self.folder / "error.log"), "-c", str(self.folder / "nginx.conf")]

    def _start(self) -> None:
        super()._start()
        until(self.pid_file.exists, "the pid file")

    def workers(self, master: int) -> list[int]:
        return [pid for pid in family_of(master) if state_of(pid) not in "ZX"]

    def restart(self) -> None:
        master = int(self.pid_file.read_text())
        old = self.workers(master)
        os.kill(master, signal.SIGHUP)
        until(lambda: len(set(self.workers(master)) - set(old)) == 2, "two new workers")
        self.wait_gone(old)


class UpgradedNginx(Nginx):
    """Two masters for a while: USR2 to the old one, then WINCH and QUIT."""

    name = "nginx, USR2 WINCH QUIT"

    def restart(self) -> None:
        master = int(self.pid_file.read_text())
        old = self.workers(master)
        os.kill(master, signal.SIGUSR2)
        others = self.folder / "nginx.pid.oldbin"
        until(lambda: others.exists() and self.pid_file.exists() and self.pid_file.read_text().strip(), "a new master")
        new = int(self.pid_file.read_text())
        until(lambda: len(self.workers(new)) == 2, "two new workers")
        os.kill(master, signal.SIGWINCH)
        self.wait_gone(old)
        os.kill(master, signal.SIGQUIT)
        self.wait_gone([master])


HAPROXY = """
global
    master-worker
    stats socket {folder}/stats.sock mode 600 level admin expose-fd listeners
    {more}
defaults
    mode tcp
    timeout connect 5s
    timeout client 600s
    timeout server 600s
listen lines
    bind {host}:{port}
    server behind {host}:{behind}
"""


class Haproxy(Server):
    """A master and a worker in front of a server that isn't restarted: SIGUSR2 replaces the worker.

    The old worker stays until its last connection ends.
    """

    name = "haproxy -W, USR2, TCP"
    more = ""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.behind = Reqtable(folder)
        text = HAPROXY.format(folder=folder, host=HOST, port=self.port, behind=self.behind.port, more=self.more)
        (folder / "haproxy.cfg").write_text(text)

    def command(self) -> list[str]:
        program = os.environ.get("HAPROXY") or shutil.which("haproxy") or "/usr/sbin/haproxy"
        return [program, "-W", "-f", str(self.folder / "haproxy.cfg")]

    def __enter__(self) -> Self:
        self.behind.__enter__()
        return super().__enter__()

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self.behind.__exit__(*args)

    def restart(self) -> None:
        begun = self.seen(r"Loading success")
        os.kill(self.first(), signal.SIGUSR2)
        until(lambda: self.seen(r"Loading success") > begun, "a new worker")


class BoundedHaproxy(Haproxy):
    """The same, with a bound on how long an old worker stays for its connections."""

    name = f"haproxy -W, hard-stop-after {GRACE_S}s, USR2, TCP"
    more = f"hard-stop-after {GRACE_S}s"

    def restart(self) -> None:
        _, *old = self.processes()
        super().restart()
        self.wait_gone(old)


if __name__ == "__main__":
    sys.exit(adopt())
