"""Turns figures into medians and ratios, tables in the terminal, the page, and its plots.

A ratio compares figures with the baseline's figures of the same round. A table shows the median of the rounds' ratios,
and the smallest and largest of them.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.work import GOALS, WORKS, Figures, Goal, Work, idle

Measured = dict[str, Any]  # the results of a run: see `__main__.run`
Rounds = list[Figures]

MARK = "*"  # marks a cell in which the load took as much processor time as the server, or more
OURS = "reqtable"
PLOTTED = ("echo-50", "echo-500", "pipelined", "churn", "udp", "redis-16", "idle")


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


def user_us(rounds: Rounds) -> float:
    """Return the microseconds of user time for each request; over all rounds, because user time is sampled."""
    return sum(each["user_s"] for each in rounds) / sum(each["requests"] for each in rounds) * 1e6


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
    """Tells whether a goal is met, and by how much.

    `user` is the ratio of user time alone. `floor` is the ratio that the floor (a server in C) reaches. `allowed_us` is
    how many microseconds above the floor the goal allows for each request. `taken_us` is how many the server takes.
    """

    goal: Goal
    found: Spread | None = None  # None: not measured
    user: float | None = None
    floor: float | None = None
    allowed_us: float | None = None
    taken_us: float | None = None

    @property
    def met(self) -> bool:
        return self.found is not None and self.found.median <= self.goal.most

    def cells(self) -> list[str]:
        unit = self.goal.unit
        verdict = "not measured" if self.found is None else "met" if self.met else "**not met**"
        found = "–" if self.found is None else f"{self.found.text()} {unit}"
        more = [
            "–" if each is None else plain(each) for each in (self.user, self.floor, self.allowed_us, self.taken_us)
        ]
        return [self.goal.text, f"≤ {self.goal.most:g} {unit}", found, verdict, *more]


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
    found, user = ratio(rounds, others, goal.figure), user_us(rounds) / user_us(others) if user_us(others) else None
    if not floor or not floor_others:
        return Outcome(goal, found, user)
    own_us, their_us, floor_us = (spread(each, goal.figure).median for each in (rounds, others, floor))
    return Outcome(
        goal,
        found,
        user,
        ratio(floor, floor_others, goal.figure).median,
        goal.most * their_us - floor_us,
        own_us - floor_us,
    )


def outcomes(measured: Measured, goals: list[Goal] = GOALS) -> list[Outcome]:
    return [outcome(measured, goal) for goal in goals]


# -- tables -----------------------------------------------------------------------------------------------------------

GOAL_HEADINGS = ["goal", "at most", "measured", "", "user time alone", "the floor in C", "left, µs", "taken, µs"]
LOADED = [
    "server",
    "CPU µs a request",
    "ratio to the baseline",
    "user",
    "requests/s",
    "median µs",
    "99 % µs",
    "max µs",
]
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
    waits = [
        plain(spread(rounds, name).median) if name in rounds[0] else "–" for name in ("p50_us", "p99_us", "max_us")
    ]
    return [f"{user / ticks:.0%}" if ticks else "–", plain(rate), *waits]


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


INTRODUCTION = """# What it costs

`python -m tests.benchmarks page` generates this page from [figures.json](performance/figures.json), which `make bench`
measures. The main figure is the server's processor time for each request, user and system time together, as the
operating system accounts for it. The time of child processes is included. The ratio compares this time with that of
another server that does the same work: each server splits its input into lines, whatever its library delivers, and
answers each line.

The servers take turns, round by round, on a core of their own. A program in C makes the load on another core. Each cell
shows the median of the rounds, with the smallest and the largest value in parentheses. A ratio compares figures of the
same round. Wall-clock figures (requests/s and waits) give only a rough idea, because the machine is shared. The mark
`*` means that the load took at least as much processor time as the server, so the server may have waited for the load.
"""

QUICK_NOTE = """**These figures are from a quick run (`make bench QUICK=1`), with few and short rounds. They show orders
of magnitude, not differences of a few percent.**
"""

GOALS_NOTE = """The column "measured" compares all processor time, including the kernel's. The kernel's time is the same
for servers that make the same system calls. The column "user time alone" compares only the time outside the kernel,
which the kernel samples every hundredth of a second. "The floor in C" is the same ratio for a loop in C that does
little but its system calls. The last two columns are microseconds for each request above that floor: "left" is the time
that the goal allows, and "taken" is the time that the server uses. If the time left is negative, the goal can't be met.
"""

POLICIES = """## What each policy costs, and when to choose which

{costs}

- **A state machine, inline** keeps only a row. Choose it for protocols, for many connections that are mostly idle, and
  for requests that you must see, limit and move.
- **A coroutine, inline** also keeps its frames. Choose it if the protocol is easier to read from top to bottom.
- **`greenlet`** runs unchanged blocking handlers with many slow clients. Each request costs a suspended stack in
  memory, and switches between stacks. A handler that waits for anything except its own socket delays all other
  requests.
