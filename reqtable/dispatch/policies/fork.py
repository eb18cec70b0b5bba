"""Policy `fork`: a child process per request.

The child has a copy of the parent's memory; its changes reach neither the parent nor another child. It closes its
copies of the server's other descriptors, serves its one request, and exits. The parent keeps the row and the open
connection until the child has exited. Then it ends the connection without cutting off the answer.

The policy forks for all hand-offs of a pass together, at the end of the pass (`_fork_due`). After a fork, the first
write to a page of memory copies the page, in the parent as in the child, so little is done between two forks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from typing import Any, NoReturn

from reqtable.dispatch.forking.child import Child, become_child, keep, send_signal
from reqtable.dispatch.forking.in_child import STATUSES, InChild
from reqtable.dispatch.handoff import HandedOffRequest, HandoffPolicy
from reqtable.dispatch.pickled_steps import PickledSteps, check_pickled
from reqtable.dispatch.policy import Host
from reqtable.dispatch.private_loop import PrivateLoop
from reqtable.dispatch.run_blocking import serve_in_child
from reqtable.loop.failures import tell_server
from reqtable.loop.process import flush_streams, leave_child
from reqtable.table.engine_wants import ELSEWHERE
from reqtable.table.errors import ConfigurationError
from reqtable.table.parts import Resumable
from reqtable.table.states import Ending, State
from reqtable.table.table import Entry
from reqtable.table.want import Want

_LOOK_S = 0.05
_MAX_CHILDREN = 40  # as in `socketserver`


class Fork(HandoffPolicy):
    """Forks a child for each request."""

    name = "fork"
    forks = True
    takes_whole_requests = True

    def __init__(self, host: Host) -> None:
        if not hasattr(os, "fork"):
            raise ConfigurationError("dispatch policy 'fork': this platform has no fork(): choose 'thread'")
        super().__init__(host)
        self.children: dict[int, Child | None] = {}  # None: about to be watched
        self._due: deque[InChild] = deque()  # to fork for at the end of the pass, or once a process can be had

    @classmethod
    def check_step(cls, handler_class: Any) -> None:
        check_pickled(handler_class, cls.name, by_import=False)

    @property
    def most(self) -> int | None:
        configured = self.host.config.fork.max_children
        return configured or getattr(self.host.server, "max_children", None) or _MAX_CHILDREN

    @property
    def busy(self) -> int:
        return len(self.children) + len(self._due)

    def handoff(self, entry: Entry, handler: Resumable | None) -> InChild:
        return InChild(self, entry, handler, self)

    def resumable(self, entry: Entry, handler: Any) -> Resumable:
        return self.handoff(entry, handler)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return PickledSteps(entry, handler, self.host.executor("fork"))

    def start(self, handoff: HandedOffRequest) -> None:
        assert isinstance(handoff, InChild)
        handoff.give()
        if self.in_pass(handoff.entry):
            if not self._due:
                self.host.steps.mailbox.at_end_of_pass(self._fork_due)
            self._due.append(handoff)
            return
        flush_streams()
        try:
            pid = self._fork(handoff)
        except BaseException:
            handoff.take_back()
            raise
        self._watch(handoff, pid)

    def adopt(self, entry: Entry, pid: int, pidfd: int) -> Want[Any]:
        """Watch the child `pid`, which the handler forked and which has the rest of `entry`. Returns the want."""
        handoff = self.handoff(entry, entry.resumable)
        entry.resumable = handoff
        handoff.number = entry.call_number
        handoff.give()
        self._watch(handoff, pid, pidfd)
        return ELSEWHERE

    def _fork_due(self) -> None:
        """Fork for all hand-offs of this pass, before going on with any of them."""
        flush_streams()
        begun: deque[tuple[InChild, int]] = deque()
        try:
            while self._due:
                handoff = self._due.popleft()
                if handoff.entry.state is State.CLOSED or not handoff.is_given:
                    continue  # it has ended early
                try:
                    begun.append((handoff, self._fork(handoff)))
                except Exception as problem:
                    if isinstance(problem, BlockingIOError) and (begun or self.children):
                        self._due.appendleft(handoff)  # no process can be had until a child has exited
                        self.host.steps.mailbox.call_later(self._fork_due)
                        break
                    handoff.undo()
                    handoff.fail(problem)
        finally:
            while begun:
                self._go_on(*begun.popleft())

    def _go_on(self, handoff: InChild, pid: int) -> None:
        try:
            self._watch(handoff, pid)
        except Exception as problem:  # raised by a hook of the server
            handoff.fail(problem)

    def _fork(self, handoff: InChild) -> int:
        pid = handoff.fork()
        if not pid:
            self._be_child(handoff)
        return pid

    def _watch(self, handoff: InChild, pid: int, pidfd: int | None = None) -> None:
        """In the parent: watch the child `pid`, which has the request."""
        handoff.forked(pid)
        server = self.host.server
        if getattr(server, "active_children", None) is None:
            server.active_children = set()
        server.active_children.add(pid)
        self.children[pid] = None
        watching = self.host.watching_steps
        if watching.in_other_thread:  # the private loop of this thread may end before the child does
            watching.post(self._register, pid, handoff, pidfd)
        else:
            self._register(pid, handoff, pidfd)
        handoff.leave()

    def _register(self, pid: int, handoff: InChild, pidfd: int | None) -> None:
        """In the loop that watches all children: register this one."""

        def ended(child: Child) -> None:
            self._forget(pid)
            handoff.exited(child)
            self.vacate()

        self.children[pid] = Child(self.host.watching_steps, pid, ended, pidfd)

    def kill(self, pid: int) -> None:
        """Kill a child, unless it has been waited for."""
        child = self.children.get(pid)
        if child is not None:
            child.kill()
        elif pid in self.children:
            send_signal(pid, -1, signal.SIGKILL)

    def collect(self, blocking: bool = False) -> None:
        """Wait for the children that have exited; with `blocking`, for all children."""
        steps = self.host.watching_steps
        if steps.in_other_thread:  # only the loop's thread waits for children; this thread waits until none is left
            none_left = threading.Event()
            steps.post(self._watch_for_none, none_left)
            while blocking and steps.running and not none_left.wait(_LOOK_S):
                pass  # the loop may end meanwhile
        for child in [] if steps.in_other_thread else list(self.children.values()):
            if child is not None:
                child.collect(blocking)

    def _watch_for_none(self, none_left: threading.Event) -> None:
        if self.children:
            self.host.watching_steps.mailbox.call_later(lambda: self._watch_for_none(none_left))
        else:
            none_left.set()

    def wait(self) -> None:
        self.collect(blocking=True)

    def let_go(self) -> None:
        self.collect()
        if self.children and not self.host.steps.in_other_thread:  # they go on, and something has to wait for them
            left = list(self.children)
            for child in self.children.values():
                if child is not None:
                    child.unwatch()
            self.children.clear()
            threading.Thread(target=_wait_for_all, args=(left,), name="reqtable-children", daemon=True).start()

    def abandon(self) -> None:
        super().abandon()
        self._due.clear()
        for child in self.children.values():
            if child is not None:
                child.abandon()
        keep(self.children)
        self.children = {}
        self.host.server.active_children = None

    def _forget(self, pid: int) -> None:
        self.children.pop(pid, None)
        active = getattr(self.host.server, "active_children", None)
        if active is not None:
            active.discard(pid)

    def _be_child(self, handoff: InChild) -> NoReturn:
        entry = handoff.entry
        status = 1
        try:
            handoff.serve_here()
            become_child(entry, self.host)
            request = entry.transport.request
            if handoff.ends_itself:
                serve_in_child(entry, request)
                ended = entry
            else:
                driver = PrivateLoop(entry, self, request, handoff.progress)
                self.host.watch_in(driver.steps)
                feed = handoff.keep_feed()
                if feed is not None:
                    driver.feed(feed)
                driver.drive()
                ended = driver.entry
            status = STATUSES[ended.ending or Ending.DONE]
        except Exception as error:
            tell_server(entry.server, entry.transport.request, entry.peer, error, entry.id)
        finally:
            try:
                self.host.close(wait=True, calls=True)  # `leave_child` runs no exit functions
            finally:
                leave_child(status)


def _wait_for_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
