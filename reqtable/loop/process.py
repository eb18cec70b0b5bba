"""What a fork must not copy: a loop runs in the process that opened it, and in no child of that process.

A child that was forked while a loop ran, by a handler or by a library such as `multiprocessing`, has a copy of the
loop. The descriptors of that copy, its selector and its wake-up, are still the parent's. So a child closes its copies
of them at once, however it was forked (os.register_at_fork). It runs what it was forked for, and nothing of the loop.

A child may serve later, with a server that it has inherited: then the loop begins anew (`Loop.open`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import NoReturn, Protocol

from reqtable.table.table import RequestTable

log = logging.getLogger("reqtable")


class RunningLoop(Protocol):
    """A loop, while a thread runs it."""

    table: RequestTable

    def forked(self) -> None:
        """In a child that was forked meanwhile: give up what is the parent's."""


# The loop that each thread runs: what a fork looks up to learn whose request it happens in.
LOOPS: dict[int, RunningLoop] = {}


class Process:
    """This process. `forks` counts the forks between it and the one that imported this module."""

    forks = 0
    has_forked = False  # there may be another process that has its descriptors

    @classmethod
    def shares_descriptors(cls) -> bool:
        """Whether another process may have the same sockets open: whether one blocks is said of all of them."""
        return cls.has_forked or cls.forks > 0


def leave_child(status: int = 0) -> NoReturn:
    """End a child, without a return into the parent's code."""
    try:
        flush_streams()
    finally:
        os._exit(status)


def end_child(error: BaseException | None = None) -> NoReturn:
    """End a child that comes back from the step or the hook that forked it: the loop that called that is the parent's.

    `error` is what it comes back with. A SystemExit says with which status the child ends (sys.exit).
    """
    if isinstance(error, SystemExit):
        code = error.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
        leave_child(code or 0)
    log.error(
        "a handler or a hook forked, and its child came back: the child ends here. To go on in a child, "
        "hand_off('fork'), or call(fn, on='fork')",
        exc_info=error,
    )
    leave_child(0 if error is None else 1)


def flush_streams() -> None:
    """Write what is buffered for the standard streams: else whoever is forked next would write it too."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # there may be none, or it is closed
            stream.flush()


def _in_parent() -> None:
    Process.has_forked = True


def _in_child() -> None:
    Process.forks += 1
    loops = list(LOOPS.values())
    LOOPS.clear()
    for loop in loops:
        with contextlib.suppress(Exception):  # of one; the others are given up all the same
            loop.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_in_parent, after_in_child=_in_child)
