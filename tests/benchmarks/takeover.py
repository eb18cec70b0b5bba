"""What crash takeover costs: the CPU of a 64-byte echo with the journal and without it.

    python -m tests.benchmarks.takeover [ROUNDS]

The servers take turns. A figure is the median of its rounds, a ratio that of the medians. `lines` echoes, and no field
of its handler changes; `counted` changes two fields with each line; `pipelined` sends sixteen lines at once.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from statistics import median
from typing import Any

import reqtable
from reqtable import line, state
from tests.benchmarks.processes import LOAD_CORE, Server, load_of, tools
from tests.benchmarks.work import LINE_BYTES

CONNECTIONS, SECONDS, ROUNDS = 50, 1.0, 7
GOALS = {"lines": 1.15, "counted": 1.6, "pipelined": None}


class Lines(reqtable.StateRequestHandler):
    """Echoes lines. No field changes."""

    name: str = "nobody"
    total: int = 0

    @state(line())
    def echo(self, text: bytes) -> Any:
        self.send(text)
        return self.echo


class Counted(reqtable.StateRequestHandler):
    """Echoes lines. Two fields change with each line."""

    last: bytes = b""
    total: int = 0

    @state(line())
    def echo(self, text: bytes) -> Any:
        self.total += len(text) * 1000
        self.last = text
        self.send(text)
        return self.echo


HANDLERS: dict[str, Any] = {"lines": Lines, "counted": Counted, "pipelined": Lines}


def serve(work: str, takeover: bool) -> None:
    """Serve in one worker. Print the port."""
    logging.basicConfig(level=logging.ERROR)
    reqtable.serve(
        HANDLERS[work],
        "tcp://127.0.0.1:0",
        config=reqtable.Config(takeover=takeover),
        workers=1,
        on_listening=lambda names: print(names[0].rpartition(":")[2], flush=True),
    )


def main(rounds: int) -> int:
    os.sched_setaffinity(0, {LOAD_CORE})  # this process must not disturb the servers
    spent: dict[tuple[str, str], list[float]] = {(work, how): [] for work in GOALS for how in ("off", "on")}
    with tools() as compiled, ExitStack() as stack:
        servers = {
            key: stack.enter_context(Server([sys.executable, "-m", "tests.benchmarks.takeover", "serve", *key]))
            for key in spent
        }
        for number in range(rounds + 1):
            for key in sorted(servers, reverse=number % 2 == 1):
                lines = 16 if key[0] == "pipelined" else 1
                with compiled.clients("tcp", servers[key].port, CONNECTIONS, lines, LINE_BYTES, 0, SECONDS) as load:
                    before = servers[key].cpu
                    load.tell()
                    requests = load_of(load)["requests"]
                    used = servers[key].cpu - before
                if number:  # the first round warms the servers up
                    spent[key].append(1e6 * used.total / requests)
    broken = 0
    for work, goal in GOALS.items():
        off, on = median(spent[work, "off"]), median(spent[work, "on"])
        aim = "" if goal is None else f", goal {goal}"
        print(f"{work:10} off {off:6.2f} us, on {on:6.2f} us a request: {on / off:.3f} x{aim}")
        broken += goal is not None and on / off > goal
    return int(broken > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], sys.argv[3] == "on")
    else:
        sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS))
