"""Keeps a loop in the process that opened it: after a fork, the loop never runs in the child.

A handler, or a library such as `multiprocessing`, may fork while a loop runs. The child then has a copy of the loop.
The descriptors of that copy, its selector and its wake-up, are shared with the parent. So every child closes its copies
at once, however it was forked (os.register_at_fork). The child runs what it was forked for, and no part of the loop.

Later the child may serve with a server that it has inherited. Then the loop begins anew (`Loop.open`).
"""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn, Protocol

from reqtable.table.table import RequestTable
from reqtable.table.tracebacks import trim

log = logging.getLogger("reqtable")


class RunningLoop(Protocol):
    """The part of a running loop that a fork needs."""

    table: RequestTable

    def forked(self) -> None:
        """Leave everything to the parent, in a child that was forked while the loop ran."""


# The loop that each thread runs, by the thread's number. Code that forks finds here which request it runs for.
LOOPS: dict[int, RunningLoop] = {}


class _Process:
    """Counts the forks of this process. `forks` is the number between it and the one that imported this module."""

    def __init__(self) -> None:
        self.forks = 0
        self.has_forked = False  # True: a child may have copies of this process's descriptors

    def shares_descriptors(self) -> bool:
        """Return whether another process may have the same sockets open. Such copies share the blocking mode."""
        return self.has_forked or self.forks > 0


# An object, because a member of an object is found faster than a member of a class: every pass looks at `forks`.
Process = _Process()


def leave_child(status: int = 0) -> NoReturn:
    """End a child without returning into the parent's code."""
    try:
        flush_streams()
    finally:
        os._exit(status)


def end_child(error: BaseException | None = None) -> NoReturn:
    """End a child that has returned from the step or hook that forked it, because the calling loop is the parent's.

    `error` is what the step or hook raised in the child. A SystemExit gives the exit status of the child (sys.exit).
    """
    if isinstance(error, SystemExit):
        code = error.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
        leave_child(code or 0)
    if error is not None:
        trim(error)
    log.error(
        "a handler or a hook forked, and its child returned to the server's loop: the child ends here. To continue in "
        "a child, use hand_off('fork') or call(fn, on='fork')",
        exc_info=error,
    )
    leave_child(0 if error is None else 1)


def flush_streams() -> None:
    """Write what the standard streams have buffered. Otherwise the next forked child would write it again."""
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105  # in a child, each further function copies pages
            stream.flush()
        except Exception:
            pass  # a stream may be None, or closed


def _in_parent() -> None:
    Process.has_forked = True


def _in_child() -> None:
    Process.forks += 1
    loops = list(LOOPS.values())
    LOOPS.clear()
    for loop in loops:
        try:  # noqa: SIM105  # see flush_streams
            loop.forked()
        except Exception:
            pass  # if one loop fails, the others must still be left to the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_in_parent, after_in_child=_in_child)
