"""One call of `serve_forever`: its work before the first pass and after the last one.

In this order: `on_start` of each server and of its handler class, listen, watch for stalls; the passes; then stop
listening, and `on_stop` of all that has started, in reverse order. All of it happens in the loop's thread, while the
loop counts as running: so a hook may call `shutdown`, and no other thread can run the loop.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import inf
from typing import Any

from reqtable.loop.failures import ends_program
from reqtable.loop.loop import Loop
from reqtable.server.hooks import Hook, bound, owners_of
from reqtable.server.hosted import Hosted
from reqtable.server.listeners import Listeners
from reqtable.server.shared_state import shares_of
from reqtable.server.stall_detector import StallDetector
from reqtable.table.states import State
from reqtable.table.tracebacks import account_of, trim

log = logging.getLogger("reqtable")

Called = Callable[[], Any]


class Serving:
    """Surrounds the passes of a serving call with hooks, listeners and the stall detector."""

    def __init__(
        self, loop: Loop, servers: list[Hosted], listeners: Listeners, leave_thread: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._servers = servers
        self._listeners = listeners
        self._leave_thread = leave_thread  # ends the requests that can't go on in another thread
        self.is_held = False  # it must not listen yet: another process listens, and this one is to take its place
        self.on_listen: list[Called] = []  # called when it listens at last
        self._started: list[tuple[Hosted, Called]] = []  # the `on_stop` of what has started, in the order of the starts

    @contextmanager
    def around_passes(self) -> Iterator[None]:
        """Begin to serve, and at the end of the block stop serving. Raises what an `on_start` raises."""
        with ExitStack() as ending:  # whatever one of these raises, the others are called: the last one first
            ending.callback(self._send)
            ending.callback(self._stop_all)
            ending.callback(self._loop.steps.reap)
            ending.callback(self._stop_listening)
            ending.push(lambda _, error, __: self._loop.poller.end_if_copy(error))  # the rest is the parent's
            self._start_all()
            if not self.is_held:
                self.listen()
            with self._stall_detection():
                yield

    def listen(self) -> None:
        """Accept requests for all servers that do not drain."""
        self.is_held = False
        for server in self._servers:
            if not server._is_draining:
                self._listeners.listen(server)
        for told in self.on_listen:
            told()
        self.on_listen.clear()

    def has_started(self, server: Hosted) -> bool:
        """Return whether `server` has started in this serving call, and has not stopped."""
        return any(each is server for each, _ in self._started)

    def stop(self, server: Hosted) -> None:
        """Call `on_stop` of `server`, which is served no more, and of its handler class."""
        own = [hook for each, hook in self._started if each is server]
        self._started = [pair for pair in self._started if pair[0] is not server]
        self._call_all(own[::-1])

    def forget(self) -> None:
        """In a forked child: call no `on_stop`, because what has started is the parent's."""
        self._started.clear()

    def _start_all(self) -> None:
        begun: list[Hosted] = []
        while left := [each for each in self._servers if each not in begun]:  # a hook may add or close servers
            begun.append(left[0])
            self._start(left[0])

    def _start(self, server: Hosted) -> None:
        shares_of(server)  # raises an exception if one of the hooks of a restart is wrong
        for _, find, given in owners_of(server):
            start, stop = (bound(find, name, given) or _nothing for name in ("on_start", "on_stop"))
            _begin(start)
            self._loop.poller.end_if_copy()
            self._started.append((server, stop))

    def _stop_all(self) -> None:
        """Call each `on_stop`, unless another process has served all the time: then the hooks would undo its work."""
        hooks = [] if self.is_held else [hook for _, hook in reversed(self._started)]
        self._started.clear()
        self._call_all(hooks)

    def _call_all(self, hooks: list[Called]) -> None:
        """Call all `hooks`. Log what they raise; raise only the first exception that is meant for the program."""
        ends: BaseException | None = None
        for hook in hooks:
            try:
                hook()
            except BaseException as problem:
                self._loop.poller.end_if_copy(problem)
                if ends_program(problem):
                    ends = ends or problem
                else:
                    trim(problem)
                    log.error("%s raised %s", hook, account_of(problem), exc_info=problem)
            self._loop.poller.end_if_copy()
        if ends is not None:
            try:
                raise ends
            finally:
                ends = None  # see Failures.outside_step

    def _send(self) -> None:
        """Send what an `on_stop` has sent. The next serving call, if there is one, takes the items that it has told."""
        for entry in tuple(self._loop.table.touched):
            if entry.output.first is not None and entry.state is not State.CLOSED:
                entry.transport.flush()

    def _stop_listening(self) -> None:
        for server in self._servers:
            self._listeners.unlisten(server)
        if threading.current_thread() is not threading.main_thread():
            self._leave_thread()

    def _stall_detection(self) -> AbstractContextManager[Any]:
        """Return a context that warns of steps that hold up the loop, if any steps run on the loop."""
        loop = self._loop
        on_loop = any(server._policies.chosen.steps_on_loop for server in self._servers)
        if loop.steps.system.stalls and on_loop and loop.table.limits.loop_stall_s < inf:
            return StallDetector(loop, self._servers[0].fileno())
        return nullcontext()


def _begin(start: Called) -> None:
    """Call an `on_start`. Add the name of the hook to an exception that the hook raises."""
    try:
        start()
    except Exception as error:
        if isinstance(start, Hook):
            error.add_note(f"raised by {start} ({start.place})")
        raise


def _nothing() -> None:
    """Stand in for a hook that the program does not define."""
