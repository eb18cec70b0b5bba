"""Signal handlers of a serving process, and what they do."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reqtable.run.terminal import TERMINAL
from reqtable.server.access_log import OF_SIGNALS
from reqtable.server.engine import Engine
from reqtable.server.operator import NO_RESTART, Restarting
from reqtable.table.errors import ReqtableError
from reqtable.table.snapshot import Listing, Row, format_rows
from reqtable.table.words import counted

log = logging.getLogger("reqtable")
table_log = logging.getLogger(OF_SIGNALS)
table_log.setLevel(logging.INFO)  # an operator asks for it: show it whatever the level of other loggers

Handlers = Mapping[int, Callable[..., Any]]


def in_main_thread() -> bool:
    """Return whether this is the thread in which Python delivers signals."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def handled(handlers: Handlers) -> Iterator[Callable[[], None]]:
    """Install signal handlers while entered. Yields a function that restores the handlers from before."""
    previous = {int(number): _plain(signal.signal(number, each)) for number, each in handlers.items()}

    def restore() -> None:
        for number, each in previous.items():
            _signal.signal(number, each)  # not `signal.signal`, whose enums would have a child copy thirty pages

    try:
        yield restore
    finally:
        restore()


def _plain(handler: Any) -> Any:
    return int(handler) if isinstance(handler, signal.Handlers) else handler


@contextlib.contextmanager
def handled_by(engine: Engine, handlers: Handlers) -> Iterator[None]:
    """Install signal handlers while `engine` serves. Its children get the earlier ones back, so signals end them."""
    with handled(handlers) as restore:
        engine.loop.on_forked.append(restore)
        try:
            yield
        finally:
            engine.loop.on_forked.remove(restore)


def log_table(engine: Engine) -> None:
    """Log every unfinished request: some at once, even if a step holds up the loop, and more in each pass."""
    _log_slices(engine, counted(len(engine.table), "request"), engine.table.slices(Listing()))


def _log_slices(engine: Engine, heading: str, slices: Iterator[list[Row]]) -> None:
    rows = next(slices, None)
    if rows is not None:
        answer(f"{heading}\n{format_rows(rows)}")
        engine.post(_log_slices, engine, "more requests", slices)


def answer(text: str) -> None:
    """Log what the operator has asked for. Print it on standard error if the program has set up no logging."""
    if table_log.hasHandlers():
        table_log.info("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)


def begin_restart(restart: Restarting | None) -> None:
    """In the loop, because of a signal: restart, or say why not."""
    try:
        if restart is None:
            raise ReqtableError(NO_RESTART)
        restart.begin()
    except ReqtableError as error:
        log.error("SIGUSR2: %s", error)


class Progress:
    """Shows on the terminal how far a drain has come."""

    def __init__(self, what: str = "") -> None:
        self._at_first = 0
        self._what = what

    def __call__(self, left: int, seconds: float) -> None:
        self._at_first = max(self._at_first, left)
        TERMINAL.show(
            progress=f"draining: {left} of {self._at_first}{self._what}, {seconds:.0f} s left" if left else ""
        )
