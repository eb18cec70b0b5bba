"""The processes of a measurement, each on a core of its own, and what the operating system says that they took."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
PATIENCE_S = 60.0  # a process that says nothing for so long is ended, and its measurement fails
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]
# As users run it: no invariants checked, nothing configured.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("REQTABLE_")}


class Failed(Exception):
    """A measurement that came to nothing; the message says what was being done."""


@dataclass(frozen=True)
class Cpu:
    """Seconds of processor time: `total` is exact, its parts are sampled, a hundred times a second."""

    total: float = 0.0
    user: float = 0.0
    system: float = 0.0

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(self.total + other.total, self.user + other.user, self.system + other.system)

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.total - other.total, self.user - other.user, self.system - other.system)


def cpu_of(pid: int) -> Cpu:
    """What a process, its threads and its children have taken: those that live, and those that have been waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total = time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3): nanoseconds, where stat has ticks
    except OSError:
        return Cpu()  # it has ended, and is its parent's from now on
    user, system, waited_user, waited_system = (int(each) / TICKS for each in fields[11:15])
    waited = waited_user + waited_system
    own = Cpu(total + waited, user + waited_user, system + waited_system)
    return sum((cpu_of(int(child)) for child in children), own)


class Process:
    """A program on one core, spoken to by lines; ended with all its children when the block ends."""

    def __init__(self, command: list[str], core: int) -> None:
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
        """The next line that it prints. Raises Failed where it ends, or says nothing for too long."""
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
            raise Failed(f"{' '.join(self.command[-2:])}: {said[-1] if said else 'nothing was said'}")
        return text.strip()

    def tell(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


class Server(Process):
    """A peer that serves one kind of work."""

    def __init__(self, command: list[str]) -> None:
        super().__init__(command, SERVER_CORE)
        try:
            self.port = int(self.line())
        except BaseException:
            self.__exit__()
            raise

    @property
    def cpu(self) -> Cpu:
        return cpu_of(self.pid)

    @property
    def memory_kib(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])


@dataclass
class Tools:
    """The programs in C, compiled where there is a compiler."""

    load: str
    floor: str
    redis: str | None = field(default_factory=lambda: shutil.which("redis-benchmark"))

    def server(self, peer: str, kind: str) -> Server:
        if peer != "floor":
            return Server([sys.executable, "-m", "tests.benchmarks.servers", peer, kind])
        transport = "udp" if kind == "datagrams" else "tcp"
        return Server([self.floor, transport, str(2**20 if kind == "answers" else 0)])

    @contextlib.contextmanager
    def clients(self, *arguments: object) -> Iterator[Process]:
        """The load (see load.c), connected and warm; `tell()` has it begin."""
        with Process([self.load, *map(str, arguments)], LOAD_CORE) as load:
            if load.line() != "ready":
                raise Failed("the load is not ready")
            yield load


@contextlib.contextmanager
def tools() -> Iterator[Tools]:
    """Raises Failed where there is no compiler: a load in Python would be the limit, not the servers."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Failed("the load is written in C: install a compiler, or name one: CC=clang make bench")
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("load", "floor")]
        for path in paths:
            subprocess.run([compiler, "-O2", "-o", path, str(HERE / f"{Path(path).name}.c")], check=True)
        yield Tools(*paths)


def load_of(process: Process) -> dict[str, Any]:
    """What the load says that it did."""
    figures: dict[str, Any] = json.loads(process.line())
    return figures
