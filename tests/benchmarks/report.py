"""Turns figures into medians and ratios, tables in the terminal, the page, and its chart.

A ratio compares figures with the baseline's figures of the same round. A table shows the median of the rounds' ratios,
and the smallest and largest of them.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from tests.benchmarks.work import GOALS, WORKS, Figures, Goal, Work, idle

Measured = dict[str, Any]  # the results of a run: see `__main__.run`
Rounds = list[Figures]

MARK = "*"  # marks a cell in which the load took as much processor time as the server, or more
OURS = "reqtable"
PLOTTED_WORK = "echo-50"
PLOTTED = {
    "floor": "the floor: a loop in C",
    "reqtable-state": "reqtable: a state machine",
    "reqtable-state-pure": "reqtable: without the C module",
    "uvloop-protocol": "uvloop: a protocol",
    "uvloop-streams": "uvloop: streams",
    "asyncio-protocol": "asyncio: a protocol",
    "asyncio-streams": "asyncio: streams",
    "gevent": "gevent",
    "socketserver-threading": "socketserver: threads",
}


@dataclass(frozen=True)
class Spread:
    """Holds the median, the smallest and the largest of several values."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: str = ".3g") -> str:
        return f"{plain(self.median, digits)} ({plain(self.least, digits)}–{plain(self.most, digits)})"


def plain(value: float, digits: str = ".3g") -> str:
    """Format a number without an exponent."""
    text = f"{value:{digits}}"
    return f"{value:,.0f}" if "e" in text or value >= 1000 else text


# -- the figures of a round -------------------------------------------------------------------------------------------


def cpu_us(figures: Figures) -> float:
    return figures["cpu_s"] / figures["requests"] * 1e6


def value_of(figures: Figures, name: str) -> float:
    return cpu_us(figures) if name == "cpu_us" else figures[name]


def main_figure(work: Work) -> str:
    if work.measure is idle:
        return "kib"
    return {"shutdown": "ms", "snapshot": "step_ms"}.get(work.name, "cpu_us")


def spread(rounds: Rounds, name: str) -> Spread:
    return Spread.of([value_of(each, name) for each in rounds])


def ratio(rounds: Rounds, others: Rounds, name: str) -> Spread:
    return Spread.of([value_of(a, name) / value_of(b, name) for a, b in zip(rounds, others, strict=False)])


def is_limited_by_load(rounds: Rounds) -> bool:
    """Return whether the load took as much time as the server, so that the server may have waited for it."""
    return "load_s" in rounds[0] and sum(each["load_s"] for each in rounds) >= sum(each["cpu_s"] for each in rounds)


# -- goals ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Tells whether a goal is met. `floor` is the ratio that the floor (a server in C) reaches."""

    goal: Goal
    found: Spread | None = None  # None: not measured
    floor: float | None = None

    @property
    def met(self) -> bool:
        most = self.floor if self.goal.most is None else self.goal.most
        return self.found is not None and most is not None and self.found.median <= most

    @property
    def missed(self) -> bool:
        return self.found is not None and not self.met

    def cells(self, numbers: dict[str, int] | None = None) -> list[str]:
        """Return the cells of the goal's line. `numbers` has the number of each reason."""
        unit = self.goal.unit
        over = self.goal.over if self.goal.over and self.goal.over not in WORKS else "–"
        most = "the floor's" if self.goal.most is None else f"{self.goal.most:g} {unit}"
        verdict = "not measured" if self.found is None else "met" if self.met else "**missed**"
        if self.missed and numbers:
            verdict += f" ({numbers[self.goal.reason]})"
        found = "–" if self.found is None else f"{self.found.text()} {unit}"
        floor = "–" if self.floor is None else plain(self.floor)
        return [self.goal.text, self.goal.peer, over, most, found, verdict, floor]


