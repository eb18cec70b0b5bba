"""What the commands that serve have in common: their options, their log, and the way to serve."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from reqtable.config import Config
from reqtable.dispatch import policy_names
from reqtable.run.activation import is_activated
from reqtable.run.serve import serve, serving_log
from reqtable.run.terminal import TERMINAL, is_terminal
from reqtable.server.access_log import JSONFormatter, TextFormatter
from reqtable.server.engine import Engine

http_access = logging.getLogger("reqtable.access.http")

LEVELS = ["debug", "info", "warning", "error"]

CONFIG_OPTION = click.option(
    "--config",
    metavar="FILE",
    help="TOML; otherwise $REQTABLE_CONFIG, reqtable.toml, or pyproject.toml [tool.reqtable].",
)

WORKERS_OPTION = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many processes serve; without it, this process does.",
)


class Serving(NamedTuple):
    """Holds the options that every command that serves has."""

    binds: tuple[str, ...]
    dispatch: str | None
    workers: int | None
    config: str | None
    access_log: bool
    log_format: str
    log_level: str


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
        CONFIG_OPTION,
        click.option("--access-log", is_flag=True, help="Log a line for every finished request."),
        click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True),
        click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True),
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
        return config if adapt is None else adapt(config)

    loaded = load()
    _log_to_the_streams(serving.log_format == "json", serving.log_level, loaded.workers is not None)
    if serving.access_log:
        logging.getLogger("reqtable.access").setLevel(logging.INFO)
    try:
        serve(
            served,
            *serving.binds,
            handler=handler,
            dispatch=serving.dispatch,
            config=loaded,
            reload=load,
            on_pass=_StatusLine() if is_terminal() and loaded.workers is None else None,
        )
    finally:
        TERMINAL.show(status="", progress="")


def _log_to_the_streams(as_json: bool, level: str, has_workers: bool) -> None:
    """Send the log to standard error, and the addresses and the access log of HTTP to standard output.

    So a script can read the port, and other programs the access log: its lines have nothing before them.
    """
    process = "%(process)d " if has_workers else ""
    plain = TextFormatter(f"%(asctime)s {process}%(levelname)s %(message)s")
    TERMINAL.setFormatter(JSONFormatter() if as_json else plain)
    logging.basicConfig(level=level.upper(), handlers=[TERMINAL])
    output = logging.StreamHandler(sys.stdout)
    output.setFormatter(JSONFormatter() if as_json else None)
    serving_log.setLevel(logging.INFO)
    for each in (serving_log, http_access):
        each.addHandler(output)
        each.propagate = False


class _StatusLine:
    """Shows on a terminal, once a second, how many requests the server has: a sign of life."""

    def __init__(self) -> None:
        self._next_at = 0.0

    def __call__(self, engine: Engine) -> None:
        now = time.monotonic()
        if now >= self._next_at:
            self._next_at = now + 1
            TERMINAL.show(status=f"{len(engine.table)} in the table, {engine.table.last_id} so far ")
