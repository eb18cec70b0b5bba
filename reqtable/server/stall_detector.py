"""Names the step that holds up the loop, and all requests with it. Only another thread can see where that step is.

So a watching thread looks a few times a second while a server runs steps of handlers on the loop. It changes nothing
and runs no code of a handler. `threading.enumerate()` does not list it: that is for the program's own threads. If no
thread can be started, nothing is watched.
"""

from __future__ import annotations

import _thread
import contextlib
import linecache
import logging
import os
import signal
import sys
import threading
import time
from math import inf
from types import FrameType
from typing import Any

from reqtable.loop.loop import Loop
from reqtable.table.addresses import address_text
from reqtable.table.snapshot import handler_name
from reqtable.table.tracebacks import is_of_program

log = logging.getLogger("reqtable")

_MEND = "run it by call(), or the server under policy 'thread' or 'pool'"
_ROOMS = (16_384, 4_096, 1_024)  # descriptors; eight bytes each


class StallDetector:
    """Watches a loop while entered, and warns of a step that lasts longer than `loop_stall_s` of the engine's limits.

    It warns once for such a step, while the step lasts.
    """

    def __init__(self, loop: Loop, fd: int) -> None:
        self._loop = loop
        self._fd = fd  # any descriptor that is open
        self._process = os.getpid()
        self._end = _thread.allocate_lock()
        self._ended = _thread.allocate_lock()
        self._seen: tuple[float, Any] = (-inf, None)  # the time of the pass, and the entry whose step ran
        self._since = 0.0  # when that step began
        self._said = False

    def __enter__(self) -> StallDetector:
        _grow_descriptor_table(self._fd)
        self._end.acquire()
        self._ended.acquire()
        try:
            _thread.start_new_thread(self._look_on, ())
        except RuntimeError:
            self._ended.release()
        return self

    def __exit__(self, *args: object) -> None:
        if os.getpid() == self._process:  # a forked child has no such thread
            self._end.release()
            self._ended.acquire()

    def _look_on(self) -> None:
        wait_s = 0.0
        # The main thread handles signals: one that it blocks (around a fork) must wait for it, not come here.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while not self._end.acquire(timeout=wait_s):
                wait_s = self._look()
        finally:
            self._ended.release()

    def _look(self) -> float:
        """Warn if a step holds up the loop. Returns after how many seconds to look again."""
        loop = self._loop
        table = loop.table
        stall_s = table.limits.loop_stall_s
        look_s = min(stall_s / 2, _thread.TIMEOUT_MAX)
        now = table.clock()
        entry = table.running
        frame = self._loop_frame()
        seen = (table.now, entry or loop.progress)
        if seen != self._seen:
            self._seen = seen
            if self._said:
                loop.on_stall(None)
            self._said = False
            # Steps of other requests may have come before it in this pass.
            self._since = table.now if now - table.now <= look_s else now
        left_s = self._since + stall_s - now
        if self._said or left_s > 0:
            return min(max(left_s, 0.001), look_s)
        waits = frame is None or (entry is None and _polls(frame, loop))
        if frame is not None and not waits and (table.now, table.running) == (seen[0], entry):
            self._said = True
            loop.on_stall(entry)
            if entry is not None:
                who = f"{address_text(entry.peer)}: a step of {handler_name(entry.handler)}"
                mend = getattr(entry.handler, "_stall_mend", _MEND)
            else:
                name = "Engine" if table.accepting is None else type(table.accepting).__name__
                who = f"{name}, in a hook or taking a request,"
                mend = "a hook must not wait"
            _say("%s has held up everyone for %.1f s at %s (%s)", who, now - self._since, _place(frame), mend)
        return look_s

    def _loop_frame(self) -> FrameType | None:
        ident = self._loop.table.thread
        return None if ident is None else sys._current_frames().get(ident)


def _grow_descriptor_table(fd: int) -> None:
    """Have the kernel enlarge this process's table of descriptors before a second thread shares it.

    Once threads share the table, each doubling waits for every processor (expand_fdtable in Linux's fs/file.c). That
    takes 10 ms and more, in the middle of a pass, while many connections arrive.
    """
    with contextlib.suppress(ImportError):
        import fcntl

        for room in _ROOMS:
            with contextlib.suppress(OSError):  # above RLIMIT_NOFILE, or there is no such descriptor
                os.close(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, room - 1))
                return


def _say(*message: Any) -> None:
    """Log a warning in a new thread: logging asks for the current thread, and would list the watching one for good."""
    thread = threading.Thread(target=log.warning, args=message, name="reqtable-watch", daemon=True)
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)


def _polls(frame: FrameType, loop: Loop) -> bool:
    """Return whether the stack of `frame` is in `loop`'s poll, waiting for events."""
    each: FrameType | None = frame
    while each is not None:
        if each.f_code.co_name in ("ready", "select") and each.f_locals.get("self") is loop.poller.selector:
            return True
        each = each.f_back
    return False


def _place(frame: FrameType) -> str:
    """Return the innermost line of the program's own code in a stack, as `file:line in function: code`."""
    own = frame
    outer: FrameType | None = frame
    while outer is not None:
        if is_of_program(outer.f_code.co_filename):
            own = outer
            break
        outer = outer.f_back
    code = own.f_code
    text = linecache.getline(code.co_filename, own.f_lineno).strip()
    return f"{code.co_filename}:{own.f_lineno} in {code.co_name}: {text}"
