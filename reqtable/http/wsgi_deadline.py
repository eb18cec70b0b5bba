"""A deadline for an application that runs in the main thread: in a forked child, or in the loop."""

from __future__ import annotations

import signal
import threading
from typing import Any

from reqtable.http.wsgi_call import ApplicationCall


class ApplicationTimedOut(BaseException):
    """Interrupts an application that has taken too long. No Exception, so that `except Exception` does not catch it."""


def advance_within(call: ApplicationCall, bytes_max: int, timeout_s: float) -> bool:
    """Have the application go on. Returns False if it was interrupted after `timeout_s` seconds.

    A timer of the process interrupts it (setitimer(2)), and only in the main thread. In another thread it takes as long
    as it takes.
    """
    if threading.current_thread() is not threading.main_thread():
        call.advance(bytes_max, True)
        return True
    is_armed = True

    def interrupt(number: int, frame: Any) -> None:
        if is_armed:
            raise ApplicationTimedOut

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        call.advance(bytes_max, True)
        is_armed = False
    except ApplicationTimedOut:
        return False
    finally:
        is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return True
