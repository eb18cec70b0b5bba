"""What is made of the figures: medians and ratios, the table in the terminal, the page, its plots.

A ratio is the median of the ratios of each round to the baseline's in the same round, with the least and the most of
them beside it; across works, that of the medians.
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

from tests.benchmarks.work import COMPILED_GOALS, GOALS, WORKS, Figures, Goal, Work

Measured = dict[str, Any]  # what a run has written: see `__main__`
Rounds = list[Figures]

MARK = "*"  # a cell in which the load worked no less than the server
OURS = ("reqtable", "compiled")
PLOTTED = ("echo-50", "echo-500", "pipelined", "churn", "udp", "redis-16", "idle")


@dataclass(frozen=True)
class Spread:
    """The median of several values, the least and the most of them."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: str = ".3g") -> str:
        return f"{plain(self.median, digits)} ({plain(self.least, digits)}–{plain(self.most, digits)})"


def plain(value: float, digits: str = ".3g") -> str:
    """Without an exponent."""
    text = f"{value:{digits}}"
    return f"{value:,.0f}" if "e" in text or value >= 1000 else text


# -- the figures of a round -------------------------------------------------------------------------------------------


def cpu_us(figures: Figures) -> float:
    return figures["cpu_s"] / figures["requests"] * 1e6


def value_of(figures: Figures, name: str) -> float:
    return cpu_us(figures) if name == "cpu_us" else figures[name]


def user_us(rounds: Rounds) -> float:
    """Microseconds of a request that are not the kernel's; of all rounds, as they are sampled."""
    return sum(each["user_s"] for each in rounds) / sum(each["requests"] for each in rounds) * 1e6


def main_figure(work: Work) -> str:
    return {"idle": "kib", "shutdown": "ms", "snapshot": "step_ms"}.get(work.name, "cpu_us")


def spread(rounds: Rounds, name: str) -> Spread:
    return Spread.of([value_of(each, name) for each in rounds])


def ratio(rounds: Rounds, others: Rounds, name: str) -> Spread:
    return Spread.of([value_of(a, name) / value_of(b, name) for a, b in zip(rounds, others, strict=False)])


def is_limited_by_load(rounds: Rounds) -> bool:
    """The load took as much time as the server: what it costs to wait for it is in the server's figure."""
    return "load_s" in rounds[0] and sum(each["load_s"] for each in rounds) >= sum(each["cpu_s"] for each in rounds)


# -- goals ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """`user` is the ratio of user time alone, `floor` that of the floor, in C, to the same: what could be.

    `allowed_us` is what the goal leaves for what is not the floor's, and `taken_us` what it takes of that.
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
        """What a peer is compared to: another's figures, or its own in another work."""
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
    "most µs",
]
HEADINGS = {
    "kib": ["server", "KiB a connection", "ratio to the baseline", "connections"],
    "ms": ["server", "ms", "ratio to the baseline", "most ms"],
    "step_ms": ["taken", "ms", "the longest that another request waited, ms"],
}


def headings(work: Work) -> list[str]:
    return HEADINGS.get(main_figure(work), LOADED)


def rows(work: Work, by_peer: dict[str, Rounds]) -> Iterator[list[str]]:
    """The cells of each peer, the best first."""
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
    """As JSON, a round on each line."""
    text = json.dumps(measured, indent=1, ensure_ascii=False)
    return re.sub(r"\{[^{}]*\}", lambda found: " ".join(found.group().split()), text) + "\n"


def show(measured: Measured) -> None:
    """The tables, in the terminal."""
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
    known = [each.cells() for each in outcomes(measured, [*GOALS, *COMPILED_GOALS]) if each.found is not None]
    if known:
        table("Goals", GOAL_HEADINGS, known)
    for line in limited(measured):
        console.print(line, highlight=False)


def limited(measured: Measured) -> list[str]:
    """The cells that say more of the load than of the server. The floor is as cheap as the load: that is known."""
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

