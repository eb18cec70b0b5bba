"""`reqtable drain`, `reload`, `set` and `log-level`: they change a running server."""

from __future__ import annotations

import math
import tomllib
from typing import Any

import click

from reqtable.run.commands import shown
from reqtable.run.commands.asking import Asked, asks, print_json, print_json_array
from reqtable.run.commands.completing import known_keys, known_workers, one_of
from reqtable.run.commands.serving import LEVELS
from reqtable.run.commands.stuck import killed_text, stuck_in
from reqtable.table.words import counted

_LEVELS = (*LEVELS, "critical")
_LOGGERS = ("reqtable", "reqtable.access", "reqtable.access.http", "reqtable.control", "reqtable.http")


@click.command("drain", short_help="Let requests finish, then end the server or a worker.")
@click.option(
    "--worker",
    type=int,
    metavar="PID",
    help="Drain only this worker; another one takes its place.",
    shell_complete=known_workers,
)
@click.option("--stay", is_flag=True, help="Only stop accepting: the server goes on without requests.")
@asks
def drain_command(server: Asked, as_json: bool, worker: int | None, stay: bool) -> None:
    """Accept no more, let the requests in progress finish, and end the server."""
    if worker is not None and stay:
        raise click.UsageError("--stay is for the whole server: leave --worker out")
    asked = {"stay": True} if stay else {} if worker is None else {"worker": worker}
    known = [] if worker is None else server.get("/v1/workers")
    if worker is not None and worker not in (pids := [each["worker"] for each in known]):
        raise click.UsageError(f"there is no worker {worker}: the workers are {', '.join(map(str, pids))}")
    server.tell_found()
    answer = server.send("POST", "/v1/drain", asked)
    if as_json:
        print_json(answer)
    elif worker in [each["worker"] for each in stuck_in(known)]:
        end = killed_text(server)
        click.echo(f"worker {worker} is stuck, and can't drain: another one takes its place; {end}")
    elif worker is not None:
        click.echo(f"worker {worker} drains, and another one takes its place")
    else:
        then = "the server accepts no more" if stay else "the server accepts no more, and ends when they are done"
        click.echo(f"{counted(answer['entries'], 'request')} in progress: {then}")


@click.command("reload", short_help="Read the configuration again, and print the changes.")
@asks
def reload_command(server: Asked, as_json: bool) -> None:
    """Read the configuration again, and serve new requests by it. Print the changes.

    If a value or a certificate's file has changed, a server with workers replaces all of them, one after another. The
    former worker drains: its idle clients see end of file. Requests that last longer than limits.drain_timeout_s are
    cut off.
    """
    server.tell_found()
    found = server.send("POST", "/v1/reload", {})
    _print_changes(found, as_json)
    if found and any(each["key"] == "workers" and each.get("value") for each in server.get("/v1/config")):
        click.echo("each worker is replaced, one after another: idle clients see end of file", err=True)


@click.command("set", short_help="Change values of the configuration.")
@click.argument("assignments", nargs=-1, required=True, metavar="KEY=VALUE…", shell_complete=known_keys)
@asks
def set_command(server: Asked, as_json: bool, assignments: tuple[str, ...]) -> None:
    """Change values of the configuration, such as limits.entries_max=5000, until the next reload or restart.

    All values change, or none. Print what has changed. `reqtable config` prints the keys. A VALUE is TOML, or text;
    `none` takes a bound away.
    """
    values = dict(_assigned(each) for each in assignments)
    before = {each["key"]: each["value"] for each in server.get("/v1/config")}
    server.tell_found()
    now = server.send("PATCH", "/v1/config", values)
    _print_changes(
        [
            {"key": each["key"], "before": before.get(each["key"]), "now": each["value"], "origin": each["origin"]}
            for each in now
            if before.get(each["key"]) != each["value"]
        ],
        as_json,
    )


def _assigned(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise click.UsageError(f"{text!r}: write it as KEY=VALUE, such as limits.entries_max=5000")
    return key.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """Return what a text means in TOML. A text that means nothing there, or what JSON lacks, stays as it is.

    `none` takes a bound away: TOML has no word for it.
    """
    if text == "none":
        return None
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = found.pop("value")
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return value if not found and (is_number or isinstance(value, str | list | dict)) else text


def _print_changes(found: list[Any], as_json: bool) -> None:
    if as_json:
        print_json_array(iter(found))
    else:
        shown.print_lines(shown.changes(found))


@click.command("log-level", short_help="Set how much the server logs.")
@click.argument("words", nargs=-1, metavar="[LOGGER] [LEVEL]", shell_complete=one_of((*_LEVELS, *_LOGGERS)))
@asks
def log_level_command(server: Asked, as_json: bool, words: tuple[str, ...]) -> None:
    """Set the level of LOGGER, which is reqtable if only LEVEL is given.

    Without LEVEL, print the level of LOGGER; without both, of each logger that has one of its own.

    LEVEL is debug, info, warning, error or critical. The loggers are root, reqtable, reqtable.access, and those of the
    program.
    """
    *loggers, level = words if words and words[-1].lower() in _LEVELS else (*words, None)
    if len(loggers) > 1:
        raise click.UsageError(f"{words[-1]!r} is no level: use {', '.join(_LEVELS)}")
    if level is None:
        answer = server.get("/v1/log-level", **({"logger": loggers[0]} if loggers else {}))
    else:
        server.tell_found()
        chosen = {"logger": loggers[0] if loggers else _LOGGERS[0], "level": level.lower()}
        answer = server.send("PUT", "/v1/log-level", chosen)
    if as_json:
        print_json(answer)
    else:
        all_levels = None if words else answer.get("loggers")
        levels = all_levels or {answer["logger"]: answer["level"]}
        shown.print_lines(f"{shown.text(name)}: {shown.text(each)}" for name, each in levels.items())
