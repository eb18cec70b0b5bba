"""The processes of a measurement: servers and load run on separate cores, and the operating system measures them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
PATIENCE_S = 60.0  # a process that prints nothing for so long is killed, and its measurement fails
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]
QUEUE = 1024  # the kernel's queue of connections to the upstream side of a forwarder
# As users run reqtable: no invariants are checked, and nothing is configured.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("REQTABLE_")}


class Failed(Exception):
    """Raised when a measurement fails. The message says what was measured."""


@dataclass(frozen=True)
class Cpu:
    """Holds seconds of processor time. `total` is exact; `user` and `system` are sampled a hundred times a second."""

    total: float = 0.0
    user: float = 0.0
    system: float = 0.0

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(self.total + other.total, self.user + other.user, self.system + other.system)

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.total - other.total, self.user - other.user, self.system - other.system)


def cpu_of(pid: int) -> Cpu:
    """Return the processor time of a process, its threads and its children, both living and reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total = time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3): has nanoseconds; stat has ticks
    except OSError:
        return Cpu()  # the process has ended: its time now counts in its parent
    user, system, waited_user, waited_system = (int(each) / TICKS for each in fields[11:15])
    waited = waited_user + waited_system
    own = Cpu(total + waited, user + waited_user, system + waited_system)
    return sum((cpu_of(int(child)) for child in children), own)


def family_of(pid: int) -> list[int]:
    """Return a process and all of its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in family_of(int(child)))]


class Process:
    """Runs a program on one core and exchanges lines with it. The end of the block kills it and all its children."""

    def __init__(self, command: list[str], core: int, descriptors: Sequence[int] = ()) -> None:
        self.command = command
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            pass_fds=descriptors,
        )
        self.pid = self.process.pid
        os.sched_setaffinity(self.pid, {core})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.end()
        self.process.communicate()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def line(self) -> str:
        """Return the next line that the program prints. Raises Failed if it ends, or prints nothing for too long."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        patience = threading.Timer(PATIENCE_S, self.end)
        patience.start()
        try:
            text = self.process.stdout.readline()
        finally:
            patience.cancel()
            patience.join()
        if not text:
            said = self.process.stderr.read().strip().splitlines()
            raise Failed(f"{' '.join(self.command[-2:])}: {said[-1] if said else 'it printed nothing'}")
        return text.strip()

    def tell(self) -> None:
        """Send a line, which tells the program to go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


class Server(Process):
    """Runs a peer that serves one kind of work. A forwarder connects to `upstream`, a listening socket."""

    upstream: socket.socket | None = None

    def __init__(self, command: list[str], upstream: socket.socket | None = None, core: int = SERVER_CORE) -> None:
        port = [] if upstream is None else [str(upstream.getsockname()[1])]
        self.upstream = upstream
        super().__init__([*command, *port], core)
        try:
            self.port = int(self.line())
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *args: object) -> None:
        super().__exit__()
        if self.upstream is not None:
            self.upstream.close()

    @property
    def cpu(self) -> Cpu:
        return cpu_of(self.pid)

    def run_on(self, cores: set[int]) -> None:
        """Let all threads of the server and of its children run on these cores."""
        for pid in family_of(self.pid):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.sched_setaffinity(int(thread), cores)

    @property
    def memory_kib(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])


@dataclass
class Tools:
    """Starts servers and loads. Holds the paths of the compiled C programs and of redis-benchmark."""

    load: str
    floor: str
    relay: str = ""
    http: str = ""
    relay_floor: str = ""
    redis: str | None = field(default_factory=lambda: shutil.which("redis-benchmark"))

    def server(self, peer: str, kind: str) -> Server:
        upstream = socket.create_server(("127.0.0.1", 0), backlog=QUEUE) if kind.startswith("forward") else None
        if peer != "floor":
            return Server([sys.executable, "-m", "tests.benchmarks.servers", peer, kind], upstream)
        if upstream is not None:
            return Server([self.relay_floor, kind], upstream)
        if kind == "publish":
            return Server([self.relay_floor, kind, "0"])
        transport = "udp" if kind == "datagrams" else "tcp"
        return Server([self.floor, transport, str(2**20 if kind == "answers" else 0)])

    @contextlib.contextmanager
    def clients(self, *arguments: object) -> Iterator[Process]:
        """Start the load (see load.c), connected and warm. `tell()` makes it begin."""
        with ready([self.load, *map(str, arguments)]) as load:
            yield load

    @contextlib.contextmanager
    def browsing(
        self, kind: str, server: Server, connections: int, size: int = 0, slow: int = 0, amount: float = 0
    ) -> Iterator[Process]:
        """Start the load of an HTTP server (see http.c)."""
        with ready([self.http, kind, *map(str, (server.port, connections, size, slow, amount))]) as load:
            yield load

    @contextlib.contextmanager
    def relayed(self, kind: str, server: Server, connections: int, amount: float, last: int = 0) -> Iterator[Process]:
        """Start the load for a server that talks to more than one peer (see relay.c)."""
        descriptors = [] if server.upstream is None else [server.upstream.fileno()]
        arguments = [kind, *map(str, (server.port, connections, amount, *(descriptors or [last])))]
        with ready([self.relay, *arguments], descriptors) as load:
            yield load


@contextlib.contextmanager
def ready(command: list[str], descriptors: Sequence[int] = ()) -> Iterator[Process]:
    with Process(command, LOAD_CORE, descriptors) as load:
        if load.line() != "ready":
            raise Failed("the load is not ready")
        yield load


@contextlib.contextmanager
def tools() -> Iterator[Tools]:
    """Compile the C programs. Raises Failed without a compiler: a load in Python would be slower than the servers."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Failed("the load is written in C: install a C compiler, or name yours, as in: CC=clang make bench")
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("load", "floor", "relay", "http", "relay_floor")]
        for path in paths:
            subprocess.run([compiler, "-O2", "-o", path, str(HERE / f"{Path(path).name}.c")], check=True)
        yield Tools(*paths)


def load_of(process: Process) -> dict[str, Any]:
    """Return the figures that the load prints when it is done."""
    figures: dict[str, Any] = json.loads(process.line())
    return figures
