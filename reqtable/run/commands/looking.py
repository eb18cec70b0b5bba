"""`reqtable stats`, `workers` and `watch`: what a running server does."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import click

from reqtable.run.commands import shown
from reqtable.run.commands.asking import Asked, asks, print_json, print_json_array
from reqtable.run.commands.completing import list_of
from reqtable.run.commands.finding import CouldNotAsk
from reqtable.run.commands.restart import restart_text, taken_text
from reqtable.run.commands.shown import Column
from reqtable.run.commands.stuck import killed_text, place_of, stack_lines, stuck_in

_SERVERS = [
    Column("handler", lambda row: shown.text(row["handler"])),
    Column("address", lambda row: shown.text(row["address"])),
    Column("accepted", lambda row: str(row["accepted"]), is_number=True),
    Column("finished", lambda row: str(sum(row["finished"].values())), is_number=True),
    Column("refused", lambda row: str(sum(row["refused"].values())), is_number=True),
    Column("in", lambda row: shown.size(row["bytes_in"]), is_number=True),
    Column("out", lambda row: shown.size(row["bytes_out"]), is_number=True),
    Column("endings", lambda row: _counts({**row["finished"], **row["refused"]})),
]
_POOL = Column("pool", lambda row: _pool(row.get("pool")))
_CALLS = Column("calls", lambda row: calls_text(row.get("calls") or {}))
_WORKERS = [
    Column("worker", lambda row: str(row["worker"]), is_number=True),
    Column("is", lambda row: _phase(row)),
    Column("age", lambda row: shown.age(row["age_s"]), is_number=True),
    Column("heard", lambda row: shown.age(row["heard_s"]), is_number=True),
    Column("requests", lambda row: shown.text(row["entries"]), is_number=True),
    Column("mem", lambda row: shown.size(row["buffered_bytes"]), is_number=True),
]
_STUCK_AT = Column("stuck at", lambda row: shown.text(place_of(row["stack"]) if row["is_stuck"] else None))
_PHASES = {"running": "running", "given_up": "given up, still running", "queued": "queued"}
_LEAVING = "leaving"


def _phase(row: dict[str, Any]) -> str:
    if row["is_stuck"]:
        return f"STUCK, {_LEAVING}" if row["phase"] == _LEAVING else "STUCK"
    return "draining" if row["is_draining"] else shown.text(row["phase"])


def _pool(pool: dict[str, int] | None) -> str:
    return "-" if pool is None else f"{pool['busy']} of {pool['size']} threads busy, {pool['queued']} wait"


def calls_text(calls: Mapping[str, Mapping[str, int | None]]) -> str:
    """Return what calls do, for each executor that has some; `-` if there are none."""
    found = []
    for name, counts in calls.items():
        words = [f"{counts[phase]} {text}" for phase, text in _PHASES.items() if counts[phase]]
        most = "" if counts["most"] is None else f" (at most {counts['most']} run)"
        if words:
            found.append(f"{shown.text(name)}: {', '.join(words)}{most}")
    return "; ".join(found) or "-"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{shown.text(name)} {count}" for name, count in counts.items() if count) or "-"


@click.command("stats", short_help="Figures: requests, memory, lateness of the loop.")
@asks
def stats_command(server: Asked, as_json: bool) -> None:
    """Print the figures of a running server: requests, memory, how late its loop is, and the last change of its
    configuration.
    """
    began = time.perf_counter()
    found = server.get("/v1/stats")
    took_s = time.perf_counter() - began
    if as_json:
        print_json(found)
        return
    if found.get("workers") == []:
        raise CouldNotAsk("no worker answers: see reqtable workers")
    shown.print_lines(shown.pairs(_stats(found, took_s)))
    click.echo()
    shown.print_lines(shown.table([*_SERVERS, _POOL, _CALLS], found["servers"], [_POOL, _CALLS]))


def _stats(found: dict[str, Any], took_s: float) -> Iterator[tuple[str, str]]:
    loop = found["loop"]
    workers = found.get("workers")
    if workers is not None:
        yield "workers", ", ".join(shown.text(each.get("worker")) for each in workers) or "-"
    drains = ", accepts no more" if found["is_draining"] else ""
    most = f"{found['entries_max']}{' in all workers' if workers else ''}"
    yield "requests", f"{found['entries']}, at most {most}: {_counts(found['states'])}{drains}"
    yield "connections", str(found["connections"])
    yield "buffers", shown.size(found["buffered_bytes"])
    if found["restart"] is not None:
        yield "restart", restart_text(found["restart"])
    if found["taken"] is not None:
        yield "taken", taken_text(found["taken"])
    yield "loop", f"{loop['passes']} passes, {_mean_and_most(loop, 'pass_s')}"
    yield "late", f"timers by {_mean_and_most(loop, 'lag_s')}; this answer took {shown.brief(took_s)}"
    if found["changed_s"] is None:
        yield "changed", "the configuration never"
    else:
        yield "changed", f"the configuration {shown.age(found['changed_s'])} ago:"
        yield from (("", line) for line in shown.changes(found["changes"]))


def _mean_and_most(loop: dict[str, float], name: str) -> str:
    return f"{shown.brief(loop[f'{name}_mean'])} on average, {shown.brief(loop[f'{name}_max'])} at most"


@click.command("workers", short_help="Workers, and the code that holds up a stuck worker.")
@asks
def workers_command(server: Asked, as_json: bool) -> None:
    """Print the workers of a running server. A worker that does not answer is STUCK.

    The stack of a stuck worker shows the code that holds it up. `heard` is the time since the worker's loop last
    reported. `leaving` says that a worker was told to end.
    """
    found = server.get("/v1/workers")
    if as_json:
        print_json_array(iter(found))
        return
    shown.print_lines(shown.table([*_WORKERS, _STUCK_AT], found, [_STUCK_AT]))
    stuck = stuck_in(found)
    for each in stuck:
        click.echo(f"\nworker {each['worker']} is stuck in:")
        shown.print_lines(f"  {shown.text(line)}" for line in stack_lines(each["stack"]))
    if stuck:
        click.echo()
        end = killed_text(server)
        for each in stuck:
            if each["phase"] == _LEAVING:
                click.echo(f"worker {each['worker']} was told to end: {end}")
            else:
                click.echo(f"reqtable drain --worker {each['worker']} replaces it: {end}")


# -- events -----------------------------------------------------------------------------------------------------------


_KINDS = ("begun", "state", "ended")


def _known_kinds(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    kinds = None if value is None else [each.strip() for each in value.split(",")]
    unknown = [each for each in kinds or () if each not in _KINDS]
    if unknown:
        raise click.BadParameter(f"there is no kind {unknown[0]!r}: use {', '.join(_KINDS)}")
    return None if kinds is None else ",".join(kinds)


@click.command("watch", short_help="Events, one line each, as they happen.")
@click.option(
    "--kinds",
    callback=_known_kinds,
    metavar="A,B,…",
    help="begun, state, ended; otherwise all but state.",
    shell_complete=list_of(_KINDS),
)
@asks
def watch_command(server: Asked, as_json: bool, kinds: str | None) -> None:
    """Print what happens to the requests of a running server, one line for each event, until Ctrl-C."""
    width = shown.terminal_width(sys.stdout)
    with suppress(KeyboardInterrupt):
        for event in _events(server.lines("/v1/events", is_endless=True, kinds=kinds)):
            line = json.dumps(event) if as_json else _event_line(event)
            click.echo(line if as_json or width is None else shown.cut(line, width))
            sys.stdout.flush()


def _events(lines: Iterator[bytes]) -> Iterator[Any]:
    """Yield the data of server-sent events."""
    for line in lines:
        field, _, value = line.partition(b":")
        if field == b"data":
            yield json.loads(value)


_ONCE = {"event", "at", "id"}
_OF_A_MOVE = {"from", "to", "by"}


def _event_line(event: dict[str, Any]) -> str:
    at = event["at"]
    clock = f"{time.strftime('%H:%M:%S', time.localtime(at))}.{int(at % 1 * 1000):03}"
    left_out = _ONCE if event["event"] == "state" else _ONCE | _OF_A_MOVE
    words = [
        f"{shown.text(name.removesuffix('_s'))}={shown.age(value) if name.endswith('_s') else _quoted(value)}"
        for name, value in event.items()
        if name not in left_out and value is not None and value is not False
    ]
    return " ".join([clock, shown.text(event["event"]).ljust(6), shown.text(event.get("id")), *words])


def _quoted(value: Any) -> str:
    """Return a value as printable text, in quotation marks if it would not be read as one word otherwise."""
    text = shown.text(value)
    return json.dumps(text) if not text or any(each in text for each in ' "=') else text
