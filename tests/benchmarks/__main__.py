"""`make bench`: compare reqtable with the libraries that people would use instead.

python -m tests.benchmarks run [--quick] [--json FILE] [NAME…]    measure; a NAME is a work or a peer, or a pattern
python -m tests.benchmarks show [FILE]                            show the tables again
python -m tests.benchmarks page [FILE]                            write docs/explanation/performance.md and its chart
python -m tests.benchmarks add [FILE]                             add the works of a run to the page
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.benchmarks.processes import (
    CORES,
    ENVIRONMENT,
    LOAD_CORE,
    ROOT,
    SERVER_CORE,
    Failed,
    Server,
    Tools,
    tools,
)
from tests.benchmarks.report import Measured, page, plot, show, written
from tests.benchmarks.servers import PEERS
from tests.benchmarks.work import FULL, QUICK, WARM_UP, WORKS, Effort, Figures, Work

DOCUMENT = ROOT / "docs" / "explanation" / "performance.md"
FIGURES = ROOT / "docs" / "explanation" / "performance" / "figures.json"
NEW = ROOT / "build" / "bench.json"
FLOOR = "floor"
COUNTING_S = 1800.0  # the most that counting bytecodes and instructions may take

Job = tuple[Work, str]
Advance = Callable[[str], None]


def measure(works: list[Work], peers: list[str], effort: Effort, advance: Advance) -> dict[str, Any]:
    """Measure the works. Returns the rounds of each work and peer, and the reasons for what was skipped."""
    found: dict[str, dict[str, list[Figures]]] = {work.name: {} for work in works}
    skipped: list[str] = []
    with tools() as compiled:
        for _, group in groupby(works, key=lambda work: work.group or work.name):
            jobs = [job for work in group for job in jobs_of(work, peers, compiled, skipped)]
            for work, peer, figures in measure_group(jobs, compiled, effort, skipped, advance):
                found[work.name].setdefault(peer, []).append(figures)
    return {"works": {name: by_peer for name, by_peer in found.items() if by_peer}, "skipped": sorted(set(skipped))}


def jobs_of(work: Work, peers: list[str], compiled: Tools, skipped: list[str]) -> Iterator[Job]:
    if work.kind == "redis" and compiled.redis is None:
        skipped.append(f"{work.name}: there is no redis-benchmark here (package redis-tools)")
        return
    for name in work.names:
        missing = PEERS[name].missing if name in PEERS else None
        if name in peers and missing is not None:
            skipped.append(f"{name}: {missing}")
        elif name in peers:
            yield work, name


def measure_group(
    jobs: list[Job], compiled: Tools, effort: Effort, skipped: list[str], advance: Advance
) -> Iterator[tuple[Work, str, Figures]]:
    """Do the jobs in turn, round by round, in a different order each round. A job that fails is not done again."""
    turns = deque(jobs)
    failed: set[Job] = set()
    with ExitStack() as stack:
        servers: dict[tuple[str, str], Server] = {}

        def server_of(work: Work, peer: str) -> Server:
            """Return a warm server, which has done everything that a server does only once."""
            key = (peer, work.kind)
            if key not in servers:
                servers[key] = stack.enter_context(compiled.server(*key))
                work.measure(work, compiled, servers[key], WARM_UP)
            return servers[key]

        for number in range(effort.rounds):
            for work, peer in turns:
                if number >= work.rounds(effort):
                    continue
                advance(f"{work.name}, {peer}")
                if (work, peer) in failed:
                    continue
                try:
                    if work.fresh:
                        with compiled.server(peer, work.kind) as server:
                            figures = work.measure(work, compiled, server, effort)
                    else:
                        figures = work.measure(work, compiled, server_of(work, peer), effort)
                except (Failed, subprocess.SubprocessError, OSError) as problem:
                    skipped.append(f"{work.name}, {peer}: {problem}")
                    failed.add((work, peer))
                else:
                    yield work, peer, {key: float(f"{value:.6g}") for key, value in figures.items()}
            turns.rotate(-1)


# -- where ------------------------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    processor = next(
        (line.partition(":")[2].strip() for line in open_lines("/proc/cpuinfo") if line.startswith("model name")), "?"
    )
    machine = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": f"{processor}, {len(CORES)} cores; servers on core {SERVER_CORE}, the load on core {LOAD_CORE}",
        "load average before": f"{os.getloadavg()[0]:.1f}",
    }
    versions = {
        "Python": platform.python_version(),
        "C module": "built" if find_spec("reqtable._lean") else "not built",
    }
    for package in sorted({peer.package for peer in PEERS.values()} - {"socketserver", "asyncio"}):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if shutil.which("haproxy"):
        said = subprocess.run(["haproxy", "-v"], capture_output=True, text=True).stdout
        versions["HAProxy"] = said.split()[2] if len(said.split()) > 2 else "?"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return {"machine": machine, "versions": versions, "commit": commit(), "measured_at": when}


def counts() -> Any:
    """Return the output of `tests.benchmarks.profile`: bytecodes and instructions."""
    command = [sys.executable, "-m", "tests.benchmarks.profile", "--json"]
    how: dict[str, Any] = {"cwd": ROOT, "env": ENVIRONMENT, "timeout": COUNTING_S}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, **how).stdout)


def open_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def commit() -> str:
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return shown.stdout.strip() or "unknown"


# -- the commands -----------------------------------------------------------------------------------------------------


def chosen(names: list[str]) -> tuple[list[Work], list[str]]:
    """Return the works and peers that are named, or else all. Raises SystemExit for a name that matches neither."""
    everybody = [*PEERS, FLOOR]
    for name in names:
        if not fnmatch.filter([*WORKS, *everybody], name):
            raise SystemExit(f"{name} is no work and no peer: {', '.join([*WORKS, *everybody])}")
    works = [work for work in WORKS.values() if any(fnmatch.fnmatch(work.name, name) for name in names)]
    peers = [peer for peer in everybody if any(fnmatch.fnmatch(peer, name) for name in names)]
    works = works or list(WORKS.values())
    if not peers:
        return works, everybody
    return works, [*peers, *({work.baseline for work in works} - set(peers))]


def run(names: list[str], effort: Effort, path: Path) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    works, peers = chosen(names)
    os.sched_setaffinity(0, {LOAD_CORE})  # this process must not disturb the server
    total = sum(work.rounds(effort) * len([name for name in work.names if name in peers]) for work in works)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    about = provenance()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=total)
        found = measure(works, peers, effort, lambda text: progress.update(task, advance=1, description=text))
        progress.update(task, completed=total, description="done")
    measured: Measured = (
        about
        | {"quick": effort.seconds < FULL.seconds, "rounds": effort.rounds, "seconds": effort.seconds}
        | found
        | ({} if names else counts())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written(measured))
    show(measured)
    print(f"written to {path}; `python -m tests.benchmarks page {path}` makes the page")
    return 0 if measured["works"] else 1


def write_page(path: Path) -> int:
    measured = json.loads(path.read_text())
    if path != FIGURES:
        FIGURES.parent.mkdir(parents=True, exist_ok=True)
        FIGURES.write_text(written(measured))
    DOCUMENT.write_text(page(measured))
    print(DOCUMENT, plot(measured, FIGURES.parent), sep="\n")
    return 0


def add(path: Path) -> int:
    """Put the works of a run into the page's figures. The page says that they were measured apart."""
    measured, added = json.loads(FIGURES.read_text()), json.loads(path.read_text())
    measured["works"] |= added["works"]
    where = {key: added[key] for key in ("commit", "measured_at", "rounds", "seconds")}
    where["load_before"] = added["machine"]["load average before"]
    for each in measured.setdefault("apart", []):
        each["works"] = [name for name in each["works"] if name not in added["works"]]
    apart = [each for each in measured["apart"] if each["works"]]
    measured["apart"] = [*apart, {"works": list(added["works"]), **where}]
    measured["versions"] |= added["versions"]
    FIGURES.write_text(written(measured))
    return write_page(FIGURES)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure, and show the tables")
    running.add_argument("--quick", action="store_true", help="take minutes, not an hour")
    running.add_argument("--rounds", type=int, help="how many rounds; more rounds mean less noise")
    running.add_argument("--json", type=Path, default=NEW, help="the file for the figures")
    running.add_argument("names", nargs="*", metavar="NAME", help="a work or a peer, or a pattern such as echo-*")
    for name, text, default in (
        ("show", "show the tables of a run", NEW),
        ("page", "write the page and its chart", FIGURES),
        ("add", "add the works of a run to the page", NEW),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("json", type=Path, nargs="?", default=default)
    options = parser.parse_args()
    try:
        if options.command == "page":
            return write_page(options.json)
        if options.command == "add":
            return add(options.json)
        if options.command == "show":
            show(json.loads(options.json.read_text()))
            return 0
        effort = QUICK if options.quick else FULL
        if options.rounds:
            effort = replace(effort, rounds=options.rounds, fresh_rounds=options.rounds)
        return run(options.names, effort, options.json)
    except (Failed, FileNotFoundError) as problem:
        raise SystemExit(str(problem)) from None


if __name__ == "__main__":
    sys.exit(main())