def outcome(measured: Measured, goal: Goal) -> Outcome:
    by_peer = measured["works"].get(goal.work, {})
    rounds = by_peer.get(goal.peer)
    if not rounds:
        return Outcome(goal)
    if not goal.over:
        return Outcome(goal, spread(rounds, goal.figure))

    def others_of(peer: str) -> Rounds | None:
        """Return the figures that a peer is compared with: another peer's, or its own in another work."""
        across = goal.over in WORKS
        found: Rounds | None = measured["works"].get(goal.over, {}).get(peer) if across else by_peer.get(goal.over)
        return found

    others, floor, floor_others = others_of(goal.peer), by_peer.get("floor"), others_of("floor")
    if others is None:
        return Outcome(goal)
    has_floor = floor and floor_others
    return Outcome(
        goal,
        ratio(rounds, others, goal.figure),
        ratio(floor, floor_others, goal.figure).median if has_floor else None,
    )


def outcomes(measured: Measured, goals: list[Goal] = GOALS) -> list[Outcome]:
    return [outcome(measured, goal) for goal in goals]


# -- tables -----------------------------------------------------------------------------------------------------------

GOAL_HEADINGS = ["work", "server", "beside", "at most", "measured", "", "the floor"]
LOADED = ["server", "CPU µs a request", "ratio to the baseline", "user", "requests/s", "99 % µs"]
HEADINGS = {
    "kib": ["server", "KiB a connection", "ratio to the baseline", "connections"],
    "ms": ["server", "ms", "ratio to the baseline", "max ms"],
    "step_ms": ["taken", "ms", "the longest that another request waited, ms"],
}


def headings(work: Work) -> list[str]:
    many = work.request if work.request.isupper() else f"{work.request}s"  # MB has no plural
    loaded = [text.replace("requests", many).replace("request", work.request) for text in LOADED]
    return HEADINGS.get(main_figure(work), loaded)


def rows(work: Work, by_peer: dict[str, Rounds]) -> Iterator[list[str]]:
    """Yield the cells of each peer, the best peer first."""
    name = main_figure(work)
    if name == "step_ms":
        for rounds in by_peer.values():
            for where, text in (("step", "in a step"), ("thread", "in another thread")):
                yield [text, spread(rounds, f"{where}_ms").text(), spread(rounds, f"{where}_delay_ms").text()]
        return
    baseline = by_peer.get(work.baseline)
    for peer, rounds in sorted(by_peer.items(), key=lambda pair: spread(pair[1], name).median):
        against = (
            ratio(rounds, baseline, name).text() if baseline and peer != work.baseline else "1" if baseline else "–"
        )
        mark = MARK if is_limited_by_load(rounds) else ""
        yield [peer, spread(rounds, name).text() + mark, against, *more_cells(name, rounds)]


def more_cells(name: str, rounds: Rounds) -> list[str]:
    if name == "kib":
        return [plain(spread(rounds, "connections").median)]
    if name == "ms":
        return [plain(spread(rounds, "max_ms").most)]
    user = sum(each["user_s"] for each in rounds)
    ticks = user + sum(each["system_s"] for each in rounds)
    rate = statistics.median(each["requests"] / each["wall_s"] for each in rounds)
    wait = plain(spread(rounds, "p99_us").median) if "p99_us" in rounds[0] else "–"
    return [f"{user / ticks:.0%}" if ticks else "–", plain(rate), wait]


def written(measured: Measured) -> str:
    """Format the results as JSON, with one round on each line."""
    text = json.dumps(measured, indent=1, ensure_ascii=False)
    return re.sub(r"\{[^{}]*\}", lambda found: " ".join(found.group().split()), text) + "\n"