- **`thread`** costs a thread for each connection. A line is cheap, because the kernel waits for it and wakes the right
  thread. A new connection is expensive, and each thread needs memory. Choose it for handlers that wait for databases or
  locks.
- **`fork`** costs a process for each connection, which takes milliseconds. Choose it if you need isolation: changes to
  memory end with the request, and each request can use its own core.
- **`pool`** costs a switch to a thread and back for each step. Choose it if steps wait for other things, and there are
  too many connections for a thread each. **`executor`** (not measured) costs a round trip to a process for each step.
  Choose it if steps compute.

[Choosing a dispatch policy](policies.md) explains what handlers share under each policy, and which handlers each policy
can't run.
"""

WHERE = """A line needs two system calls, and a share of a third one, the poll. The floor in C does nothing else, and
takes {floor} µs. Nearly all of this is the kernel's time, and no server can save much of it. The rest is the server's
own time. For reqtable, the table shows how many bytecodes the interpreter executes. The bytecodes are counted, not
estimated, and a call into C counts as one bytecode:
"""

# Explanations of a work's figures. The figures in these texts were measured once, as they say.
NOTES = {
    "churn": """Under `thread` and `fork` each connection has a row in the table. This is why these two policies cost
more than the standard library's classes. With one connection at a time, `sys.settrace` counts 3,600 bytecodes for each
connection in the loop's thread under `thread`, and 740 in the main thread of `ThreadingTCPServer`. The difference pays
for the row and its transitions, the limits and the counters, a duplicate of the socket (for cancelling and lingering),
and the message that the thread is done. A thread that served several connections in turn would cost less than either
server. The threads of `pool` do this, at 0.87 of the cost of `ThreadingTCPServer`. But then a request sees what the
requests before it stored in `threading.local`. Under `fork` the cost is pages: 647 page faults for each connection, in
the parent and the child together. `ForkingTCPServer` has 430. A child writes to about 130 pages when it leaves the loop
that it was forked from.
""",
    "redis-16": """A GET takes five steps, and each step enters a state and asks its want. The five steps together take
1,300 bytecodes. The servers with streams await all commands in one coroutine. This costs less for each part of a
command, but more
for each answer, because these servers send each answer separately.
""",
    "forward-lines": """Each line passes the forwarder twice: to a server that echoes it, and back. The load is both
ends, so the echo costs the forwarder nothing. HAProxy shows what a forwarder in C costs.
""",
    "forward-bulk-10-256": """A larger read costs fewer system calls for each MB. reqtable reads 64 KiB at once, unless
`recv_bytes` and the limit of `chunk()` say more. HAProxy keeps its own size of 16 KiB.
""",
    "publish-1": """`reqtable-state` waits for `either(line(), told())`, and `reqtable-told` for `told()` alone. The
servers with streams have a bounded queue and a task for each subscriber. In `reqtable-sends` and `asyncio-writes` the
publisher itself writes to all subscribers.
""",
    "publish-16": """reqtable sends all messages of one pass to a subscriber at once, where streams write each message.
""",
    "hello-8": """The application's threads take turns with the interpreter. On one core this costs little, because a
thread that gives its turn away also gives the core away.
""",
    "hello-8-cores": """Here the servers run wherever the kernel puts them, as most servers do. Threads on several cores
compete for the interpreter, and each hand-over wakes a thread on another core. This costs the servers with threads much
more, and differs much between rounds.
""",
    "file-8": """A sampling profile attributed 44 % of the time of reqtable to the kernel, and 29 % to the one send of
10 KiB. At 60 µs for a request this is 26 µs, where a fifth of the time of `http.server` is 22 to 32 µs.
""",
    "honest-slow": """The processor time includes that of the slow clients, who together send 2,000 bytes and take 2,000
pieces of 256 bytes every second.
""",
    "growth-10000": """Much of the growth is in the kernel. The table of goals shows the growth of the floor, which does
little but system calls, and the growth of user time alone.
""",
    "snapshot": """`snapshot()` returns one list. In a step it holds up the loop until the list is complete. If there
