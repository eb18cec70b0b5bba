"""The options that `reqtable http` and `reqtable wsgi` have in common, beside those of every server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from reqtable.config import Config

KEEP_ALIVE_S = 75.0  # as nginx

Adapt = Callable[[Config], Config]


def http_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--keep-alive` and `--graceful-timeout`. It is called with the argument `limited`.

    That changes a configuration as the options say. An option wins over the configuration, which wins over the default.
    """

    @functools.wraps(command)
    def run(*args: Any, keep_alive_s: float | None, graceful_timeout_s: float | None, **given: Any) -> None:
        command(*args, limited=functools.partial(_limited, keep_alive_s, graceful_timeout_s), **given)

    positive = click.FloatRange(min=0, min_open=True)
    keep_alive = click.option(
        "--keep-alive",
        "keep_alive_s",
        type=positive,
        metavar="S",
        help=f"The time that a connection may be silent between two requests ([limits] idle_timeout_s), "
        f"{KEEP_ALIVE_S:g} by default.",
    )
    graceful = click.option(
        "--graceful-timeout",
        "graceful_timeout_s",
        type=positive,
        metavar="S",
        help="The time for requests in progress after SIGTERM ([limits] drain_timeout_s).",
    )
    return keep_alive(graceful(run))


def _limited(keep_alive_s: float | None, graceful_timeout_s: float | None, config: Config) -> Config:
    limits = config.limits
    if keep_alive_s is not None:
        limits = replace(limits, idle_timeout_s=keep_alive_s)
    elif "limits.idle_timeout_s" not in config.origins:
        limits = replace(limits, idle_timeout_s=KEEP_ALIVE_S)
    if graceful_timeout_s is not None:
        limits = replace(limits, drain_timeout_s=graceful_timeout_s)
    return replace(config, limits=limits)
