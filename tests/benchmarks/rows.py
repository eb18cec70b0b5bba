"""Measures what a table of many rows costs: memory, and the time of each kind of work as the rows grow.

    python -m tests.benchmarks.rows [ROWS…]

prints a table from 100 rows to 1,000,000, each size in a process of its own. It takes 2 GiB and some minutes.

The engine, its server and its transports are the real ones, on a simulated network. Only the sockets of the clients and
the selector are lighter than that network's. It takes 2.2 KiB for the two ends of a connection, and its selector looks
at every descriptor in every poll, as select(2) does, because it may report any of them falsely. A `Client` has no other
end, and `Told` reports what it is told, as epoll(7) does.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import selectors
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from errno import ENOTCONN
from functools import partial
from pathlib import Path
from socket import AF_UNIX
from threading import get_ident
from time import process_time
from typing import Any

import reqtable
from reqtable.control.jobs import Job, Turns
from reqtable.control.operations import Target, requests
from reqtable.server.operator import Operator
from reqtable.table.limits import Limits
from reqtable.table.states import PEER_END, READ, RESET, WRITE
from reqtable.table.table import Entry, RequestTable
from reqtable.testing.network import SimNetwork
from tests.benchmarks.servers import reqtable_lines

SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
OLDEST = 100
TIMES = 200  # how often each kind of work is done
PATIENCE_S = 1_200.0
MEMORY_MAX_BYTES = 4 * 2**30
LINE = b"x" * 63 + b"\n"
_APART_S = 0.01  # between two deadlines
_TIMEOUT_S = 3600.0  # of a row with a deadline
_LATEST_S = 1e6  # the latest of all deadlines
_MEASURABLE = 10_000  # the memory of fewer rows is lost among the pages that Python keeps free
_PAGE_BYTES = resource.getpagesize()

Do = Callable[[], Any]


class Told(selectors.BaseSelector):
    """Reports the descriptors that it is told, once."""

    interests = READ | WRITE | RESET | PEER_END

    def __init__(self) -> None:
        self.told: list[tuple[Any, int]] = []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, 0, None)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        told, self.told = self.told, []
        return [(selectors.SelectorKey(0, 0, mask, target), mask) for target, mask in told]


class Client:
    """Stands in for the socket of a client, which has sent a line whenever it is read, and takes all output."""

    __slots__ = ("_fd",)

    family = AF_UNIX

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def setblocking(self, flag: bool) -> None:
        pass

    def recv(self, count: int, flags: int = 0) -> bytes:
        return LINE

    def send(self, data: bytes, flags: int = 0) -> int:
        return len(data)

    def shutdown(self, how: int) -> None:
        raise OSError(ENOTCONN, os.strerror(ENOTCONN))  # the client has closed too, so no request lingers

    def getsockopt(self, level: int, option: int) -> int:
        return 0

    def close(self) -> None:
        pass


class Server(reqtable.TCPServer):
    """Gets new clients from the function `new`."""

    new: Callable[[], tuple[Any, Any]]

    def get_request(self) -> Any:
        return self.new()


def client_at(number: int) -> tuple[Client, tuple[str, int]]:
    """Return a client and its address. No two have the same host."""
    return Client(number), (f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 50_000)


class Rows:
    """Holds an engine with `count` rows, each of a client that has had one line answered.

    A method of the kinds of work makes one piece of work ready, and returns the function that does it.
    """

    def __init__(self, count: int) -> None:
        self._stack = ExitStack()
        self._random = random.Random(0)
        self._clients = 0
        self._soonest_at = _LATEST_S
        self._told = Told()
        network = SimNetwork()
        self._clock = network.clock
        system = replace(network.system, selector=lambda: self._told)
        self.engine = reqtable.Engine(system=system, limits=Limits(entries_max=count + 1))
        with network.installed():
            self.server = self._stack.enter_context(Server(("192.0.2.1", 7), reqtable_lines("state")))
        self.server.new = self._new
        self.engine.add(self.server)
        self._target = Target(self.engine, Operator(self.engine))
        self._turns = Turns(self.engine.post)
        self.engine.loop.open()
        self.engine.listeners.listen(self.server)
        self.table.thread = get_ident()  # as `Loop.run` has it
        for _ in range(count):
            self._accept()
        self._told.told = [(entry.transport, READ) for entry in self.table]
        self._pass()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *problem: object) -> None:
        self.table.thread = None
        self._stack.close()

    @property
    def table(self) -> RequestTable:
        return self.engine.table

    def arm_all(self) -> None:
        """Give each row a deadline."""
        for entry in self.table:
            entry.timeout = _TIMEOUT_S
            self._soonest_at -= _APART_S
            self.engine.steps.deadlines.arm(entry, self._soonest_at)

    def fill(self) -> None:
        """Let the table, and each peer, have no more rows than they have."""
        self.table.set_limits(Limits(entries_max=len(self.table), entries_per_peer_max=1, when_full="evict"))

    def _new(self) -> tuple[Any, Any]:
        self._clients += 1
        return client_at(self._clients)

    def _any(self) -> Entry:
        """Return a row, any with the same chance."""
        entry = None
        while entry is None:
            entry = self.table.get(self._random.randint(1, self.table.last_id))
        return entry

    def _come_due(self, entry: Entry) -> None:
        """Give a row a deadline sooner than all others, and let that time come."""
        entry.timeout = _TIMEOUT_S
        self._clock.jump(_APART_S)
        self.engine.steps.deadlines.arm(entry, self._clock.now)

    def _accept(self) -> None:
        self.engine.intake.accept(self.server)

    def _accept_and_pass(self) -> None:
        self._accept()
        self._pass()

    def _cancel_and_pass(self, id: int) -> None:
        self.table.cancel(id)
        self._pass()

    def _pass(self) -> None:
        self.engine.loop.run_once(0)

    def _ask(self, **query: Any) -> int:
        """Ask as `reqtable ps` does. Returns how many rows the answer has."""
        batches = requests(self._target, query, Job(self._turns))
        return sum(len(batch) for batch in batches if isinstance(batch, list))

    # -- the kinds of work --------------------------------------------------------------------------------------------

    def nothing(self) -> Do:
        """Run a pass with nothing to do."""
        return self._pass

    def line(self) -> Do:
        """Run a pass in which the line of one client is echoed."""
        self._told.told = [(self._any().transport, READ)]
        return self._pass

    def arm(self) -> Do:
        """Set a deadline sooner than all others: no other one moves as many items of the heap."""
        self._soonest_at -= _APART_S
        return partial(self.engine.steps.deadlines.arm, self._any(), self._soonest_at)

    def meet(self) -> Do:
        """Run a pass that meets the soonest deadline, and so ends its request."""
        self._accept()
        self._come_due(self._any())
        return self._pass

    def move(self) -> Do:
        """Run a pass that meets a deadline which was moved meanwhile, to a time later than all others."""
        entry = self._any()
        self._come_due(entry)
        self.engine.steps.deadlines.arm(entry, _LATEST_S)
        return self._pass

    def come(self) -> Do:
        """Accept a client."""
        self.table.cancel(self._any().id)
        self._pass()
        return self._accept

    def leave(self) -> Do:
        """Cancel a request, and run the pass that frees it."""
        self._accept()
        return partial(self._cancel_and_pass, self._any().id)

    def snapshot(self) -> Do:
        """List the oldest requests."""
        return partial(self.table.snapshot, limit=OLDEST)

    def ps(self) -> Do:
        """Answer `reqtable ps` for the oldest requests."""
        return partial(self._ask, limit=OLDEST)

    def ps_by_age(self) -> Do:
        """Answer `reqtable ps --sort age` for the oldest requests."""
        return partial(self._ask, limit=OLDEST, sort="age")

    def stats(self) -> Do:
        """Return the counts of the server."""
        return self.server.stats

    def ps_all(self) -> Do:
        """Answer `reqtable ps`."""
        return self._ask

    def replace_own(self) -> Do:
        """Accept a second client of a peer that may have one, and run the pass that frees the first one."""
        peer = self._any().peer
        self.server.new = lambda: (Client(0), peer)
        return self._accept_and_pass

    def replace_idlest(self) -> Do:
        """Accept a client into the full table, and run the pass that frees the idlest request."""
        self.server.new = self._new
        return self._accept_and_pass


# The kinds of work, and their words in the table. The last two are done in a full table.
WORKS: dict[str, Callable[[Rows], Do]] = {
    "a pass with nothing to do": Rows.nothing,
    "a line of one client, echoed": Rows.line,
    "a client is accepted": Rows.come,
    "a request is cancelled": Rows.leave,
    "a deadline is set": Rows.arm,
    "a deadline is met: its request ends": Rows.meet,
    "a deadline is met that was moved": Rows.move,
    f"`snapshot(limit={OLDEST})`": Rows.snapshot,
    f"`ps --limit {OLDEST}`": Rows.ps,
    f"`ps --sort age --limit {OLDEST}`": Rows.ps_by_age,
    "`server.stats()`": Rows.stats,
}
IN_FULL: dict[str, Callable[[Rows], Do]] = {
    "a client replaces its own request": Rows.replace_own,
    "a client replaces the idlest request, on average": Rows.replace_idlest,
}
SEARCH = "the longest of these: it searches the table"
LISTING = "all rows are listed, for each row"
COLLECTION = "a full garbage collection, for each row"
MEMORY = "memory of a row, bytes"
DEADLINE = "memory of a deadline, bytes"
NOT_TIMES = (MEMORY, DEADLINE)


def memory_bytes() -> int:
    """Return how many bytes of memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def timed(prepare: Callable[[], Do], times: int = TIMES) -> list[float]:
    """Return how many microseconds of processor time each of some pieces of work took."""
    took = []
    for _ in range(times):
        do = prepare()
        begun = process_time()
        do()
        took.append((process_time() - begun) * 1e6)
    return took