def show(measured: Measured) -> None:
    """Print the tables in the terminal."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else 170)

    def table(title: str, names: list[str], lines: list[list[str]]) -> None:
        made = Table(Column(names[0], no_wrap=True), *names[1:], title=title, title_justify="left")
        for line in lines:
            made.add_row(*(cell.replace("**", "") for cell in line))
        console.print(made)

    for name, by_peer in measured["works"].items():
        work = WORKS[name]
        table(f"{work.title} ({name}; baseline {work.baseline})", headings(work), list(rows(work, by_peer)))
    for reason in measured["skipped"]:
        console.print(f"skipped: {reason}", highlight=False)
    known = [each.cells() for each in outcomes(measured) if each.found is not None]
    if known:
        table("Goals", GOAL_HEADINGS, known)
    for line in limited(measured):
        console.print(line, highlight=False)


def limited(measured: Measured) -> list[str]:
    """Describe the cells where the load was the limit, without the floor, which is known to be as cheap as the load."""
    return [
        f"{MARK} {work}, {peer}: the load took as much processor time as the server"
        for work, by_peer in measured["works"].items()
        for peer, rounds in by_peer.items()
        if peer != "floor" and is_limited_by_load(rounds)
    ]


# -- the page ---------------------------------------------------------------------------------------------------------


def markdown(names: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *(f"| {' | '.join(line)} |" for line in lines), ""]


HEAD = """# What it costs

This page has all figures of the benchmark: what a request costs under reqtable, and under other servers.

**A state machine serves lines at {uvloop} × the CPU of a uvloop protocol, and at {asyncio} × the CPU of asyncio's
streams.**

![CPU time for a line of 64 bytes; a uvloop protocol takes 1](performance/lines.svg)

All figures are the server's processor time for each request, in user and system mode together, with its children. Each
server splits its input into lines, and answers each line. The servers take turns, round by round, on a core of their
own; a program in C makes the load on another core. The *floor* is a loop in C that does little but its system calls.
`-pure` is reqtable without its C module.

A cell shows the median of the rounds, and the smallest and the largest value in parentheses. A ratio compares figures
of the same round. Times that a clock measures, such as requests/s, are rough, because the machine is shared. The mark
`*` means that the load took at least as much processor time as the server, so the server may have waited for the load.
"""

QUICK_NOTE = """**These figures are from a quick run (`make bench QUICK=1`), with few and short rounds. They show orders
of magnitude, not differences of a few percent.**
"""

COUNTS = """`python -m tests.benchmarks.profile` counts these figures. They don't depend on the machine's load. A call
into C counts as one bytecode. callgrind counts the instructions: those of the server's process, without the kernel's.
With 50 clients, all clients send at once. With one client, each line takes a pass of the loop for itself.
"""

KINDS = {"lines": "a line", "redis": "a Redis GET, -P 16", "hello": "an HTTP hello", "file": "an HTTP file"}

POLICIES = """## What each policy costs, and when to choose which

{costs}

- **A state machine, inline** keeps only a row. Choose it for protocols, for many connections that are mostly idle, and
  for requests that you must see, limit and move.
- **A coroutine, inline** also keeps its frames. Choose it if the protocol is easier to read from top to bottom.
- **`greenlet`** runs unchanged blocking handlers with many slow clients. Each request costs a suspended stack in
  memory, and switches between stacks. A handler that waits for anything except its own socket delays all other
  requests, unless `suspend_all_sockets` is on.
- **`thread`** costs a thread for each connection. A line is cheap, because the kernel waits for the line and wakes the
  right thread. A new connection is expensive, and each thread needs memory. Choose it for handlers that wait for
  databases or locks.
- **`fork`** costs a process for each connection, which takes milliseconds. Choose it if you need isolation: changes to
  memory end with the request, and each request can use its own core.
- **`pool`** costs a switch to a thread and back for each step. Choose it if steps wait for other things, and there are
  too many connections for a thread each. **`executor`** (not measured) costs a round trip to a process for each step.
  Choose it if steps compute.

[Choosing a dispatch policy](../how-to/choose-a-policy.md) explains what handlers share under each
policy, and which handlers each policy can't run.
"""

# Explanations of a work's figures.
NOTES = {
    "churn": """Under `thread` and `fork` each connection has a row in the table, which the standard library's classes
don't have. In `reqtable-thread-reuse`, a thread that has served a connection waits for the next one (`[thread] reuse`).
""",
    "redis-16": """The servers with a protocol parse with the same function as reqtable.
""",
    "forward-lines": """Each line passes the forwarder twice: to a server that echoes it, and back. The load is
