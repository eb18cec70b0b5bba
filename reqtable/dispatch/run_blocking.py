"""Running a blocking handler, in whatever thread, and what happens when the handler forks.

A fork in `handle()` gives the request to the child. The parent's `handle()` returns, and the connection stays open
until the child has exited. This holds for `self.hand_off("fork")`, which unwinds the parent's handler by raising
`HandedOff`, and for a plain `os.fork()`. When `handle()` returns in the child, the child exits. It never returns into
the parent's loop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import sys
import threading
from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import Any

from reqtable.dispatch.forking.child import Forked, become_child
from reqtable.dispatch.policy import Host, Policy
from reqtable.handlers.blocking import HandedOff
from reqtable.handlers.resumable import ResumableHandler
from reqtable.loop.failures import ends_program, tell_server
from reqtable.loop.process import LOOPS, Process, leave_child
from reqtable.net.poll_only import PollOnly
from reqtable.table.addresses import address_text, printable
from reqtable.table.errors import ending_of
from reqtable.table.parts import Server
from reqtable.table.table import Entry
from reqtable.table.want import Want

log = logging.getLogger("reqtable")

# By thread, except the loop's thread: the request whose blocking handler the thread runs.
_SERVED: dict[int, Entry] = {}
# By request: the child that the handler has forked, until the handler has returned.
_FORKED: dict[Entry, Forked] = {}
# The modules whose `process_request_thread` does no more than is done here anyway.
_STANDARD_HOOKS = {"socketserver", "reqtable.server.mixins"}
# A fork by one of these packages does not give the request to the child.
_NOT_HANDLERS = {"multiprocessing", "subprocess", "pty", "loky"}
_pipes: dict[int, tuple[Entry, int, int]] = {}  # by thread: the pipe of the fork that is under way


def run(entry: Entry, transport: PollOnly) -> Want[Any] | None:
    """Run the blocking handler of `entry`, in the loop.

    Returns None, or the want to wait for if the handler has forked a child, which then has the rest of the request. In
    that child the function does not return.
    """
    parent = os.getpid()
    failed = False
    server = entry.server
    request = transport.request
    try:
        hook = getattr(server, "process_request_thread", None)
        if hook is not None and getattr(hook, "__module__", None) not in _STANDARD_HOOKS:
            transport.give()  # the hook ends the request
            hook(request, entry.peer)
        elif _is_open(request, entry.peer):
            server.finish_request(request, entry.peer)
            if end_politely := getattr(request, "end_politely", None):
                end_politely()  # here a cooperative socket may wait
    except HandedOff:
        pass
    except BaseException as error:
        if os.getpid() == parent and isinstance(error, SystemExit) and runs_concurrently(server):
            if hasattr(server, "process_request_thread"):
                threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))
        elif os.getpid() == parent and not (entry in _FORKED and isinstance(error, Exception)):
            end_forked(entry)
            _wait_for_forked(entry)
            raise
        else:
            failed = True
            _report(entry, request)  # a child that was forked before still has the rest
    if os.getpid() != parent:
        try:
            _wait_for_forked(entry)
            server.shutdown_request(request)
        finally:
            leave_child(1 if failed else 0)
    child = _FORKED.pop(entry, None) if _FORKED else None
    if child is None:
        return None
    entry.expect_result()
    return _host(entry).adopt(entry, child.pid, child.detach())


def serve(server: Server, request: Any, client_address: Any) -> None:
    """Do all that a thread or a child does for a request, as `process_request_thread` does."""
    try:
        if _is_open(request, client_address):
            server.finish_request(request, client_address)
    except HandedOff:
        pass
    except BaseException as error:
        if ends_program(error) or isinstance(error, SystemExit):
            raise  # a SystemExit ends the thread alone
        if (entry := _SERVED.get(get_ident())) is not None:
            entry.ending = entry.ending or ending_of(error)  # the loop may have ended the entry before
        tell_server(server, request, client_address, error, None if entry is None else entry.id)
    finally:
        if _FORKED:
            _wait_for_forked(_SERVED.get(get_ident()))  # this thread has nothing else to do
        if _FORKED and _serving() in _FORKED:
            server.close_request(request)  # in the loop, which does not wait for the child
        else:
            server.shutdown_request(request)


def serve_in_thread(entry: Entry, request: Any) -> None:
    """Run a blocking handler in its own thread, by the server's `process_request_thread` if there is one."""
    hook = getattr(entry.server, "process_request_thread", None)
    _serve_by(entry, request, hook or partial(serve, entry.server))


