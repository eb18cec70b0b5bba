"""Measures what an operator costs the clients: `python -m tests.benchmarks.looking [ROWS]`.

A server has ROWS idle connections (10,000), and one honest client, which sends a line after each answer. The client is
measured while nobody looks, and while all rows are streamed again and again and `reqtable top` runs. The clients and
the operator run in processes of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.control import Operator

ROOT = Path(__file__).parent.parent.parent
LINES = 3000
READER = """
import sys
from tests.control import Operator
operator, count = Operator(sys.argv[1]), 0
print("begun", flush=True)
while True:
    assert len(operator.ask("/v1/requests?format=ndjson")[1].splitlines()) >= int(sys.argv[2])
"""


@contextlib.contextmanager
def running(*command: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, cwd=ROOT, text=True, **options) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def echo_ms(port: int) -> list[float]:
    """Return how long each line of the honest client took, sorted."""
    took = []
    with socket.create_connection(("127.0.0.1", port)) as own:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(LINES):
            begun = time.perf_counter()
            own.sendall(b"hello\n")
            assert own.recv(100) == b"hello\n"
            took.append((time.perf_counter() - begun) * 1e3)
    return sorted(took)


def shown(name: str, took: list[float]) -> None:
    print(f"{name}: p50 {took[len(took) // 2]:.2f} ms, p99 {took[len(took) * 99 // 100]:.2f} ms, max {took[-1]:.2f} ms")


def main() -> int:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "c.sock")
        environment = {**os.environ, "REQTABLE_CONTROL": path}
        command = (sys.executable, "-m", "reqtable", "serve", "tests/stuck.py:Stuck", "--bind", "tcp://127.0.0.1:0")
        with running(*command, env=environment, stdout=subprocess.PIPE) as server, contextlib.ExitStack() as stack:
            assert server.stdout is not None
            port = int(server.stdout.readline().rpartition(":")[2])
            for _ in range(rows):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            echo_ms(port)
            shown("nobody looks", echo_ms(port))
            operator = Operator(path)
            for _ in range(5):
                before = operator.get("/v1/stats")["loop"]["busy_s"]
                begun = time.perf_counter()
                assert len(operator.get("/v1/requests?sort=age&limit=100")) == 100
                took = time.perf_counter() - begun
                busy = operator.get("/v1/stats")["loop"]["busy_s"] - before
                print(
                    f"ps of the oldest 100: {took * 1e3:.1f} ms; with a look at stats {busy * 1e3:.1f} ms of the loop"
                )
            with running(sys.executable, "-c", READER, path, str(rows), stdout=subprocess.PIPE) as reader:
                top = (sys.executable, "-m", "reqtable", "top", "--interval", "1", "--control", path)
                with running(*top, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL):
                    assert reader.stdout is not None
                    reader.stdout.readline()
                    time.sleep(1.5)  # until top has begun
                    shown("all rows streamed, and top", echo_ms(port))
            print(json.dumps(operator.get("/v1/stats")["loop"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
