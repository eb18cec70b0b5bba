"""The fuzzer: `make simulate SEEDS=10000`, or `python -m tests.simulation --seeds 10000`.

Runs seeds on all processors. For each seed that fails, prints the problem, the faults that it needs, and the command
that runs it again; then sums up. `--seed N` runs one seed and prints its trace. `--of handover` simulates processes
that hand their requests over, instead of servers, and `--of takeover` processes that die and are continued.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reqtable.testing import Report, SimulationFailed, shrink
from tests.mutations import MUTATIONS, RARE, SEEDS, Mutation, first_failure
from tests.mutations.handover import HANDOVER_MUTATIONS, HANDOVER_RARE
from tests.mutations.takeover import TAKEOVER_MUTATIONS, TAKEOVER_RARE
from tests.simulation import workloads
from tests.simulation.handover import workloads as handover
from tests.simulation.takeover import workloads as takeover

CHUNK = 25
END = "<!-- end of figures -->"


@dataclass(frozen=True)
class Kind:
    """Says what is simulated, and which deliberate bugs that must find, each with the seeds that may."""

    run: Callable[..., tuple[str, Report]]  # takes a seed, and the names of the only faults that may happen
    name_of: Callable[[int], str]
    clients_of: Callable[[int], Sequence[Any]]
    bugs: Sequence[tuple[Mutation, Sequence[int]]]
    begin: str  # where the figures go in the document


KINDS = {
    "servers": Kind(
        workloads.run,
        lambda seed: workloads.workload_of(seed).name,
        lambda seed: workloads.workload_of(seed).clients,
        [*((each, range(SEEDS)) for each in MUTATIONS), *((rare, [seed]) for seed, rare in RARE)],
        "<!-- figures: make simulate FIGURES=docs/explanation/tested.md -->",
    ),
    "handover": Kind(
        handover.run,
        lambda seed: handover.name_of(handover.case_of(seed)),
        lambda seed: [client for _, client, _ in handover.case_of(seed).clients],
        [*((each, range(SEEDS)) for each in HANDOVER_MUTATIONS), *((rare, [seed]) for seed, rare in HANDOVER_RARE)],
        "<!-- figures: make simulate OF=handover FIGURES=docs/explanation/tested.md -->",
    ),
    "takeover": Kind(
        takeover.run,
        lambda seed: takeover.name_of(takeover.case_of(seed)),
        lambda seed: [client for _, client in takeover.case_of(seed).clients],
        [*((each, range(SEEDS)) for each in TAKEOVER_MUTATIONS), *((rare, [seed]) for seed, rare in TAKEOVER_RARE)],
        "<!-- figures: make simulate OF=takeover FIGURES=docs/explanation/tested.md -->",
    ),
}


@dataclass
class Sum:
    """Sums up the results of many seeds."""

    seeds: int = 0
    requests: int = 0
    steps: int = 0
    transitions: int = 0
    passes: int = 0
    bytes: int = 0
    simulated_s: float = 0.0
    workloads: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def add(self, name: str, report: Report) -> None:
        self.seeds += 1
        self.requests += report.requests
        self.steps += report.steps
        self.transitions += report.transitions
        self.passes += report.passes
        self.bytes += report.bytes_in + report.bytes_out
        self.simulated_s += report.simulated_s
        self.workloads[name.removeprefix("cancelled ").partition(" ")[0]] += 1
        self.faults += report.faults_by_kind

    def join(self, other: Sum) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def simulate_all(seeds: Sequence[int], of: str = "servers") -> Sum:
    """Run these seeds one after the other, and sum up."""
    kind, sum_ = KINDS[of], Sum()
    for seed in seeds:
        try:
            name, report = kind.run(seed)
        except SimulationFailed as failure:
            name, report = kind.name_of(seed), failure.report
            sum_.failed.append((seed, f"{name}: {'; '.join(report.problems)}"))
        sum_.add(name, report)
    return sum_


def fails_with(kind: Kind, seed: int, faults: Sequence[str]) -> bool:
    try:
        kind.run(seed, faults)
    except SimulationFailed:
        return True
    return False


def explain(seed: int, problem: str, of: str = "servers") -> Iterator[str]:
    """Describe a failure: the problem, the fewest faults that cause it, and the command that shows it."""
    kind = KINDS[of]
    try:
        kind.run(seed)
        faults: Sequence[str] = []
    except SimulationFailed as failure:
        faults = shrink(lambda some: fails_with(kind, seed, some), failure.report.faults)
    yield f"seed {seed}: {problem[:1000]}"
    yield f"  faults needed to make it fail: {', '.join(faults) or 'none'}"
    only = f' FAULTS="{",".join(faults)}"'
    yield f"  make simulate {'' if of == 'servers' else f'OF={of} '}SEED={seed}{only}"


def one(seed: int, faults: str | None, kind: Kind) -> int:
    """Run one seed and print its clients, its trace and its problems."""
    print(f"seed {seed}: {kind.name_of(seed)}")
    for number, client in enumerate(kind.clients_of(seed)):
        print(f"client {number}: {client!r}")
    try:
        _, report = kind.run(seed, None if faults is None else [name for name in faults.split(",") if name])
        problems: list[str] = []
    except SimulationFailed as failure:
        report, problems = failure.report, failure.report.problems
    print(report.trace)
    for peer in report.clients:
        print(f"{peer} received {peer.received[:200]!r}{'…' * (len(peer.received) > 200)}, {peer.ended or 'no end'}")
    print("\n".join(problems) or "nothing is wrong")
    return 1 if problems else 0


def log_little() -> None:
    """Log none of the faults that a simulation makes on purpose."""
    logging.getLogger("reqtable").setLevel(logging.CRITICAL)


def many(first: int, count: int, budget_s: float, processes: int, of: str) -> tuple[Sum, float]:
    """Run `count` seeds from `first` on, or as many as `budget_s` allows."""
    began = time.monotonic()
    total = Sum()
    left = iter([range(at, min(at + CHUNK, first + count)) for at in range(first, first + count, CHUNK)])
    with ProcessPoolExecutor(processes, initializer=log_little) as pool:
        running: set[Future[Any]] = set()
        while True:
            while len(running) < 2 * processes and time.monotonic() - began < budget_s:
                chunk = next(left, None)
                if chunk is None:
                    break
                running.add(pool.submit(simulate_all, chunk, of))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                total.join(each.result())
            show_progress(total, count, time.monotonic() - began)
    return total, time.monotonic() - began


def show_progress(total: Sum, count: int, elapsed_s: float) -> None:
    share = total.seeds / count
    bar = "#" * round(30 * share)
    line = f"[{bar:30}] {total.seeds}/{count} seeds, {len(total.failed)} failed, {elapsed_s:.0f} s"
    if sys.stderr.isatty():
        print(f"\r{line}", end="\n" if total.seeds == count else "", file=sys.stderr)
    elif total.seeds == count or total.seeds // CHUNK % 40 == 0:
        print(line, file=sys.stderr)


def figures(total: Sum, elapsed_s: float, processes: int) -> list[str]:
    """Return the results of a run as the rows of a table."""
    faults = ", ".join(f"{kind} {count:,}" for kind, count in sorted(total.faults.items()))
    workloads = ", ".join(f"{name} {count:,}" for name, count in sorted(total.workloads.items()))
    rows = [
        ("seeds", f"{total.seeds:,}, of which {len(total.failed)} failed"),
        ("workloads", workloads),
        ("requests", f"{total.requests:,}, {total.steps:,} steps, {total.bytes:,} bytes"),
        ("passes of the loop", f"{total.passes:,}, each followed by a check of all invariants"),
        ("transitions of entries", f"{total.transitions:,}"),
        ("faults injected", f"{sum(total.faults.values()):,}: {faults}"),
        ("simulated time", f"{total.simulated_s / 86_400:,.1f} days"),
        ("real time", f"{elapsed_s:,.0f} s on {processes} processors, Python {platform.python_version()}"),
        ("simulated : real", f"{total.simulated_s / elapsed_s:,.0f}"),
    ]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def mutations(kind: Kind) -> list[str]:
    """Return each deliberate bug and the seed that finds it, as the rows of a table."""
    rows = ["| deliberate bug | found by seed | reported as |", "|---|---|---|"]
    for mutation, seeds in kind.bugs:
        found = first_failure(mutation, seeds, kind.run)
        seed, problem = (f"{found[0]}", found[1]) if found is not None else ("none", "")
        rows.append(f"| {mutation.name} | {seed} | {problem} |")
    return rows


def write_figures(path: Path, table: list[str], begin: str) -> None:
    text = path.read_text()
    pattern = re.escape(begin) + ".*?" + re.escape(END)
    found, count = re.subn(pattern, lambda _: "\n".join([begin, "", *table, "", END]), text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{path} lacks the markers between which the figures go: {begin} … {END}")
    path.write_text(found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--of", choices=KINDS, default="servers", help="what to simulate")
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--budget", type=float, default=float("inf"), help="stop after this many seconds")
    parser.add_argument("--seed", type=int, help="run only this seed, and show its details")
    parser.add_argument("--faults", help="with --seed: the only faults that may happen, separated by commas")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--figures", type=Path, help="write the figures into this document")
    options = parser.parse_args()
    log_little()
    if options.seed is not None:
        return one(options.seed, options.faults, KINDS[options.of])
    total, elapsed_s = many(options.first, options.seeds, options.budget, options.processes, options.of)
    table = figures(total, elapsed_s, options.processes)
    print("\n".join(table))
    for seed, problem in sorted(total.failed)[:10]:
        print("\n".join(explain(seed, problem, options.of)))
    if options.figures is not None and not total.failed:
        kind = KINDS[options.of]
        write_figures(options.figures, [*table, "", *mutations(kind)], kind.begin)
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
