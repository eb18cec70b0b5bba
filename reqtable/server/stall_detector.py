"""Telling who holds up the loop: a step that does not return stops everyone, and only another thread can see where.

So one looks on, a few times a second, while a server serves whose handlers' steps run on the loop. It touches nothing
and runs no code of a handler's. It is not among `threading.enumerate()`, which is for the program's own threads. Where
no thread can be started nobody looks on.
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

from reqtable.config.import_string import is_of_program
from reqtable.loop.loop import Loop
from reqtable.table.addresses import address_text
from reqtable.table.snapshot import handler_name

log = logging.getLogger("reqtable")

_ROOMS = (16_384, 4_096, 1_024)  # descriptors; eight bytes each


class StallDetector:
    """Looks on for as long as it is entered; `loop_stall_s` of the engine's limits is how long a step may last.

    One that lasts longer is warned of once, while it lasts.
    """

    def __init__(self, loop: Loop, fd: int) -> None:
        self._loop = loop
        self._fd = fd  # any descriptor that is open
        self._process = os.getpid()
        self._end = _thread.allocate_lock()
        self._ended = _thread.allocate_lock()
        self._seen: tuple[float, Any] = (-inf, None)  # the pass, by its time, and whose step it was in
        self._since = 0.0  # that step has lasted since then
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
        # Signals are the main thread's: one that it holds back (around a fork) shall wait for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while not self._end.acquire(timeout=wait_s):
                wait_s = self._look()
        finally:
            self._ended.release()

    def _look(self) -> float:
        """Warn, if there is reason to. Returns in how many seconds to look again."""
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
            self._said = False
            # Another's step may have come before it in this pass.
            self._since = table.now if now - table.now <= look_s else now
        left_s = self._since + stall_s - now
        if self._said or left_s > 0:
            return min(max(left_s, 0.001), look_s)
        waits = frame is None or (entry is None and _polls(frame, loop))
        if frame is not None and not waits and (table.now, table.running) == (seen[0], entry):
            self._said = True
            if entry is not None:
                who = f"{address_text(entry.peer)}: a step of {handler_name(entry.handler)}"
                mend = "run it by call(), or the server under policy 'thread' or 'pool'"
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
    """Have the kernel's table of our descriptors grow before there is a second thread, who would share it.

    From then on each doubling waits until every processor has taken notice (expand_fdtable in Linux's fs/file.c): 10 ms
    and more, in the midst of a pass, and of many connections coming in.
    """
    with contextlib.suppress(ImportError):
        import fcntl

        for room in _ROOMS:
            with contextlib.suppress(OSError):  # above RLIMIT_NOFILE, or there is no such descriptor
                os.close(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, room - 1))
                return


def _say(*message: Any) -> None:
    """Log it, in a thread that may be seen: logging asks for the current one, which would list this one for good."""
    thread = threading.Thread(target=log.warning, args=message, name="reqtable-watch", daemon=True)
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)


def _polls(frame: FrameType, loop: Loop) -> bool:
    """Whether that stack is that of a loop which waits for something to do."""
    each: FrameType | None = frame
    while each is not None:
        if each.f_code.co_name in ("ready", "select") and each.f_locals.get("self") is loop.poller.selector:
            return True
        each = each.f_back
    return False


def _place(frame: FrameType) -> str:
    """The line of the program's own code that a stack stands in, as `file:line in function: code`."""
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
