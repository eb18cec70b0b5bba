"""Counts the bytecodes that a request takes, by function.

They are counted, not sampled, so the same Python on the same commit always gives the same numbers. A call into C counts
as one bytecode.

    python -m tests.benchmarks.profile

prints the counts as JSON, for each kind of work and each peer.
"""

from __future__ import annotations

import json
import socket
import sys
from collections import Counter
from contextlib import ExitStack
from itertools import repeat
from threading import get_ident
from types import FrameType
from typing import Any
from unittest import mock

import reqtable
from tests.benchmarks.http_servers import files, hello, wsgi
from tests.benchmarks.servers import reqtable_lines, reqtable_redis
from tests.benchmarks.work import LINE_BYTES

CLIENTS = 50
AT_ONCE = 16
LINE = b"x" * (LINE_BYTES - 1) + b"\n"
GET = b"*2\r\n$3\r\nGET\r\n$16\r\nkey:000000000000\r\n"
BROWSED = b"GET /page.html HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: load\r\nAccept: */*\r\n\r\n"

# By kind of work and peer: the function that makes the handler, its style, the policy, the bytes that a client sends at
# once, and how many requests they hold.
PROFILED: dict[str, dict[str, tuple[Any, str, str, bytes, int]]] = {
    "lines": {
        "reqtable-state": (reqtable_lines, "state", "inline", LINE, 1),
        "reqtable-async": (reqtable_lines, "async", "inline", LINE, 1),
        "reqtable-greenlet": (reqtable_lines, "blocking", "greenlet", LINE, 1),
    },
    "redis": {"reqtable-state": (reqtable_redis, "state", "inline", GET * AT_ONCE, AT_ONCE)},
    "hello": {"reqtable-wsgi-inline": (lambda _: wsgi(hello), "state", "inline", BROWSED, 1)},
    "file": {"reqtable-http": (lambda _: files(), "state", "inline", BROWSED, 1)},
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


def profile(make: Any, style: str, policy: str, sent: bytes, count: int) -> dict[str, float]:
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
                client.sendall(sent)
            bytecodes.is_on = is_on
            engine.loop.run_once(0)
            bytecodes.is_on = False
            for client in clients:
                client.recv(65_536)
        sys.settrace(outer)
        engine.table.thread = None
    requests = CLIENTS * count
    return {name: round(found / requests, 1) for name, found in bytecodes.counts.most_common()}


def profiles() -> dict[str, dict[str, dict[str, float]]]:
    return {kind: {peer: profile(*how) for peer, how in peers.items()} for kind, peers in PROFILED.items()}


if __name__ == "__main__":
    json.dump(profiles(), sys.stdout)
