"""Signals of a process that serves, and what they have it do."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reqtable.core.listing import Listing, Row, format_rows
from reqtable.core.states import State
from reqtable.engine.drain import Drain
from reqtable.engine.engine import Engine

log = logging.getLogger("reqtable")

Handlers = Mapping[int, Callable[..., Any]]


def in_main_thread() -> bool:
    """Whether this is the thread in which Python delivers signals."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def handled(handlers: Handlers) -> Iterator[Callable[[], None]]:
    """Have these signals handled so while it is entered. Gives what puts back the handlers that were there before."""
    previous = {int(number): _plain(signal.signal(number, each)) for number, each in handlers.items()}

    def restore() -> None:
        for number, each in previous.items():
            _signal.signal(number, each)  # `signal.signal` makes enums of it, for which a child would copy thirty pages

    try:
        yield restore
    finally:
        restore()


def _plain(handler: Any) -> Any:
    return int(handler) if isinstance(handler, signal.Handlers) else handler


@contextlib.contextmanager
def handled_by(engine: Engine, handlers: Handlers) -> Iterator[None]:
    """The same while `engine` serves. A child that it forks has the handlers as they were: it is ended by them."""
    with handled(handlers) as restore:
        engine.in_child.append(restore)
        try:
            yield
        finally:
            engine.in_child.remove(restore)


def log_table(engine: Engine) -> None:
    """Log every unfinished request: some at once, though the loop be stuck in a step, and some more in each pass."""
    _log_slices(engine, f"{len(engine.table)} requests", engine.table.slices(Listing()))


def _log_slices(engine: Engine, heading: str, slices: Iterator[list[Row]]) -> None:
    rows = next(slices, None)
    if rows is not None:
        log.warning("%s\n%s", heading, format_rows(rows))
        engine.post(_log_slices, engine, "more of them", slices)


def begin_drain(engine: Engine, hint: str = "", has_terminal: bool = False) -> None:
    """In the loop: take nothing new, and end when what has begun is done, or its time is over."""
    most_s = engine.limits.drain_timeout_s
    at_first = sum(entry.state is not State.CLOSED for entry in engine.table)
    if at_first:
        log.info("ending when %d requests are done, or in %g s%s", at_first, most_s, hint)
    progress = Progress(at_first) if has_terminal else None
    Drain(engine, engine.servers, engine.table.now + most_s, engine.stop, progress).begin()


class Progress:
    """One line on a terminal, rewritten in its place."""

    def __init__(self, at_first: int, what: str = "") -> None:
        self._at_first = at_first
        self._what = what
        self._shown = ""

    def __call__(self, left: int, seconds: float) -> None:
        text = f"draining: {left} of {self._at_first}{self._what}, {seconds:.0f} s left" if left else ""
        if text != self._shown:
            sys.stderr.write("\r" + text.ljust(len(self._shown)) + ("" if text else "\r"))
            sys.stderr.flush()
            self._shown = text