both ends, so the echo costs the forwarder nothing. HAProxy shows the limit: it is a forwarder in C that has everything
that users need.
""",
    "forward-bulk-10-256": """A larger read costs fewer system calls for each MB. reqtable reads 64 KiB at once, unless
`recv_bytes` and the limit of `chunk()` say more. HAProxy keeps its own size of 16 KiB.
""",
    "publish-1": """`reqtable-state` waits for `either(line(), told())`, and `reqtable-told` for `told()` alone. The
servers with streams have a bounded queue and a task for each subscriber. In `reqtable-sends` and `asyncio-writes` the
publisher itself writes to all subscribers.
""",
    "hello-8": """uvicorn runs an ASGI application on uvloop, with httptools. All others run a WSGI application.
""",
    "hello-8-cores": """Here the servers run wherever the kernel puts them. Threads on several cores compete for the
interpreter, and each hand-over wakes a thread on another core.
""",
    "takeover": """`reqtable-takeover` keeps a journal, from which another worker continues the requests after a crash.
`reqtable-worker` is a worker without a journal.
""",
    "honest-slow": """The processor time includes that of the slow clients. Every second, all of them together send
2,000 bytes and take 2,000 pieces of 256 bytes.
""",
    "snapshot": """In a step, `snapshot()` holds up the loop until its list is complete. If there are thousands of