are thousands of requests, use `call(self.server.table.snapshot, on="thread")`: in a thread it lets the loop run after
every 250 rows. reqtable does the same for SIGUSR1, and logs a slice in each pass. Making the rows is the cost:
even 10,000 dicts of 17 constants take 4.5 ms.
""",
}

PROFILED_WORK = "echo-50"
UNCOUNTED = ("uvloop-protocol", "uvloop-streams", "asyncio-protocol", "asyncio-streams", "gevent")
BYTECODES_SHOWN = 5

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
    """Return the text of docs/performance.md."""
    found = outcomes(measured)
    met = sum(each.met for each in found)
    parts = [INTRODUCTION, *([QUICK_NOTE] if measured["quick"] else []), "## The goals", ""]
    parts += [
        f"{met} of {len(found)} are met.",
        "",
        GOALS_NOTE.rstrip(),
        "",
        *markdown(GOAL_HEADINGS, [each.cells() for each in found]),
    ]
    parts += ["## Where the time goes", "", *where_time_goes(measured)]
    parts += [POLICIES.format(costs="\n".join(policy_costs(measured)).rstrip())]
    if "growth-10" in measured["works"]:
        parts += ["## As connections grow", "", "![CPU per request as connections grow](performance/growth.svg)", ""]
    for name, by_peer in measured["works"].items():
        work = WORKS[name]
        parts += [f"## {work.title}", ""]
        if name in PLOTTED:
            parts += [f"![{work.title}](performance/{name}.svg)", ""]
        parts += [f"The baseline is {work.baseline}.", ""] if main_figure(work) != "step_ms" else []
        parts += markdown(headings(work), list(rows(work, by_peer)))
        parts += [NOTES[name]] if name in NOTES else []
    parts += ["## Measured on", "", *markdown(["", ""], [[key, str(value)] for key, value in provenance(measured)])]
    parts += [f"- Skipped: {reason}." for reason in measured["skipped"]]
    return "\n".join(parts).rstrip() + "\n"


def where_time_goes(measured: Measured) -> list[str]:
    """Return the section that splits the cost of a line between the kernel and Python."""
    counted: dict[str, dict[str, float]] = measured["bytecodes"]["lines"]
    by_peer = measured["works"].get(PROFILED_WORK, {})
    if "floor" not in by_peer:
        return []
    floor = spread(by_peer["floor"], "cpu_us").median
    lines = []
    for peer in [*counted, *UNCOUNTED]:
        if peer not in by_peer:
            continue
        own = spread(by_peer[peer], "cpu_us").median
        count = sum(counted.get(peer, {}).values())
        cells = [f"{count:.0f}", f"{(own - floor) / count * 1e3:.1f}"] if count else ["–", "–"]
        lines.append([peer, plain(own), plain(own - floor), *cells])
    functions = {
        name: max(each.get(name, 0) for each in counted.values()) for each in counted.values() for name in each
    }
    table = [
        [f"`{name}`", *(f"{each[name]:g}" if name in each else "–" for each in counted.values())]
        for name in sorted(functions, key=lambda name: -functions[name])
        if functions[name] >= BYTECODES_SHOWN
    ]
    return [
        WHERE.format(floor=plain(floor)),
        *markdown(["", "a line, 50 connections, µs", "above the floor, µs", "bytecodes", "ns each"], lines),
        "By function:",
        "",
        *markdown(["", *counted], table),
    ]


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


# -- plots ------------------------------------------------------------------------------------------------------------


def plot_all(measured: Measured, folder: Path) -> list[Path]:
    """Write the plots of the page. Returns their paths."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "reqtable"  # the same figures give the same bytes
    matplotlib.rcParams["svg.fonttype"] = "none"
    folder.mkdir(parents=True, exist_ok=True)
    written = [plot_work(WORKS[name], measured["works"][name], folder) for name in PLOTTED if name in measured["works"]]
    if "growth-10" in measured["works"]:
        written.append(plot_growth(measured, folder))
    return written


def drawn(path: Path, height: float, draw: Callable[[Any], None]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def plot_work(work: Work, by_peer: dict[str, Rounds], folder: Path) -> Path:
    name = main_figure(work)
    found = sorted(((spread(rounds, name), peer) for peer, rounds in by_peer.items()), key=lambda pair: -pair[0].median)
    # If one peer costs a hundred times as much as another, only a logarithmic axis shows both.
    wide = found[0][0].median > 30 * found[-1][0].median

    def draw(axes: Any) -> None:
        medians = [each.median for each, _ in found]
        errors = [[each.median - each.least for each, _ in found], [each.most - each.median for each, _ in found]]
        colours = ["#c0392b" if peer.startswith(OURS) else "#7f8c8d" for _, peer in found]
        axes.barh([peer for _, peer in found], medians, xerr=errors, color=colours, ecolor="#2c3e50", capsize=2)
        axes.set_xlabel(headings(work)[1] + (", logarithmic" if wide else ""))
        axes.set_title(work.title, loc="left")
        if wide:
            axes.set_xscale("log")

    return drawn(folder / f"{work.name}.svg", 0.8 + 0.28 * len(found), draw)


def plot_growth(measured: Measured, folder: Path) -> Path:
    by_size = {
        int(name.removeprefix("growth-")): by_peer
        for name, by_peer in measured["works"].items()
        if name.startswith("growth-")
    }

    def draw(axes: Any) -> None:
        for peer in dict.fromkeys(peer for by_peer in by_size.values() for peer in by_peer):
            points = [
                (size, spread(by_peer[peer], "cpu_us").median) for size, by_peer in by_size.items() if peer in by_peer
            ]
            ours = peer.startswith(OURS)
            axes.plot(*zip(*points, strict=True), marker="o", label=peer, linestyle="-" if ours else "--")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("connections, all of them busy")
        axes.set_ylabel(LOADED[1])
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    return drawn(folder / "growth.svg", 4.5, draw)
