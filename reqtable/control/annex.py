"""`Annex`: a second engine in the thread of the first one. Its passes run inside the passes of the first.

The control server is such an engine. It has a table, limits and counts of its own, so operators take no room from the
clients, and a server that drains, or that is full, can still be looked at. The loop of the first engine polls the
selector of the second one as one more descriptor. While nobody looks, that costs a request nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from math import inf
from typing import Any

from reqtable.loop.poller import Descriptor
from reqtable.loop.selector import Ready
from reqtable.server.engine import Engine
from reqtable.table.states import READ

_LAST_PASSES = 4
_READY_MAX = 4  # descriptors that a pass serves: a flood of operators must not hold up the clients

_Poll = Callable[[float | None], Ready]


class Annex(Descriptor):
    """Runs the passes of the engine `inner` inside those of `outer`, until `close()`."""

    __slots__ = ("_around", "_due_at", "inner", "outer")

    def __init__(self, outer: Engine, inner: Engine) -> None:
        outer.loop.open()
        inner.loop.open()
        selector: Any = inner.loop.poller.selector  # ours has a descriptor, as epoll(7) has
        super().__init__(outer.loop.poller, selector.fileno())
        self.outer = outer
        self.inner = inner
        self._due_at = inf  # when a timer will run the next pass
        inner.loop.poller.poll = _few_of(inner.loop.poller.poll)
        self._around = ExitStack()
        self._around.enter_context(inner.serving.around_passes())
        for forgetting in (outer.loop.on_forked, outer.loop.on_start_over):
            forgetting.append(self.abandon)
        self.watch(READ)

    def on_ready(self, mask: int) -> None:
        """Run one pass of the inner engine: something has arrived for it."""
        self.inner.loop.run_inside()
        at = self.inner.next_at()
        now = self.outer.table.clock()
        if at <= now:
            self.outer.post(self._go_on)
        elif at < self._due_at:
            self._due_at = at
            self.outer.loop.mailbox.add_timer(at, self._run_due)

    def _go_on(self) -> None:
        if self.inner.loop.poller.is_open:
            self.on_ready(READ)

    def _run_due(self) -> None:
        self._due_at = inf
        self._go_on()

    def close(self) -> None:
        """Serve no operator any more. End the requests of the inner engine, and close its servers."""
        self.watch(0)
        for forgetting in (self.outer.loop.on_forked, self.outer.loop.on_start_over):
            if self.abandon in forgetting:
                forgetting.remove(self.abandon)
        for _ in range(_LAST_PASSES):
            self.inner.loop.run_inside()  # the answer to the one who has ended the outer engine is still on its way
        servers: list[Any] = list(self.inner.servers)
        self._around.close()
        for server in servers:
            server.server_close()
        self.inner.close()

    def abandon(self) -> None:
        """In a forked child: close this process's copies. The operators are the parent's."""
        self.inner.abandon(None)


def _few_of(poll: _Poll) -> _Poll:
    """Return a poll that gives few of what `poll` finds, in turn. The rest is found again in the next pass."""
    first = 0

    def poll_few(most_s: float | None) -> Ready:
        nonlocal first
        ready = poll(most_s)
        if len(ready) <= _READY_MAX:
            return ready
        first = (first + _READY_MAX) % len(ready)
        return [*ready[first:], *ready[:first]][:_READY_MAX]

    return poll_few