requests, use `call(self.server.table.snapshot, on="thread")`: in a thread it lets the loop run after every 250 rows.
""",
}

POLICY_PEERS = {
    "reqtable-state": "a state machine, `inline`",
    "reqtable-async": "a coroutine, `inline`",
    "reqtable-pool": "a state machine, `pool`",
    "reqtable-greenlet": "a blocking handler, `greenlet`",
    "reqtable-thread": "a blocking handler, `thread`",
    "reqtable-fork": "a blocking handler, `fork`",
    "reqtable-inline": "a blocking handler, `inline`: one at a time",
}
POLICY_WORKS = {
    "echo-1": "a line, 1 connection, µs",
    "echo-50": "a line, 50 connections, µs",
    "churn": "connect, line, close, µs",
    "idle": "an idle connection, KiB",
}


def page(measured: Measured) -> str:
    """Return the text of docs/explanation/performance.md."""
    parts = [head(measured), *([QUICK_NOTE] if measured["quick"] else []), *goals(measured), *counts(measured)]
    parts += [POLICIES.format(costs="\n".join(policy_costs(measured)).rstrip())]
    parts += growth(measured)
    for name, by_peer in measured["works"].items():
        work = WORKS[name]
        if work.group == "growth":
            continue
        parts += [f"## {work.title}", ""]
        parts += [f"The baseline is {work.baseline}.", ""] if main_figure(work) != "step_ms" else []
        parts += markdown(headings(work), list(rows(work, by_peer)))
        parts += [NOTES[name]] if name in NOTES else []
    parts += ["## Measured on", "", *markdown(["", ""], [[key, str(value)] for key, value in provenance(measured)])]
    parts += [f"- Skipped: {reason}." for reason in measured["skipped"]]
    return "\n".join(parts).rstrip() + "\n"


def head(measured: Measured) -> str:
    by_peer = measured["works"][PLOTTED_WORK]
    uvloop, asyncio = (
        plain(ratio(by_peer["reqtable-state"], by_peer[other], "cpu_us").median, ".2g")
        for other in ("uvloop-protocol", "asyncio-streams")
    )
    return HEAD.format(uvloop=uvloop, asyncio=asyncio)


def goals(measured: Measured) -> list[str]:
    found = outcomes(measured)
    lines = ["## The goals", "", f"{sum(each.met for each in found)} of {len(found)} are met.", ""]
    reasons = list(dict.fromkeys(each.goal.reason for each in found if each.missed))
    numbers = {why: number for number, why in enumerate(reasons, 1)}
    lines += markdown(GOAL_HEADINGS, [each.cells(numbers) for each in found])
    if reasons:
        items = [f"{number}. {why or 'The reason is not known yet.'}" for why, number in numbers.items()]
        lines += ["Why goals are missed:", "", *(fill(each, 120, subsequent_indent="   ") for each in items), ""]
    return lines


def counts(measured: Measured) -> list[str]:
    """Return the table of bytecodes and instructions."""
    lines = []
    for kind, text in KINDS.items():
        bytecodes, instructions = (measured.get(each, {}).get(kind, {}) for each in ("bytecodes", "instructions"))
        for peer in bytecodes | instructions:
            count = sum(bytecodes.get(peer, {}).values())
            run = [f"{instructions[peer][each]:,}" if peer in instructions else "–" for each in ("together", "alone")]
            lines.append([text, peer, f"{count:,.0f}" if count else "–", *run])
    names = ["", "server", "bytecodes", "instructions, 50 clients", "instructions, 1 client"]
    return ["## Bytecodes and instructions", "", COUNTS, *markdown(names, lines)] if lines else []


GROWTH = """All connections are busy. [What many rows cost](performance/rows.md) goes on to a million connections, on a
simulated network."""


def growth(measured: Measured) -> list[str]:
    """Return the processor time of a line for each number of connections, in one table."""
    by_size = {name: by_peer for name, by_peer in measured["works"].items() if WORKS[name].group == "growth"}
    peers = dict.fromkeys(peer for by_peer in by_size.values() for peer in by_peer)
    lines = []
    for peer in peers:
        found = [plain(spread(each[peer], "cpu_us").median) if peer in each else "–" for each in by_size.values()]
        lines.append([peer, *found])
    names = ["server", *(f"{WORKS[name].connections:,}" for name in by_size)]
    title = ["## CPU µs for a line, as connections grow", "", GROWTH, ""]
    return [*title, *markdown(names, lines)] if lines else []


def policy_costs(measured: Measured) -> list[str]:
    lines = []
    for peer, text in POLICY_PEERS.items():
        cells = []
        for name in POLICY_WORKS:
            rounds = measured["works"].get(name, {}).get(peer)
            cells.append(plain(spread(rounds, main_figure(WORKS[name])).median) if rounds else "–")
        lines.append([text, *cells])
    return markdown(["", *POLICY_WORKS.values()], lines)


def provenance(measured: Measured) -> Iterator[tuple[str, object]]:
    yield from measured["machine"].items()
    yield "commit", measured["commit"]
    yield "measured", measured["measured_at"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    yield "rounds", f"{measured['rounds']} of {measured['seconds']:g} s"
    for each in measured.get("apart", []):
        how = f"{each['rounds']} rounds of {each['seconds']:g} s, load average before {each['load_before']}"
        where = f"{each['measured_at']}, at commit {each['commit']}, {how}"
        yield f"measured apart: {', '.join(each['works'])}", where


# -- the chart --------------------------------------------------------------------------------------------------------


def plot(measured: Measured, folder: Path) -> Path:
    """Write the chart of the page. Returns its path."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "reqtable"  # the same figures give the same bytes
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    by_peer = measured["works"][PLOTTED_WORK]
    baseline = by_peer["uvloop-protocol"]
    found = sorted(
        ((ratio(by_peer[peer], baseline, "cpu_us"), peer) for peer in PLOTTED if peer in by_peer),
        key=lambda pair: -pair[0].median,
    )
    medians = [each.median for each, _ in found]
    errors = [[each.median - each.least for each, _ in found], [each.most - each.median for each, _ in found]]
    colours = ["#c0392b" if peer.startswith(OURS) else "#7f8c8d" for _, peer in found]
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.28 * len(found)), layout="constrained")
    bars = axes.barh(
        [PLOTTED[peer] for _, peer in found], medians, xerr=errors, color=colours, ecolor="#2c3e50", capsize=2
    )
    axes.bar_label(bars, [f"{each:.2f}" for each in medians], padding=4)
    axes.set_xlabel("CPU time for a line of 64 bytes, 50 connections; a uvloop protocol takes 1")
    axes.spines[["top", "right"]].set_visible(False)
    path = folder / "lines.svg"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path
