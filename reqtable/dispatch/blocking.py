"""Running a blocking handler, on whatever thread it runs, and what becomes of it when it forks.

A fork in `handle()` leaves the child with the request: the parent's `handle()` returns, and the connection stays open
until the child has ended. That holds for `self.hand_off("fork")`, which unwinds the parent by `HandedOff`, and for a
plain `os.fork()`. The child's `handle()` returns too; then its process ends, without a return into the parent's loop.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from threading import get_ident
from typing import Any

from reqtable.core.table import Entry
from reqtable.dispatch.children import become_child, leave_child
from reqtable.engine.loop import TABLES
from reqtable.handlers.blocking import HandedOff
from reqtable.handlers.resumable import ResumableHandler

# The request of each thread that serves one with a blocking handler, where it is not the loop's thread.
_SERVED: dict[int, Entry] = {}
# The child that the handler of a request has forked and not yet returned from.
_FORKED: dict[Entry, int] = {}
# A fork by these is not one that hands the request to the child.
_NOT_HANDLERS = ("multiprocessing.", "concurrent.", "loky.", "reqtable.dispatch.", "reqtable.engine.")
_pipes: dict[int, tuple[Entry, int, int]] = {}  # of the forks that are under way


def run(entry: Entry, request: Any) -> int | None:
    """Run the handler of `entry`, in the loop. Returns the process id of the child that has the rest of it, or None.

    In the child it does not return.
    """
    parent = os.getpid()
    try:
        entry.server.finish_request(request, entry.peer)
    except HandedOff:
        pass
    except BaseException:
        if os.getpid() == parent:
            _FORKED.pop(entry, None)
            raise
        _end_child(entry.server, request, entry.peer, failed=True)
    if os.getpid() != parent:
        _end_child(entry.server, request, entry.peer)
    return _FORKED.pop(entry, None) if _FORKED else None


def serve(server: Any, request: Any, client_address: Any) -> None:
    """All that a thread or a child does for a request: what `process_request_thread` does."""
    parent = os.getpid()
    try:
        server.finish_request(request, client_address)
    except HandedOff:
        pass
    except Exception:
        server.handle_error(request, client_address)
    finally:
        entry = _SERVED.get(get_ident())
        child = _FORKED.pop(entry, None) if entry is not None else None
        if child is not None:
            _wait_for(child)  # this thread has nothing else to do
        server.shutdown_request(request)
        if os.getpid() != parent:
            leave_child()


def serve_in_thread(entry: Entry, request: Any) -> None:
    """Run a blocking handler in a thread that is its own, by the server's `process_request_thread` if it has one."""
    ident = get_ident()
    _SERVED[ident] = entry
    try:
        hook = getattr(entry.server, "process_request_thread", None)
        if hook is not None:
            hook(request, entry.peer)
        else:
            serve(entry.server, request, entry.peer)
    finally:
        del _SERVED[ident]


def _end_child(server: Any, request: Any, client_address: Any, failed: bool = False) -> None:
    try:
        if failed and isinstance(sys.exc_info()[1], Exception):
            server.handle_error(request, client_address)
        server.shutdown_request(request)
    finally:
        leave_child(1 if failed else 0)


def _wait_for(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # the handler has
        os.waitpid(pid, 0)


# -- os.fork() in a handler -------------------------------------------------------------------------------------------
# The parent learns the child's number by a pipe: nothing else tells it in these hooks (os.register_at_fork).


def _serving() -> Entry | None:
    """The request whose blocking handler this thread is in."""
    table = TABLES.get(get_ident())
    entry = table.running if table is not None else _SERVED.get(get_ident())
    return None if entry is None or isinstance(entry.handler, ResumableHandler) else entry


def _before_fork() -> None:
    entry = _serving()
    if entry is None or sys._getframe(1).f_globals.get("__name__", "").startswith(_NOT_HANDLERS):
        return
    with contextlib.suppress(OSError):  # out of descriptors: the child runs as if forked by any program
        _pipes[get_ident()] = entry, *os.pipe()


def _in_parent() -> None:
    under_way = _pipes.pop(get_ident(), None)
    if under_way is None:
        return
    entry, reader, writer = under_way
    os.close(writer)
    told = os.read(reader, 8)
    os.close(reader)
    if told:
        _FORKED[entry] = struct.unpack("q", told)[0]


def _in_child() -> None:
    under_way = _pipes.get(get_ident())
    _pipes.clear()
    if under_way is None:
        return
    entry, reader, writer = under_way
    os.write(writer, struct.pack("q", os.getpid()))
    os.close(reader)
    os.close(writer)
    _FORKED.clear()
    become_child(entry, entry.policy.dispatcher)  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