Generated by `python -m tests.benchmarks page` from [figures.json](performance/figures.json), which `make bench` has
measured. A figure is the server's own processor time for each request, user and system, as the operating system
accounts for it (children included), and its ratio to a server that does the same work: each line is framed and
answered, whatever the library hands over. Servers take turns round by round, on a core of their own; the load is a
program in C on another. Each cell is the median of the rounds, with the least and the most of them; a ratio is that of
figures of the same round. Wall-clock figures (requests/s, waits) are there for orientation: on a shared machine they
say little. A figure with `*`: there the load took as much processor time as the server, which may have waited for it.
"""

QUICK_NOTE = """**These are the figures of a quick run (`make bench QUICK=1`): short rounds, few of them. They show
orders of magnitude, not percents.**
"""

GOALS_NOTE = """A ratio compares all processor time, the kernel's included, which is the same for servers that make the
same system calls. The next column compares user time alone, which the kernel samples every hundredth of a second. The
floor is a loop in C that does little but its system calls, on the same scale. The last columns compare the time left
after that floor with the time used, for each request; if the time left is negative, the goal cannot be met.
"""

COMPILED_NOTE = """These are of the package as it is installed: interpreted. The same goals with the hot path
[compiled](deploying.md#compiled), where that is what they depend on; {met} of {count} are met:
"""

POLICIES = """## What each policy costs, and when to choose which

{costs}

- **A state machine, inline** keeps nothing but a row: choose it for protocols, for many connections that are mostly
  idle, and for whatever must be seen, limited and moved.
- **A coroutine, inline** keeps its frames, too. Choose it where the conversation reads better from top to bottom.
- **`greenlet`** is for blocking handlers as they are, with many slow clients: each costs a suspended stack in memory,
  and its switches. A handler that waits for anything but its own socket keeps everybody waiting.
- **`thread`** costs a thread for each connection: cheap for each line, since the kernel does the waiting and wakes who
  is meant; dear for each new connection, and in memory. Choose it for handlers that wait for databases, or locks.
- **`fork`** costs a process for each connection: milliseconds. Choose it where isolation is worth that: what a request
  does to memory ends with it, and it uses a core of its own.
- **`pool`** costs a trip to a thread and back for each step. Choose it where steps wait for other things, and
  connections are too many for a thread each. **`executor`** (not measured) costs a trip to a process: it pays where
  steps compute.

[Choosing a dispatch policy](policies.md) says what handlers share under each, and what can't run.
"""

WHERE = """A line takes two system calls, and a share of a third that tells of it. The floor in C has nothing else to
do, and takes {floor} µs: that is the kernel's, whoever calls it, and hardly to be saved. What comes on top of it is the
server's own. For reqtable that is so many bytecodes of the interpreter, counted, calls into C among them:
"""

# What the figures of a work don't say themselves. Those in here were measured once, as told.
NOTES = {
    "churn": """Under `thread` and `fork` a connection is a row of the table, too: that is what these two cost more than
the standard library's. Counted by `sys.settrace`, one at a time: 3,600 bytecodes in the loop's thread for each under
`thread`, 740 in that of `ThreadingTCPServer`, for its row and its transitions, the limits and the counters, a second
hold on its socket (what a cancellation shuts, and what lingers), and the word that its thread is done. A thread that
served one connection after another would cost less than either (`pool` does so: 0.87 of `ThreadingTCPServer`), and
would carry `threading.local` from one request to the next. Under `fork` it is pages: 647 page faults for each
connection, in the parent and in the child, where `ForkingTCPServer` has 430. A child writes to some 130 pages to leave
the loop that it was forked from.
""",
    "redis-16": """A GET is five steps: that many times a state is entered, and its want is asked, which comes to 1,300
bytecodes. The streams' commands are awaited in one coroutine: that costs less for each part of a command, and more for
each answer, which they send by itself.
""",
    "growth-10000": """A good part of what grows is the kernel's: the goals' table has the growth of the floor, which
does nothing else, and that of user time alone.
""",
    "snapshot": """`snapshot()` gives a list at once: taken in a step, it holds up the loop for as long as it takes.
With thousands of requests take it by `call(self.server.table.snapshot, on="thread")`: there it lets the loop run every
250 rows. So does what reqtable takes itself: SIGUSR1 logs a slice in each pass. The rows as such are what it costs:
10,000 dicts of 17 constants take 4.5 ms.
""",
}

PROFILED_WORK = "echo-50"
UNCOUNTED = (
    "compiled-state",
    "compiled-async",
    "uvloop-protocol",
    "uvloop-streams",
    "asyncio-protocol",
    "asyncio-streams",
    "gevent",
)
BYTECODES_SHOWN = 5

POLICY_PEERS = {
    "reqtable-state": "a state machine, `inline`",
    "compiled-state": "the same, compiled",
    "reqtable-async": "a coroutine, `inline`",
    "compiled-async": "the same, compiled",
    "reqtable-pool": "a state machine, `pool`",
    "reqtable-greenlet": "a blocking handler, `greenlet`",
    "reqtable-thread": "a blocking handler, `thread`",
    "compiled-thread": "the same, compiled",
    "reqtable-fork": "a blocking handler, `fork`",
    "reqtable-inline": "a blocking handler, `inline`: one at a time",
}
POLICY_WORKS = {
    "echo-1": "a line, µs",
    "echo-50": "at 50, µs",
    "churn": "connect, line, close, µs",
    "idle": "idle, KiB",
}


def page(measured: Measured) -> str:
    """docs/performance.md."""
    found, compiled = outcomes(measured), outcomes(measured, COMPILED_GOALS)
    met = sum(each.met for each in found)
    parts = [INTRODUCTION, *([QUICK_NOTE] if measured["quick"] else []), "## The goals", ""]
    parts += [
        f"{met} of {len(found)} are met.",
        "",
        GOALS_NOTE.rstrip(),
        "",
        *markdown(GOAL_HEADINGS, [each.cells() for each in found]),
        COMPILED_NOTE.format(met=sum(each.met for each in compiled), count=len(compiled)),
        *markdown(GOAL_HEADINGS, [each.cells() for each in compiled]),
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
    """What the kernel takes of a line, and what Python does."""
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
        *markdown(["", "a line at 50, µs", "less the floor", "bytecodes", "ns each"], lines),
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


# -- plots ------------------------------------------------------------------------------------------------------------


def plot_all(measured: Measured, folder: Path) -> list[Path]:
    """Write the plots of the page; returns where."""
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
    # Where one costs a hundred times what another does, only a logarithm shows both.
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
