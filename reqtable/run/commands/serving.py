"""The commands that serve share this module: their options, their log, and the way to serve."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from logging.handlers import WatchedFileHandler
from typing import Any, NamedTuple

import click

from reqtable.config import ARGUMENT, Config, ControlOptions
from reqtable.control.listening import default_path
from reqtable.dispatch import policy_names
from reqtable.run.activation import is_activated
from reqtable.run.commands import shown
from reqtable.run.operated import CONTROL_VARIABLE, named_socket
from reqtable.run.privileges import Account
from reqtable.run.serve import serve, serving_log
from reqtable.run.terminal import TERMINAL, Output, is_terminal
from reqtable.server.access_log import JSONFormatter, TextFormatter
from reqtable.server.engine import Engine

log = logging.getLogger("reqtable.control")
http_access = logging.getLogger("reqtable.access.http")

_SHOWN_MAX = 8  # requests in the status line

LEVELS = ["debug", "info", "warning", "error"]

CONFIG_OPTION = click.option(
    "--config",
    metavar="FILE",
    help="A TOML file. By default $REQTABLE_CONFIG, reqtable.toml, or pyproject.toml [tool.reqtable].",
)

WORKERS_OPTION = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="The number of processes that serve. By default this process serves.",
)


TAKEOVER_OPTION = click.option(
    "--takeover",
    is_flag=True,
    help="If a worker crashes, have another one continue its requests.",
)


class Serving(NamedTuple):
    """Holds the options that every command that serves has."""

    binds: tuple[str, ...]
    dispatch: str | None
    workers: int | None
    takeover: bool
    config: str | None
    access_log: bool
    log_format: str
    log_level: str
    log_file: str | None
    user: str | None
    group: str | None
    control: str | None
    no_control: bool


LOG_OPTIONS = [
    click.option("--access-log", is_flag=True, help="Log a line for every finished request."),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="json: each record is one line of JSON.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(LEVELS),
        default="info",
        show_default=True,
        help="Log records of this level and above.",
    ),
    click.option(
        "--log-file",
        metavar="PATH",
        help="Write the log to this file. It is opened again when another program has renamed it.",
    ),
]


def serving_options(default_bind: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a server. It is called with them as the argument `serving`, a `Serving`.

    Without a bind, and without sockets from systemd, it binds `default_bind`.
    """
    options = [
        click.option(
            "--bind",
            "binds",
            multiple=True,
            help="tcp://HOST:PORT, tls://HOST:PORT?cert=FILE&key=FILE, udp://HOST:PORT, unix:///PATH, "
            "unixgram:///PATH or fd://N; repeatable. Without one, the "
            f"sockets that systemd has passed, or {default_bind}.",
        ),
        click.option("--dispatch", type=click.Choice(policy_names()), help="Where handlers run."),
        WORKERS_OPTION,
        TAKEOVER_OPTION,
        CONFIG_OPTION,
        *LOG_OPTIONS,
        click.option("--user", metavar="NAME", help="Once everything is bound, go on as this user. Only for root."),
        click.option(
            "--group",
            metavar="NAME",
            help="Once everything is bound, go on as this group. By default the group of --user.",
        ),
        click.option(
            "--control",
            metavar="PATH",
            help=f"The control socket, for `reqtable ps` and similar commands. By default [control] socket, "
            f"${CONTROL_VARIABLE}, or a socket that these commands find by themselves.",
        ),
        click.option("--no-control", is_flag=True, help="Open no control socket."),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: Any, **given: Any) -> None:
            serving = Serving(**{name: given.pop(name) for name in Serving._fields})
            command(*args, serving=serving._replace(binds=serving.binds or _default_binds(default_bind)), **given)

        for option in reversed(options):
            run = option(run)
        return run

    return decorate


def _default_binds(bind: str) -> tuple[str, ...]:
    return () if is_activated() else (bind,)


def serve_as(
    served: Any, serving: Serving, handler: Any = None, adapt: Callable[[Config], Config] | None = None
) -> None:
    """Serve `served` as the options say, until a signal.

    `handler` is for a server class that needs one. `adapt` changes each configuration that is read.
    """

    def load() -> Config:
        config = Config.load(serving.config, workers=serving.workers)
        if serving.takeover:
            config = replace(config, takeover=True, origins={**config.origins, "takeover": ARGUMENT})
        return config if adapt is None else adapt(config)

    account = Account.of(serving.user, serving.group)
    loaded = load()
    _log_to_the_streams(serving, loaded.workers is not None)
    if serving.access_log:
        logging.getLogger("reqtable.access").setLevel(logging.INFO)
    try:
        serve(
            served,
            *serving.binds,
            handler=handler,
            dispatch=serving.dispatch,
            config=_with_control(loaded, serving, account),
            reload=lambda: _with_control(load(), serving, account),
            on_listening=None if account is None else lambda _: account.become(),
            on_engine=_show_status if is_terminal() and loaded.workers is None else None,
        )
    finally:
        TERMINAL.show(status="", progress="")


def _with_control(config: Config, serving: Serving, account: Account | None) -> Config:
    """Return the configuration with a control socket: by default one that the commands find, if it names none."""
    if serving.no_control:
        return replace(config, control=ControlOptions(socket=""))
    socket = serving.control or config.control.socket or named_socket()
    if socket is None:
        try:
            socket = default_path(None if account is None else account.user)
        except OSError as error:
            log.warning("control: there is no place for a socket, so no operator can look: %s", error)
    origins = {**config.origins, "control.socket": ARGUMENT} if serving.control else config.origins
    return replace(config, control=replace(config.control, socket=socket), origins=origins)


def _log_to_the_streams(serving: Serving, has_workers: bool) -> None:
    """Send the log to standard error or to a file, the addresses and the access log of HTTP to standard output.

    So a script can read the port, and other programs the access log: its lines have nothing before them.
    """
    as_json = serving.log_format == "json"
    log_handler: logging.Handler = TERMINAL
    if serving.log_file is not None:
        log_handler = WatchedFileHandler(serving.log_file)
    process = "%(process)d " if has_workers else ""
    plain = TextFormatter(f"%(asctime)s {process}%(levelname)s %(of_request)s%(message)s")
    log_handler.setFormatter(JSONFormatter() if as_json else plain)
    logging.basicConfig(level=serving.log_level.upper(), handlers=[log_handler])
    output = Output()
    output.setFormatter(JSONFormatter() if as_json else None)
    serving_log.setLevel(logging.INFO)
    for each in (serving_log, http_access):
        each.addHandler(output)
        each.propagate = False


def _show_status(engine: Engine) -> None:
    """Show on a terminal, once a second, the table in one line: how many requests there are, and the oldest of them."""

    def show() -> None:
        table = engine.table
        rows = table.snapshot(limit=_SHOWN_MAX) if len(table) else []
        said = [f"{len(table)} in the table, {table.last_id} so far"]
        said += [f"{row['id']} {row['handler_state'] or row['state']} {row['age_s']:.0f} s" for row in rows]
        width = shown.terminal_width(sys.stderr) or 0
        TERMINAL.show(status=shown.cut(" | ".join(said), width - 2) + " ")

    engine.post(show)
    engine.every(1.0, show)
