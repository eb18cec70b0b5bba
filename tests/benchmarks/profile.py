"""Counts the bytecodes and the instructions that a request takes. No other load on the machine changes these figures.

    python -m tests.benchmarks.profile                 # a table of both
    python -m tests.benchmarks.profile --functions     # the bytecodes of each function
    python -m tests.benchmarks.profile --json          # all of it, for the page

The bytecodes are counted, not sampled, so the same Python on the same commit always gives the same numbers. A call into
C counts as one bytecode. `instructions` counts the instructions.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from itertools import repeat
from threading import get_ident
from types import FrameType
from typing import Any
from unittest import mock

import reqtable
from tests.benchmarks import instructions
from tests.benchmarks.http_servers import files, hello, wsgi
from tests.benchmarks.instructions import ASKED, CLIENTS, Asked
from tests.benchmarks.processes import ENVIRONMENT, PATIENCE_S, ROOT
from tests.benchmarks.servers import PEERS, reqtable_lines, reqtable_redis

ByFunction = dict[str, float]
Counts = dict[str, dict[str, ByFunction]]  # by kind of work and peer

# By kind of work and peer: the function that makes the handler, its style, and the policy.
PROFILED: dict[str, dict[str, tuple[Any, str, str]]] = {
    "lines": {
        "reqtable-state": (reqtable_lines, "state", "inline"),
        "reqtable-async": (reqtable_lines, "async", "inline"),
        "reqtable-greenlet": (reqtable_lines, "blocking", "greenlet"),
    },
    "redis": {"reqtable-state": (reqtable_redis, "state", "inline")},
    "hello": {"reqtable-wsgi-inline": (lambda _: wsgi(hello), "state", "inline")},
    "file": {"reqtable-http": (lambda _: files(), "state", "inline")},
}


class Bytecodes:
    """Counts the bytecodes that run while `is_on`, by function."""

    def __init__(self) -> None:
        self.is_on = False
        self.counts: Counter[str] = Counter()

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode" and self.is_on:
            self.counts[frame.f_code.co_qualname.removeprefix("reqtable_lines.<locals>.")] += 1
        return self.trace


def profile(make: Any, style: str, policy: str, asked: Asked) -> ByFunction:
    """Return the bytecodes of a request by function, the most first. They include a request's share of a pass."""
    bytecodes = Bytecodes()

    class Traced(make(style)):  # type: ignore[misc]
        disable_nagle_algorithm = False  # socket pairs don't have the option

        def setup(self) -> None:
            sys.settrace(bytecodes.trace)  # in its own greenlet
            super().setup()

    handler = Traced if style == "blocking" else make(style)
    with ExitStack() as stack:
        server = stack.enter_context(reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=policy))
        # Time stands still, because a pass that is the longest so far takes an extra bytecode.
        engine = reqtable.Engine(system=reqtable.System(clock=repeat(0.0).__next__))
        engine.add(server)
        engine.loop.open()
        clients = []
        for number in range(CLIENTS):
            ours, theirs = socket.socketpair()
            clients.append(stack.enter_context(theirs))
            server.process_request(ours, ("192.0.2.1", number))
        engine.table.thread = get_ident()  # as `run` has it
        outer = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # on 3.12, a frame must have asked for opcodes before settrace
        sys.settrace(bytecodes.trace)
        stack.enter_context(mock.patch("time.time", repeat(0.0).__next__))  # HTTP writes the Date once a second
        for is_on in (False, True):  # the first round warms up the loop, and lets the interpreter specialize
            for client in clients:
                client.sendall(asked.sent)
            bytecodes.is_on = is_on
            engine.loop.run_once(0)
            bytecodes.is_on = False
            for client in clients:
                client.recv(65_536)
        sys.settrace(outer)
        engine.table.thread = None
    requests = CLIENTS * asked.count
    return {name: round(found / requests, 1) for name, found in bytecodes.counts.most_common()}


def bytecodes() -> Counts:
    """Return the bytecodes of this process, which has imported reqtable with the C module or without it."""
    return {kind: {peer: profile(*how, ASKED[kind]) for peer, how in peers.items()} for kind, peers in PROFILED.items()}


def all_bytecodes() -> Counts:
    """Return the bytecodes of both forms, each from a process of its own."""
    found: Counts = {kind: {} for kind in PROFILED}
    for form, environment in (("", {}), ("-pure", {"REQTABLE_PURE": "1"})):
        command = [sys.executable, "-m", "tests.benchmarks.profile", "--of-this-process"]
        how: dict[str, Any] = {"cwd": ROOT, "env": ENVIRONMENT | environment, "timeout": PATIENCE_S}
        printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, **how).stdout
        for kind, by_peer in json.loads(printed).items():
            found[kind] |= {peer + form: counts for peer, counts in by_peer.items() if peer + form in PEERS}
    return found


def table(counted: Counts, run: Counts) -> list[str]:
    lines = [f"{'':26}{'bytecodes':>14}{'instructions':>14}{'of 1 client':>14}"]
    for kind in ASKED:
        lines.append(kind)
        for peer in counted[kind] | run.get(kind, {}):
            count = sum(counted[kind].get(peer, {}).values())
            of_peer = run.get(kind, {}).get(peer, {})
            cells = [f"{count:,.0f}" if count else "-", *(f"{of_peer[each]:,}" for each in of_peer)]
            lines.append(f"  {peer:24}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.profile")
    parser.add_argument("--functions", action="store_true", help="show the bytecodes of each function")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument("--of-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of_this_process:
        json.dump(bytecodes(), sys.stdout)
        return
    counted = all_bytecodes()
    if options.functions:
        for kind, by_peer in counted.items():
            for peer, functions in by_peer.items():
                print(f"{kind}, {peer}: {sum(functions.values()):,.0f}")
                for name, count in functions.items():
                    print(f"{count:10g}  {name}")
        return
    why_not = instructions.missing()
    run = {} if why_not else instructions.all_instructions()
    if why_not:
        print(f"no instructions: {why_not}", file=sys.stderr)
    if options.json:
        json.dump({"bytecodes": counted, "instructions": run}, sys.stdout)
    else:
        print("\n".join(table(counted, run)))


if __name__ == "__main__":
    main()
