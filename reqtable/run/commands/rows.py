"""`reqtable ps`, `show` and `kill`: the requests of a running server."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from reqtable.control.query import ALSO, GROUPS, ORDERS
from reqtable.dispatch import policy_names
from reqtable.run.commands import shown
from reqtable.run.commands.asking import Asked, asks, confirm, print_json, print_json_array
from reqtable.run.commands.completing import known_ids, known_workers, list_of, one_of
from reqtable.run.commands.detail import detail_lines
from reqtable.run.commands.seconds import Seconds
from reqtable.run.commands.shown import Column
from reqtable.table.states import State
from reqtable.table.words import counted

_NO_MATCH = 1  # the exit code
_NOT_FOUND, _CONFLICT = 404, 409
_KILL_MAX = 1000  # how many requests one command ends, unless it says another number


def _text(key: str) -> Callable[[Any], str]:
    return lambda row: shown.text(row.get(key))


def _number(key: str, write: Callable[[Any], str], heading: str) -> Column:
    return Column(heading, lambda row: write(row.get(key)), is_number=True)


def _held(row: Any) -> str:
    return shown.size(row["buffered_in"] + row["buffered_out"])


COLUMNS: dict[str, Column] = {
    "id": _number("id", shown.text, "id"),
    "kind": Column("kind", _text("kind")),
    "parent": _number("parent", shown.text, "parent"),
    "worker": _number("worker", shown.text, "worker"),
    "letter": Column("st", _text("letter")),
    "state": Column("state", _text("state")),
    "peer": Column("peer", _text("peer")),
    "local": Column("local", _text("local")),
    "server": Column("server", _text("server")),
    "handler": Column("handler", _text("handler")),
    "handler_state": Column("at", _text("handler_state")),
    "source": Column("source", _text("source")),
    "policy": Column("policy", _text("policy")),
    "age": _number("age_s", shown.age, "age"),
    "idle": _number("idle_s", shown.age, "idle"),
    "left": _number("deadline_s", shown.age, "left"),
    "mem": Column("mem", _held, is_number=True),
    "in": _number("bytes_in", shown.size, "in"),
    "out": _number("bytes_out", shown.size, "out"),
    "buffered_in": _number("buffered_in", shown.size, "qin"),
    "buffered_out": _number("buffered_out", shown.size, "qout"),
    "steps": _number("steps", shown.text, "steps"),
    "moves": _number("moves", lambda moves: shown.text(moves or None), "moves"),
    "immovable": Column("immovable", _text("immovable")),
    "method": Column("method", _text("method")),
    "path": Column("path", _text("path")),
    "status": _number("status", shown.text, "status"),
    "body_in": _number("body_in", shown.size, "bin"),
    "body_out": _number("body_out", shown.size, "bout"),
    "waits_for": Column("waits for", _text("waits_for")),
}
USUAL = (
    "id",
    "letter",
    "peer",
    "handler",
    "handler_state",
    "age",
    "idle",
    "mem",
    "in",
    "out",
    "moves",
    "path",
    "waits_for",
)
NOT_ALWAYS = ("handler_state", "moves", "path")  # left out if no row has it

LETTERS = {
    State.OPENING: "its preamble (PROXY header, TLS handshake), or its first step",
    State.CONNECTING: "the peer of an outgoing connection",
    State.READING: "bytes from its client",
    State.WAITING: "the first of several things",
    State.READY: "its turn in the loop",
    State.RUNNING: "the end of its step, which runs now",
    State.WRITING: "its client to take output",
    State.SLEEPING: "a timer",
    State.OFFLOADED: "a call, or a step, that runs in a thread or a process",
    State.DELEGATED: "the thread or the child that has the whole request",
    State.LINGERING: "the client's end of file, after the last byte",
    State.MOVING: "the process that takes it over, or this process to go on with it",
}
_LETTERS_HELP = "\b\nThe letters under `st` say what a request waits for:\n" + "\n".join(
    f"  {state.value}  {state.name.ljust(10)}  {meaning}" for state, meaning in LETTERS.items()
)
_COLUMNS_HELP = (
    f"The columns are {', '.join(COLUMNS)}; their headings name them, too. `mem` is the size of a request's "
    "buffers. `moves` is the number of its moves to another process. `immovable` is the reason why it can't move now."
)


def _upper(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return None if value is None else value.upper()


_FILTERS = {
    "older": click.option("--older", type=Seconds(), metavar="S", help="Requests older than S, such as 40 or 2m23s."),
    "idle": click.option("--idle", type=Seconds(), metavar="S", help="Requests silent for more than S seconds."),
    "state": click.option(
        "--state",
        callback=_upper,
        metavar="STATE",
        help="Requests in this state: its name or its letter.",
        shell_complete=one_of(state.name for state in LETTERS),
    ),
    "handler": click.option("--handler", metavar="NAME", help="Requests of this handler class."),
    "handler_state": click.option("--handler-state", metavar="NAME", help="Requests in this state of their handler."),
    "peer": click.option("--peer", metavar="HOST[:PORT]", help="Requests of this client."),
    "path": click.option("--path", metavar="PATH", help="HTTP requests for this path."),
    "policy": click.option(
        "--policy", metavar="NAME", help="Requests under this dispatch policy.", shell_complete=one_of(policy_names())
    ),
    "worker": click.option(
        "--worker", type=int, metavar="PID", help="Requests of this worker.", shell_complete=known_workers
    ),
}


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the filters of requests, and the argument `filters`: those given, by their names in the API."""

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> Any:
        found = {name: given.pop(name) for name in _FILTERS}
        return command(*args, filters={name: value for name, value in found.items() if value is not None}, **given)

    for option in reversed(_FILTERS.values()):
        run = option(run)
    return run


