"""Decides what the loop does with exceptions of foreign code: of a handler, a file, a hook, a want or a logger.

The rules:

* KeyboardInterrupt and SystemExit in the main thread are meant for the program, so they end the loop.
* Any other exception ends only the request that it belongs to. The server's `handle_error` is called once.
* An exception of `handle_error` itself is logged.
* `handle_request()` serves one request for its caller. There, exceptions of the server's hooks reach the caller, as in
  `socketserver`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable
from threading import get_ident
from typing import Any

from reqtable.loop.poller import Poller
from reqtable.table.addresses import address_text
from reqtable.table.parts import Server
from reqtable.table.states import Ending, Event
from reqtable.table.table import Entry
from reqtable.table.tracebacks import account_of, trim

log = logging.getLogger("reqtable")


def ends_program(problem: BaseException) -> bool:
    """Return whether `problem` is meant for the program: Ctrl-C or `sys.exit()`, in the main thread."""
    return isinstance(problem, KeyboardInterrupt | SystemExit) and (
        threading.current_thread() is threading.main_thread()
    )


# By thread: the id of the request whose error `handle_error` is told now.
REPORTED: dict[int, int] = {}


def tell_server(server: Server, request: Any, peer: Any, problem: BaseException, id: int | None) -> None:
    """Call the server's `handle_error`, inside the caller's `except` block for `problem`.

    The traceback then begins with the user's code. `id` is that of the request; None: it had no place in the table.
    """
    trim(problem)
    ident = get_ident()
    if id is not None:
        REPORTED[ident] = id
    try:
        server.handle_error(request, peer)
    finally:
        REPORTED.pop(ident, None)


class Failures:
    """Reports the exceptions that the loop catches, and decides which of them end the loop.

    The function `end` marks an entry closed.
    """

    def __init__(self, poller: Poller, end: Callable[[Entry, Event], None]) -> None:
        self._poller = poller
        self._end = end
        self.hooks_raise = False  # `handle_request()` runs the loop: its caller gets the exceptions of hooks
        self.unwinding: BaseException | None = None  # the exception that is ending the loop; it is reported already

    def report(
        self, server: Server, request: Any, peer: Any, problem: BaseException, id: int | None = None
    ) -> BaseException | None:
        """Tell the server of `problem`, inside the caller's `except` block for it. `id` is that of the request.

        Returns the exception that ends the loop, or None.
        """
        self._poller.end_if_copy(problem)
        if ends_program(problem) or (self.hooks_raise and isinstance(problem, KeyboardInterrupt | SystemExit)):
            self.unwinding = problem
            return problem
        try:
            tell_server(server, request, peer, problem, id)
        except BaseException as raised:
            self._poller.end_if_copy(raised)
            if self.hooks_raise or ends_program(raised):
                self.unwinding = raised
                return raised
            self._log(f"{address_text(peer)}: handle_error raised ", raised)
        self._poller.end_if_copy()
        return None

    def outside_step(self, entry: Entry | None, problem: BaseException) -> None:
        """End the request of `entry` at once: the loop's work for it raised `problem`. None: no request is involved.

        Call this inside the `except` block for `problem`. Raises the exception that ends the loop, if there is one.
        """
        ends_loop: BaseException | None = None
        try:
            if problem is self.unwinding:
                raise problem
            self._poller.end_if_copy(problem)
            if entry is not None:
                entry.ending = Ending.ERROR
                self._end(entry, Event.LOST)
                ends_loop = self.report(entry.server, entry.transport.request, entry.peer, problem, entry.id)
            elif self.hooks_raise or ends_program(problem):
                ends_loop = self.unwinding = problem
            else:
                self._log("outside of any request: ", problem)
            if ends_loop is not None:
                raise ends_loop
        finally:
            del problem, ends_loop  # a traceback holds this frame, and the cycle would keep the request's socket open

    @staticmethod
    def _log(message: str, problem: BaseException) -> None:
        """Log `message` and `problem`. If the log fails too, print `problem`."""
        trim(problem)
        try:
            log.error("%s%s", message, account_of(problem), exc_info=problem)
        except Exception:
            with contextlib.suppress(Exception):
                traceback.print_exception(problem)
