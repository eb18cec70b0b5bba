"""Lists the Python calls that a request makes in the package, for the second connection of a server.

`accept` lasts from a readable listening socket until the request waits for input. `line` lasts from the arrival of a
line until its answer is sent. `end` lasts from the end of the client's input until the row is removed and the
connection is closed. Only functions of the package count, or of `socketserver` and the modules that it uses.
Comprehensions and calls in a forked child don't count. The beginning and end of a pass do count. A call is across files
if its innermost counted caller is in another file.

    python -m tests.benchmarks.trace
    python -m tests.benchmarks.trace --list accept inline    # the calls one by one, indented by how deep they are
"""

from __future__ import annotations

import _thread
import argparse
import os
import selectors
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import Any

import reqtable

PACKAGE = Path(reqtable.__file__).parent
OURS = {str(path): str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
STANDARD = {str(module.__file__): f"{module.__name__}.py" for module in (socketserver, socket, selectors, threading)}
PHASES = ("accept", "line", "end")
LINE = b"a line\n"
PATIENCE_S = 10.0
Call = tuple[int, str, str, bool]  # depth (in its greenlet), file, function, whether the call is across files
Step = Callable[[], Any]


class Calls:
    """Records the calls of functions in `files` while `phase` is set. `files` gives each path a short name."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.phase: str | None = None
        self.of: dict[str, list[Call]] = {}
        self.on_wait: Step = bool  # called when a handler is about to read

    def trace(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and argument.__name__ == "recv_into":
            self.on_wait()
        if event != "call" or self.phase is None or not self.counts(frame):
            return
        files = [self.files[each.f_code.co_filename] for each, _ in walk_stack(frame) if self.counts(each)]
        is_across = len(set(files[:2])) > 1
        self.of.setdefault(self.phase, []).append((len(files) - 1, files[0], frame.f_code.co_qualname, is_across))

    def counts(self, frame: FrameType) -> bool:
        return frame.f_code.co_filename in self.files and not frame.f_code.co_name.endswith(("comp>", "expr>"))

    def during(self, phase: str, function: Step) -> None:
        self.phase = phase
        function()
        self.phase = None


class States(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line(limit=1024))
    def echo(self, text: bytes) -> Any:
        self.send(text)
        return self.echo


class Blocking(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


@contextmanager
def driven(server: Any) -> Iterator[tuple[Step, Step]]:
    """Yield a function that runs one pass, and a function that tells whether there are requests, for our server.

    Only this function knows the inside of a loop.
    """
    from reqtable.loop.process import LOOPS

    engine, thread = server.engine, threading.get_ident()
    engine.listeners.listen(server)
    engine.table.thread, LOOPS[thread] = thread, engine.loop  # as `run` has it
    yield lambda: engine.loop.run_once(PATIENCE_S), lambda: len(engine.table)
    del LOOPS[thread]
    engine.table.thread = None


@contextmanager
def driven_standard(server: Any) -> Iterator[tuple[Step, Step]]:
    """Yield the same functions for a server of `socketserver`. A pass is one turn of the loop in `serve_forever`."""
    with selectors.PollSelector() as selector:
        selector.register(server, selectors.EVENT_READ)

        def run_pass() -> None:
            if selector.select(0.5):
                server._handle_request_noblock()
            server.service_actions()

        yield run_pass, lambda: server.active_children


def connect(calls: Calls, client: socket.socket, run_pass: Step, has_requests: Step, in_child: bool = False) -> None:
    """Trace a connection that is served on the loop, or in a child."""
    calls.during("accept", run_pass)
    client.sendall(LINE)
    if not in_child:
        calls.during("line", run_pass)
    assert client.recv(len(LINE)) == LINE
    client.shutdown(socket.SHUT_WR)
    while has_requests():
        calls.during("end", run_pass)


def connect_blocking(calls: Calls, client: socket.socket, run_pass: Step, has_requests: Step) -> None:
    """Trace a connection whose handler blocks, in the pass or in a thread. When it waits, the client goes on."""
    gate = threading.RLock()  # holds up a handler's thread until the pass is over

    def steps() -> Iterator[None]:
        with gate:
            client.sendall(LINE)
        calls.phase = "line"
        yield
        assert client.recv(len(LINE)) == LINE
        client.shutdown(socket.SHUT_WR)
        calls.phase = "end"
        yield

    threads = _thread._count()
    calls.on_wait = steps().__next__
    calls.phase = "accept"
    with gate:
        run_pass()
    while _thread._count() > threads:
        os.sched_yield()
    calls.phase = None


connect_forked = partial(connect, in_child=True)
CASES: dict[str, tuple[Any, Any, Any]] = {
    "inline": (partial(reqtable.TCPServer, dispatch="inline"), States, connect),
    "greenlet": (partial(reqtable.TCPServer, dispatch="greenlet"), Blocking, connect),
    "fork": (partial(reqtable.TCPServer, dispatch="fork"), Blocking, connect_forked),
    "fork-state": (partial(reqtable.TCPServer, dispatch="fork"), States, connect_forked),
    "TCPServer": (socketserver.TCPServer, Blocking, connect_blocking),
    "ThreadingTCPServer": (socketserver.ThreadingTCPServer, Blocking, connect_blocking),
    "ForkingTCPServer": (socketserver.ForkingTCPServer, Blocking, connect_forked),
}


def traced(name: str) -> dict[str, list[Call]]:
    """Return the calls of a case, by phase."""
    make, handler, trace = CASES[name]
    server = make(("127.0.0.1", 0), handler)
    drive = driven if isinstance(make, partial) else driven_standard
    calls = Calls(OURS if drive is driven else STANDARD)
    threading.setprofile(calls.trace)
    sys.setprofile(calls.trace)
    try:
        with server, drive(server) as driver:
            for _ in range(2):  # the first connection warms everything up
                calls.of.clear()
                with socket.create_connection(server.server_address, PATIENCE_S) as client:
                    trace(calls, client, *driver)
                    assert client.recv(1) == b""
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls.of


def figures(calls: list[Call]) -> tuple[int, int, int]:
    """Return the number of calls, of files, and of calls across files."""
    return len(calls), len({file for _, file, *_ in calls}), sum(is_across for *_, is_across in calls)


def main() -> None:
    os.environ["REQTABLE_DEBUG"] = "0"  # else each pass checks the invariants
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.trace")
    parser.add_argument("--list", nargs=2, choices=[*PHASES, *CASES], metavar=("PHASE", "CASE"))
    if chosen := parser.parse_args().list:
        for depth, file, function, _ in traced(chosen[1]).get(chosen[0], []):
            print(f"{'  ' * depth}{file}:{function}")
        return
    print(f"{'calls, files, across files':28}" + "".join(f"{phase:>14}" for phase in PHASES))
    for name in CASES:
        of = traced(name)
        cells = [", ".join(map(str, figures(of[phase]))) if phase in of else "(child)" for phase in PHASES]
        print(f"{name:28}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