def _chosen(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    by_heading = {column.heading: name for name, column in COLUMNS.items()}
    words = None if value is None else [each.strip() for each in value.split(",")]
    names = None if words is None else [each if each in COLUMNS else by_heading.get(each, each) for each in words]
    unknown = [each for each in names or () if each not in COLUMNS]
    if unknown:
        raise click.BadParameter(f"there is no column {unknown[0]!r}: use {', '.join(COLUMNS)}")
    return names


def _explained(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add to the help of a command what the letters mean, and which columns there are."""
    command.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n{_COLUMNS_HELP}\n\n{_LETTERS_HELP}"
    return command


def _row_lines(rows: Iterator[Any], names: list[str] | None = None) -> Iterator[str]:
    optional = [COLUMNS[name] for name in NOT_ALWAYS] if names is None else []
    return shown.table([COLUMNS[name] for name in names or USUAL], rows, optional)


@click.command("ps", short_help="Requests: the stuck ones, the largest, the busiest clients.")
@_filters
@click.option("--sort", type=click.Choice(list(ORDERS)), help="The largest first; with `id`, the oldest first.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Only the first N.")
@click.option(
    "--columns",
    callback=_chosen,
    metavar="A,B,…",
    help="The columns, in this order.",
    shell_complete=list_of(COLUMNS),
)
@click.option("--by", type=click.Choice(list(GROUPS)), help="Print the number of requests in each group instead.")
@asks
@_explained
def ps_command(
    server: Asked,
    as_json: bool,
    filters: dict[str, Any],
    sort: str | None,
    limit: int | None,
    columns: list[str] | None,
    by: str | None,
) -> int:
    """Print the unfinished requests of a running server, one line each. Every filter that is given must match.

    The exit code is 1 if filters were given, and nothing matches.
    """
    if by is not None:
        if columns or sort not in (None, "mem"):
            raise click.UsageError("--by has its own columns, and sorts by the number of requests, or by --sort mem")
        return _print_groups(server, as_json, filters, by, "buffered" if sort else "count", limit)
    also = next((name for name in columns or () if name in ALSO), None)
    found = _Counted(
        json.loads(line)
        for line in server.lines("/v1/requests", format="ndjson", sort=sort, limit=limit, also=also, **filters)
    )
    _print_rows(found, as_json, columns)
    return _code(server, found.count, filters)


def _print_rows(rows: Iterator[Any], as_json: bool, names: list[str] | None = None) -> None:
    if as_json:
        print_json_array(rows)
    else:
        shown.print_lines(_row_lines(rows, names))


class _Counted(Iterator[Any]):
    """Counts the items that are taken."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self.count = 0

    def __next__(self) -> Any:
        found = next(self._items)
        self.count += 1
        return found


def _code(server: Asked, count: int, filters: dict[str, Any]) -> int:
    if count or not filters:
        return 0
    click.echo("no request matches", err=True)
    if "handler" in filters:
        served = {str(each["handler"]) for each in server.get("/v1/stats").get("servers", ())}
        running = {str(each["handler"]) for each in server.get("/v1/requests", by="handler")}
        if filters["handler"] not in served | running:
            names = ", ".join(map(shown.text, sorted(served | running)))
            click.echo(f"there is no handler {shown.text(filters['handler'])}: there are {names}", err=True)
    return _NO_MATCH


def _print_groups(server: Asked, as_json: bool, filters: dict[str, Any], by: str, order: str, limit: int | None) -> int:
    groups = server.get("/v1/requests", by=by, **filters)
    groups.sort(key=lambda group: (-group[order], str(group[by])))
    if as_json:
        print_json_array(iter(groups[:limit]))
    else:
        columns = [
            Column(by, _text(by)),
            _number("count", shown.text, "count"),
            _number("buffered", shown.size, "buffered"),
        ]
        shown.print_lines(shown.table(columns, groups[:limit]))
    return _code(server, len(groups), filters)


# -- one request ------------------------------------------------------------------------------------------------------


@click.command("show", short_help="One request: its fields, its input, its stack.")
@click.argument("id", type=int, shell_complete=known_ids)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the request's record into a new file instead. The request goes on. `reqtable record` prints the file.",
)
@asks
def show_command(server: Asked, as_json: bool, id: int, save: Path | None) -> None:
    """Print everything about the request ID: its row, its fields, its unread input, and where its code is.

    `immovable` says why the request could not go to another process now.
    """
    found = server.find(f"/v1/requests/{id}")
    if found is None:
        raise click.ClickException(shown.no_requests([id]))
    if save is not None:
        data = server.octets(f"/v1/requests/{id}/record")
        _write_new(save, data)
        found = {"id": id, "file": str(save), "bytes": len(data)}
        text = f"the record of request {id} is in {shown.text(save)}: {len(data)} bytes"
        print_json(found) if as_json else click.echo(text)
    elif as_json:
        print_json(found)
    else:
        shown.print_lines(detail_lines(found))


def _write_new(file: Path, data: bytes) -> None:
    """Write a file that only its owner can read: it has what a client sent. Raises ClickException if it is there."""
    try:
        with open(file, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as opened:
            opened.write(data)
    except FileExistsError:
        raise click.ClickException(f"{shown.text(file)} is there already: name another file, or remove it") from None
    except OSError as error:
        raise click.ClickException(f"{shown.text(file)}: {error.strerror}") from None


@click.command("kill", short_help="End requests, by ids or by filters.")
@click.argument("ids", nargs=-1, type=int, metavar="[ID]…", shell_complete=known_ids)
@_filters
@click.option(
    "--max",
    "most",
    type=click.IntRange(min=1),
    default=_KILL_MAX,
    metavar="N",
    help=f"End none if more than N match; {_KILL_MAX}.",
)
@click.option("--dry-run", "is_dry", is_flag=True, help="End none: print those that match.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@asks
def kill_command(
    server: Asked, as_json: bool, ids: tuple[int, ...], filters: dict[str, Any], most: int, is_dry: bool, yes: bool
) -> int:
    """End the requests with these IDs, or all requests that match filters. Their unsent output is dropped.

    With filters, the command prints the requests that match, and asks. Then it ends these requests and no others. The
    exit code is 1 if there is no request with one of the IDs, or if nothing matches.
    """
    if bool(ids) == bool(filters):
        raise click.UsageError("name the ids of requests, or a filter such as --older 40: one of these")
    if is_dry and ids:
        raise click.UsageError("--dry-run prints what matches filters: leave the ids out, or see reqtable show")
    if not is_dry:
        server.tell_found()
    if filters:
        rows = _matching(server, filters, most)
        if is_dry:
            _print_rows(iter(rows), as_json)
        if is_dry or not rows:
            return _code(server, len(rows), filters)
        ids = tuple(row["id"] for row in rows)
        if not yes:
            shown.print_lines(_row_lines(iter(rows)), err=True)
            confirm(f"End {counted(len(ids), 'request')}?")
    answer = server.send("POST", "/v1/requests/cancel", {"ids": ids}, also=_NOT_FOUND)
    if as_json:
        print_json(answer)
    else:
        if those := answer["cancelled"]:
            click.echo(f"ended {counted(len(those), 'request')}: {', '.join(map(str, those))}")
        if those := answer["missing"]:
            click.echo(shown.no_requests(those))
        if those := answer.get("goes_on"):
            click.echo(f"the code of these goes on until it returns: {', '.join(map(str, those))}", err=True)
        if threads := answer.get("call_threads"):
            then = ": a new call waits for one (limits.calls_max)" if threads["busy"] >= threads["most"] else ""
            click.echo(f"{threads['busy']} of {threads['most']} threads for calls are busy{then}", err=True)
    return _NO_MATCH if answer["missing"] else 0


def _matching(server: Asked, filters: dict[str, Any], most: int) -> list[Any]:
    """Return the rows of the requests that match. Raises ClickException with their number if that is above `most`."""
    asked = {**filters, "max": most, "dry_run": True}
    found = server.send("POST", "/v1/requests/cancel", asked, also=_CONFLICT)
    if "rows" in found:
        return list(found["rows"])
    count = sum(group["count"] for group in server.get("/v1/requests", by="state", **filters))
    raise click.ClickException(
        f"{counted(count, 'request')} match, more than {most}: none was ended; say --max {count}"
    )
