"""What the loop does with an exception of code that is not the engine's: a handler, a file, a hook, a want, a logger.

The rules:

* KeyboardInterrupt and SystemExit in the main thread are meant for the program: they end the loop. Nothing else does.
* Any other exception ends the request that it belongs to, and no other. The server's `handle_error` is told of it once.
* What `handle_error` itself raises is logged.
* `handle_request()` serves one request for its caller: there the caller gets what the server's hooks raise, as in
  `socketserver`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any

from reqtable.loop.poller import Poller
from reqtable.table.addresses import address_text
from reqtable.table.parts import Server
from reqtable.table.states import Ending, Event
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")


def ends_program(problem: BaseException) -> bool:
    """Whether the exception is meant for the program: Ctrl-C or `sys.exit()`, in the main thread."""
    return isinstance(problem, KeyboardInterrupt | SystemExit) and (
        threading.current_thread() is threading.main_thread()
    )


class Failures:
    """Reports the exceptions that the loop catches, and tells which of them end the loop.

    `end` marks the entry of a request closed.
    """

    def __init__(self, poller: Poller, end: Callable[[Entry, Event], None]) -> None:
        self._poller = poller
        self._end = end
        self.hooks_raise = False  # `handle_request()` runs the loop: its caller gets what the server's hooks raise
        self.unwinding: BaseException | None = None  # ends the loop: it has been reported, and is on its way out

    def report(self, server: Server, request: Any, peer: Any, problem: BaseException) -> BaseException | None:
        """Have the server's `handle_error` told of `problem`, which the caller handles. Returns what ends the loop."""
        self._poller.end_if_copy(problem)
        if ends_program(problem) or (self.hooks_raise and isinstance(problem, KeyboardInterrupt | SystemExit)):
            self.unwinding = problem
            return problem
        try:
            server.handle_error(request, peer)
        except BaseException as raised:
            self._poller.end_if_copy(raised)
            if self.hooks_raise or ends_program(raised):
                self.unwinding = raised
                return raised
            self._log(f"{address_text(peer)}: handle_error raised {type(raised).__name__}", raised)
        self._poller.end_if_copy()
        return None

    def outside_step(self, entry: Entry | None, problem: BaseException) -> None:
        """What the loop did for `entry`, or for no request (None), raised `problem`: the request ends, at once.

        To be called where `problem` is handled. Raises what ends the loop.
        """
        ends_loop: BaseException | None = None
        try:
            if problem is self.unwinding:
                raise problem
            self._poller.end_if_copy(problem)
            if entry is not None:
                entry.ending = Ending.ERROR
                self._end(entry, Event.LOST)
                ends_loop = self.report(entry.server, entry.transport.request, entry.peer, problem)
            elif self.hooks_raise or ends_program(problem):
                ends_loop = self.unwinding = problem
            else:
                self._log(f"{type(problem).__name__}, outside of any request", problem)
            if ends_loop is not None:
                raise ends_loop
        finally:
            del problem, ends_loop  # its traceback holds this frame: a cycle would keep the request's socket open

    @staticmethod
    def _log(message: str, problem: BaseException) -> None:
        """Log it; where the log fails too, print it."""
        try:
            log.error("%s", message, exc_info=problem)
        except Exception:
            with contextlib.suppress(Exception):
                traceback.print_exception(problem)
