"""A custom dispatch policy: everything runs on the loop, as under `inline`, and every step is timed.

A step that takes longer than `SLOW_S` holds up all other requests, so the policy logs it. A package registers a policy
as an entry point. Then `dispatch="stopwatch"` finds it, also on the command line, in the environment and in the
configuration:

    [project.entry-points."reqtable.dispatch"]
    stopwatch = "stopwatch:Stopwatch"
"""

import logging
import time
from typing import Any, ClassVar

from reqtable.dispatch import Entry, Inline, PollOnly, Resumable, Want

SLOW_S = 0.1

log = logging.getLogger("stopwatch")


class Stopwatch(Inline):
    """Runs steps as `inline` does, and times them."""

    name = "stopwatch"

    def blocking(self, entry: Entry, transport: PollOnly) -> Resumable:
        return Timed(entry, super().blocking(entry, transport))

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return Timed(entry, handler)


class Timed:
    """Wraps a resumable and times its steps."""

    bound_to_thread: ClassVar[bool] = False

    def __init__(self, entry: Entry, inner: Resumable) -> None:
        self.entry = entry
        self.inner = inner

    def _resume(self, item: Any) -> Want[Any] | None:
        began = time.perf_counter()
        try:
            return self.inner._resume(item)
        finally:
            self.look(began)

    def _throw(self, error: BaseException) -> Want[Any] | None:
        began = time.perf_counter()
        try:
            return self.inner._throw(error)
        finally:
            self.look(began)

    def _close(self) -> None:
        self.inner._close()

    def look(self, began: float) -> None:
        took = time.perf_counter() - began
        if took > SLOW_S:
            log.warning("%s: a step of %s held the loop for %.2f s", self.entry.peer, self.entry.want, took)
