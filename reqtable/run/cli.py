"""The command line: `reqtable serve`, `reqtable states` and `reqtable config`.

Exit codes: 0 fine, 2 usage, 78 configuration (sysexits(3)), 1 anything else. An error is one line that names the thing
and the mend.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from reqtable.config import DEFAULT, Config, chosen_dispatch, effective
from reqtable.config.import_string import account_of, module_at
from reqtable.dispatch import check_policy, is_resumable, policy_names
from reqtable.dispatch.policies.greenlet import policy_for_blocking
from reqtable.handlers.state import StateInfo, StateRequestHandler
from reqtable.run.activation import is_activated
from reqtable.run.serve import serve, serving_log
from reqtable.run.served import is_server_class, is_server_function, why_not_served
from reqtable.run.terminal import TERMINAL, is_terminal
from reqtable.server.access_log import JSONFormatter, TextFormatter
from reqtable.server.engine import Engine
from reqtable.table.errors import ConfigurationError
from reqtable.table.snapshot import handler_name, unwrapped

USAGE, CONFIGURATION, FAILURE = 2, 78, 1

DEFAULT_BIND = "tcp://127.0.0.1:7000"
LEVELS = ["debug", "info", "warning", "error"]


class _Handler(click.ParamType[Any]):
    """Converts `module:Class` or `path/to/file.py:Class` to the handler class."""

    name = "module:Handler"
    kinds = "handlers"
    mend = (
        "is not a handler class: derive it from reqtable.StateRequestHandler, AsyncRequestHandler or BaseRequestHandler"
    )

    def accepts(self, thing: Any) -> bool:
        """Return whether `thing` is what the argument should be."""
        return _is_handler(thing)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        place, colon, name = value.rpartition(":")
        if not colon or not place or not name:
            self.fail(f"{value!r}: write it as module:Handler or path/to/file.py:Handler")
        try:
            module = module_at(place)
        except SystemExit as error:
            self.fail(
                f"{value!r} ends the program when it is imported: {account_of(error)}: put what runs it under "
                'if __name__ == "__main__":'
            )
        except Exception as error:
            self.fail(f"{value!r} can't be imported: {account_of(error)}")
        handler = getattr(module, name, None)
        if handler is None:
            own = [n for n, each in vars(module).items() if getattr(each, "__module__", None) == module.__name__]
            named = [n for n in own if self.accepts(getattr(module, n)) and not is_server_function(getattr(module, n))]
            others = ", ".join(sorted(named)) or "none"
            self.fail(f"{value!r}: {place} has no {name}; {self.kinds} there: {others}")
        if not self.accepts(handler):
            self.fail(f"{value!r}: {why_not_served(handler, name) or f'{name} {self.mend}'}")
        return handler


class _Served(_Handler):
    """Converts `module:name` to a handler class, a server class, or a function that makes a server."""

    name = "module:Handler"
    kinds = "handlers and servers"
    mend = (
        "is not a handler class, nor a server class: derive it from reqtable.StateRequestHandler, AsyncRequestHandler "
        "or BaseRequestHandler, or from a server class"
    )

    def accepts(self, thing: Any) -> bool:
        return _is_handler(thing) or is_server_class(thing) or is_server_function(thing)


def _is_handler(thing: Any) -> bool:
    """Return whether `thing` is a handler class of any style, `socketserver`'s blocking ones included."""
    if not isinstance(unwrapped(thing), type) or is_server_class(thing):
        return False
    return is_resumable(thing) or all(callable(getattr(thing, hook, None)) for hook in ("setup", "handle", "finish"))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="reqtable", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve requests from an explicit table, on one thread."""


_CONFIG_OPTION = click.option(
    "--config",
    metavar="FILE",
    help="TOML; otherwise $REQTABLE_CONFIG, reqtable.toml, or pyproject.toml [tool.reqtable].",
)

_WORKERS_OPTION = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many processes serve; without it, this process does.",
)


@cli.command("serve")
@click.argument("served", type=_Served(), metavar="HANDLER")
@click.option("--handler", type=_Handler(), help="The handler class, if HANDLER is a server class that needs one.")
@click.option(
    "--bind",
    "binds",
    multiple=True,
    help="tcp://HOST:PORT, tls://HOST:PORT?cert=FILE&key=FILE, udp://HOST:PORT, unix:///PATH, unixgram:///PATH or "
    "fd://N; repeatable. Without one, the "
    f"sockets that systemd has passed, or {DEFAULT_BIND}.",
)
@click.option("--dispatch", type=click.Choice(policy_names()), help="Where handlers run.")
@_WORKERS_OPTION
@_CONFIG_OPTION
@click.option("--access-log", is_flag=True, help="Log a line for every finished request.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True)
def serve_command(
    served: Any,
    handler: Any,
    binds: tuple[str, ...],
    dispatch: str | None,
    workers: int | None,
    config: str | None,
    access_log: bool,
    log_format: str,
    log_level: str,
) -> None:
    """Serve HANDLER until SIGINT or SIGTERM. SIGTERM lets requests in progress finish.

    HANDLER is a handler class as module:Class or path/to/file.py:Class. It may also be a server class, or a function
    that makes a server from an address.

    SIGHUP re-reads the configuration, SIGUSR1 logs the table. With workers, SIGTTIN adds one, and SIGTTOU removes one.
    """
    loaded = Config.load(config, workers=workers)
    _log_to_the_streams(log_format == "json", log_level, loaded.workers is not None)
    if access_log:
        logging.getLogger("reqtable.access").setLevel(logging.INFO)
    try:
        serve(
            served,
            *(binds or ([] if is_activated() else [DEFAULT_BIND])),
            handler=handler,
            dispatch=dispatch,
            config=loaded,
            reload=lambda: Config.load(config, workers=workers),
            on_pass=_StatusLine() if is_terminal() and loaded.workers is None else None,
        )
    finally:
        TERMINAL.show(status="", progress="")


def _log_to_the_streams(as_json: bool, level: str, has_workers: bool) -> None:
    """Send the log to standard error, and the addresses to standard output, where a script can read the port."""
    process = "%(process)d " if has_workers else ""
    plain = TextFormatter(f"%(asctime)s {process}%(levelname)s %(message)s")
    TERMINAL.setFormatter(JSONFormatter() if as_json else plain)
    logging.basicConfig(level=level.upper(), handlers=[TERMINAL])
    output = logging.StreamHandler(sys.stdout)
    output.setFormatter(JSONFormatter() if as_json else None)
    serving_log.addHandler(output)
    serving_log.setLevel(logging.INFO)
    serving_log.propagate = False


class _StatusLine:
    """Shows on a terminal, once a second, how many requests the server has: a sign of life."""

    def __init__(self) -> None:
        self._next_at = 0.0

    def __call__(self, engine: Engine) -> None:
        now = time.monotonic()
        if now >= self._next_at:
            self._next_at = now + 1
            TERMINAL.show(status=f"{len(engine.table)} in the table, {engine.table.last_id} so far ")


@cli.command("states")
@click.argument("handler", type=_Handler())
@click.option("--format", "form", type=click.Choice(["table", "mermaid", "json"]), default="table", show_default=True)
def states_command(handler: Any, form: str) -> None:
    """Print the states of HANDLER: what each waits for, for how long, and what may follow."""
    handler = unwrapped(handler)
    if not issubclass(handler, StateRequestHandler):
        raise click.UsageError(f"{handler_name(handler)} is not a state machine: derive it from StateRequestHandler")
    states = handler.states()
    if not states:
        raise click.UsageError(f"{handler_name(handler)} declares no state: put @state(line()) before a method")
    click.echo({"table": _as_table, "mermaid": _as_mermaid, "json": _as_json}[form](states))


def _as_table(states: list[StateInfo]) -> str:
    rows = [("  state", "waits for", "timeout", "then", "")]
    for each in states:
        rows.append(
            (
                ("> " if each.initial else "  ") + each.name,
                each.want,
                "-" if each.timeout is None else f"{each.timeout:g} s",
                ", ".join(name or "done" for name in each.successors),
                each.doc,
            )
        )
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return the rows as lines, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _as_mermaid(states: list[StateInfo]) -> str:
    lines = ["stateDiagram-v2"]
    for each in states:
        if each.initial:
            lines.append(f"    [*] --> {each.name}")
        lines.append(f"    {each.name}: {each.name} · {each.want}")
        lines += [f"    {each.name} --> {name or '[*]'}" for name in each.successors]
    return "\n".join(lines)


def _as_json(states: list[StateInfo]) -> str:
    return json.dumps([each._asdict() for each in states], indent=2)


@cli.command("config")
@click.option("--dispatch", type=click.Choice(policy_names()), help="As for `reqtable serve`.")
@_WORKERS_OPTION
@_CONFIG_OPTION
def config_command(dispatch: str | None, workers: int | None, config: str | None) -> None:
    """Print the configuration that `reqtable serve` would use: each value, and where it comes from."""

    loaded = Config.load(config, dispatch=dispatch, workers=workers)
    check_policy(*chosen_dispatch(None, loaded, "inline"))
    rows = [(key, "-" if value is None else json.dumps(value), origin) for key, value, origin in effective(loaded)]
    if rows[0][2] == DEFAULT:
        rows[0] = (*rows[0][:2], f'{DEFAULT}; for a blocking handler "{policy_for_blocking()}"')
    click.echo(_aligned(rows))


def main(arguments: list[str] | None = None) -> None:
    """Run the `reqtable` command, and exit."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    """Run the command. Returns its exit code."""
    try:
        return int(cli.main(arguments, prog_name="reqtable", standalone_mode=False) or 0)
    except click.UsageError as error:
        if not sys.argv[1:] and arguments is None:
            click.echo(cli.get_help(click.Context(cli, info_name="reqtable")))
            return USAGE
        _complain(error.format_message())
        return USAGE
    except click.Abort:
        return FAILURE
    except ConfigurationError as error:
        _complain(str(error))
        return CONFIGURATION
    except OSError as error:
        _complain(error.strerror or str(error))
        return FAILURE


def _complain(message: str) -> None:
    click.echo(f"reqtable: {' '.join(message.split())}", err=True)