def measure(count: int) -> dict[str, float]:
    """Return what `count` rows cost: bytes, and microseconds, which are medians if nothing else is said."""
    with Rows(1):
        pass  # what is made once is made
    gc.collect()
    gc.disable()  # a collection looks at all rows, at any time
    before = memory_bytes()
    with Rows(count) as rows:
        with_rows = memory_bytes()
        rows.arm_all()
        clock = statistics.median(timed(lambda: bool))  # what looking at the clock takes
        found = {}
        if count >= _MEASURABLE:
            found = {MEMORY: (with_rows - before) / count, DEADLINE: (memory_bytes() - with_rows) / count}
        for name, work in WORKS.items():
            found[name] = max(0.0, statistics.median(timed(partial(work, rows))) - clock)
        found[LISTING] = min(timed(rows.ps_all, 3)) / count
        found[COLLECTION] = min(timed(lambda: gc.collect, 3)) / count
        rows.fill()
        own, idlest = IN_FULL
        found[own] = statistics.median(timed(partial(IN_FULL[own], rows)))
        took = timed(partial(IN_FULL[idlest], rows), max(TIMES, count // 32))  # some searches of the table
        found[idlest], found[SEARCH] = statistics.mean(took), max(took)
    return found


def measured(count: int) -> dict[str, float]:
    """Measure in a process of its own, whose memory is bounded."""
    told = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--one", str(count)],
        check=True,
        stdout=subprocess.PIPE,
        timeout=PATIENCE_S,
    )
    found: dict[str, float] = json.loads(told.stdout)
    return found


def table_of(found: Mapping[int, Mapping[str, float]]) -> str:
    """Return the measured costs as a table of Markdown. The last column is the last size to the first."""
    lines = [["", *(f"{count:,} rows" for count in found), "growth"], ["---"] * (len(found) + 2)]
    for name in found[max(found)]:
        unit = "" if name in NOT_TIMES else ", µs"
        costs = [each[name] for each in found.values() if name in each]
        cells = [_short(each[name]) if name in each else "–" for each in found.values()]
        lines.append([f"{name}{unit}", *cells, f"{_short(costs[-1] / costs[0])} x"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _short(number: float) -> str:
    return f"{float(f'{number:.3g}'):,g}"


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--one"]:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX_BYTES, MEMORY_MAX_BYTES))
        json.dump(measure(int(arguments[1])), sys.stdout)
        return
    found = {}
    for count in [int(each) for each in arguments] or SIZES:
        found[count] = measured(count)
        print(f"{count:,} rows are measured", file=sys.stderr)
    print(table_of(found), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
