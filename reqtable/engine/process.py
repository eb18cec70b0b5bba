"""What a fork must not copy: a loop runs in the process that opened it, and in no child of that process.

A child that was forked while a loop ran, by a handler or by a library such as `multiprocessing`, has a copy of the
loop. The descriptors of that copy, its selector and its wake-up, are still the parent's. So a child closes its copies
of them at once, however it was forked (os.register_at_fork). It runs what it was forked for, and nothing of the loop.

A child may serve later, with a server that it has inherited: then the loop begins anew (`Loop.open`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from reqtable.core.table import RequestTable

# The table that each thread's loop works on: what a fork looks up to learn whose request it happens in.
TABLES: dict[int, RequestTable] = {}


class Process:
    """This process. `forks` counts the forks between it and the one that imported this module."""

    forks = 0


def leave_child(status: int = 0) -> NoReturn:
    """End a child, without a return into the parent's code."""
    try:
        flush_streams()
    finally:
        os._exit(status)


def flush_streams() -> None:
    """Write what is buffered for the standard streams: else whoever is forked next would write it too."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # there may be none, or it is closed
            stream.flush()


def _in_child() -> None:
    Process.forks += 1
    tables = list(TABLES.values())
    TABLES.clear()
    for table in tables:
        if table.owner is not None:
            table.owner.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