def serve_in_child(entry: Entry, request: Any) -> None:
    """Run a blocking handler in its own child."""
    _serve_by(entry, request, partial(serve, entry.server))


def end_forked(entry: Entry) -> None:
    """Kill the child that the handler of `entry` has forked, if there is one."""
    child = _FORKED.get(entry)
    if child is not None:
        child.kill()


def _serve_by(entry: Entry, request: Any, hook: Callable[[Any, Any], None]) -> None:
    ident = get_ident()
    forks = Process.forks
    _SERVED[ident] = entry
    try:
        hook(request, entry.peer)
    finally:
        if _FORKED:
            _wait_for_forked(entry)
        _SERVED.pop(ident, None)
        if Process.forks != forks:
            leave_child()


def runs_concurrently(server: object) -> bool:
    """Whether a server's class promises a thread or a child for each request.

    Its handlers and callers count on the promise. So a SystemExit ends the request alone, and `handle_request` holds up
    no other request.
    """
    return hasattr(server, "process_request_thread") or hasattr(server, "collect_children")


def _host(entry: Entry) -> Host:
    policy = entry.policy
    assert isinstance(policy, Policy)
    return policy.host


def _is_open(request: Any, client_address: Any) -> bool:
    """Do the TLS handshake that `get_request` put off. False if it fails: there is no request then."""
    if getattr(request, "handshake_due", False):
        try:
            request.do_handshake()
        except OSError as error:
            log.info("%s: its TLS handshake failed: %s", address_text(client_address), printable(error))
            return False
    return True


def _report(entry: Entry, request: Any) -> None:
    error = sys.exc_info()[1]
    if isinstance(error, Exception):
        tell_server(entry.server, request, entry.peer, error, entry.id)


def _wait_for_forked(entry: Entry | None) -> None:
    """Wait for the child that has the rest of the request, if there is one."""
    child = _FORKED.get(entry) if entry is not None else None
    if child is not None and entry is not None:
        child.wait()
        _FORKED.pop(entry, None)


# -- os.fork() in a handler -------------------------------------------------------------------------------------------
# The parent learns the child's pid through a pipe, because its fork hook is not told (os.register_at_fork).


def _serving() -> Entry | None:
    """Return the request whose blocking handler is running in this thread; None if there is none."""
    ident = get_ident()
    entry = _SERVED.get(ident)
    if entry is None and (loop := LOOPS.get(ident)) is not None:
        entry = loop.table.running
    return None if entry is None or isinstance(entry.handler, ResumableHandler) else entry


def _before_fork() -> None:
    entry = _serving()
    if entry is None:
        return
    caller = sys._getframe(1).f_globals.get("__name__", "")
    if caller.partition(".")[0] in _NOT_HANDLERS or caller.startswith("reqtable.dispatch."):
        return
    with contextlib.suppress(OSError):  # out of descriptors: the parent keeps the request
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
        _FORKED[entry] = Forked(struct.unpack("q", told)[0])


def _in_child() -> None:
    under_way = _pipes.get(get_ident())
    _pipes.clear()
    _SERVED.clear()
    if under_way is None:
        return
    entry, reader, writer = under_way
    os.write(writer, struct.pack("q", os.getpid()))
    os.close(reader)
    os.close(writer)
    _FORKED.clear()
    _SERVED[get_ident()] = entry
    become_child(entry, _host(entry))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
