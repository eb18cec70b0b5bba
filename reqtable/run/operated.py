"""Which engines an operator can look at: those of `serve()`, and those of programs that ask for it.

A program that calls `serve_forever` itself asks by `REQTABLE_CONTROL=PATH` in its environment, or by `[control]` in its
configuration.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from reqtable.config import CONFIG_VARIABLE, ControlOptions
from reqtable.run.signals import Handlers, begin_restart, handled_by, in_main_thread, log_table
from reqtable.server.engine import COMPANIONS, Engine
from reqtable.server.operator import Operator
from reqtable.table.errors import ConfigurationError

log = logging.getLogger("reqtable")

CONTROL_VARIABLE = "REQTABLE_CONTROL"
RUNNING = re.compile(r":?\d+")  # names a server that is running, and no path: by the port of a bind, or by its process

# The operators of the engines that `serve()` serves; None: a worker's, for which its supervisor answers.
OPERATORS: WeakKeyDictionary[Engine, Operator | None] = WeakKeyDictionary()


def named_socket() -> str | None:
    """Return the path that the environment names; None if there is none, or if it names a server that is running."""
    named = os.environ.get(CONTROL_VARIABLE, "")
    return named if named and not RUNNING.fullmatch(named) else None


def control_options(options: ControlOptions) -> ControlOptions:
    """Return the options in force: the environment names the socket if the configuration does not."""
    named = named_socket()
    return replace(options, socket=named) if named and options.socket is None else options


@contextmanager
def attend(engine: Engine) -> Iterator[None]:
    """Serve operators beside `engine` during the block, by signals and, if that was asked for, by the control API."""
    operator = OPERATORS[engine] if engine in OPERATORS else Operator(engine)
    if operator is None:
        yield
        return
    serving = engine.serving
    with handled_by(engine, _free_signals(operator)), ExitStack() as stack:
        if serving.is_held:  # the process before still answers operators
            serving.on_listen.append(lambda: stack.enter_context(_control_of(operator, replaces=True)))
        else:
            stack.enter_context(_control_of(operator))
        operator.reopen = lambda: stack.enter_context(_control_of(operator, replaces=True, has_ports=True))
        try:
            yield
        finally:
            operator.reopen = bool


def _free_signals(operator: Operator) -> Handlers:
    """Return handlers for the signals that would kill the program: those for which the program has no handler.

    When a terminal closes, its programs get SIGHUP. So a program that runs in a terminal, and has nothing to reload,
    still ends with it.
    """
    if not in_main_thread():
        return {}
    engine = operator.engine
    found: dict[int, Callable[..., Any]] = {
        signal.SIGUSR1: lambda *_: log_table(engine),
        signal.SIGUSR2: lambda *_: engine.post(begin_restart, operator.restart),
        signal.SIGHUP: lambda *_: engine.post(_reload, operator),
    }
    if not os.environ.get(CONFIG_VARIABLE) and sys.stdin is not None and os.isatty(0):
        del found[signal.SIGHUP]
    return {number: each for number, each in found.items() if signal.getsignal(number) is signal.SIG_DFL}


def _reload(operator: Operator) -> None:
    try:
        operator.reload()
    except ConfigurationError as error:
        log.warning("SIGHUP: %s", error)
    else:
        log.info("the configuration was read again")


def _control_of(operator: Operator, replaces: bool = False, has_ports: bool = False) -> AbstractContextManager[Any]:
    """Return a context in which the control API is served, without the ports if this process has them already."""
    options = control_options(operator.config.control)
    if has_ports:
        options = replace(options, page=None, metrics=None)
    if not options.is_on:
        return nullcontext()
    from reqtable.control.listening import controlled  # only here: most programs need no HTTP
    from reqtable.control.operations import Target
    from reqtable.control.source import OwnSource

    return controlled(operator.engine, options, OwnSource(Target(operator.engine, operator)), replaces)


COMPANIONS.append(attend)
