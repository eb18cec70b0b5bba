"""Policy `fork`: a child process per request.

The child has a copy of the memory as it was; nothing that it changes there reaches the parent or another child. It
closes its copies of all other descriptors of the server, serves its one request, and leaves. The parent keeps the row,
and the connection open, until the child has exited; then it ends the connection without cutting off the answer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections import deque
from typing import Any, NoReturn

from reqtable.dispatch.forking.child import Child, Forked, become_child, fork, log, send_signal
from reqtable.dispatch.forking.run_blocking import serve_in_child
from reqtable.dispatch.handoff import Delegating, Delegation, HandingOff
from reqtable.dispatch.pickled_steps import Shipped, check_shippable
from reqtable.dispatch.private_loop import Driver, send_message, take_message
from reqtable.loop.process import flush_streams, leave_child
from reqtable.net.datagram import Session
from reqtable.net.transports import Lent
from reqtable.server.stats import ENDINGS
from reqtable.table.addresses import address_text
from reqtable.table.buffers import Inbox
from reqtable.table.errors import ConfigurationError
from reqtable.table.states import State
from reqtable.table.table import Entry, Resumable
from reqtable.table.wants import ELSEWHERE, Failure, Want

# Keeps messages apart, and holds as many as its buffer does.
_PACKETS = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)
_LOOK_S = 0.05
_MAX_CHILDREN = 40  # as in `socketserver`

# The exit statuses by which a child says how its request ended; 0 says that it is done.
_STATUSES = {ending: 200 + number for number, ending in enumerate(ENDINGS)} | {"done": 0}
_ENDINGS = {status: ending for ending, status in _STATUSES.items() if status}

Pair = tuple[socket.socket, socket.socket]


class InChild(Delegation):
    """A request that a child has, or will have when this pass ends. The later datagrams of a session reach it by a pair
    of sockets.

    Whatever of them it leaves unread is read back by the parent: if it was no session, they are new requests.
    """

    def __init__(self, policy: Fork, entry: Entry) -> None:
        super().__init__(entry)
        self._policy = policy
        self._pid: int | None = None
        self._is_killed = False
        self._pair: Pair | None = None

    def begin(self, pid: int, pair: Pair | None) -> None:
        """In the parent: the child has it now."""
        self._pid = pid
        self._pair = pair
        self.entry.policy = self._policy
        if pair is not None:
            self.transport.forward = self._forward  # type: ignore[attr-defined]
        self.hand_over()

    def leave_buffers(self) -> None:
        """The child sends the output, and reads the input of a stream."""
        entry = self.entry
        entry.output.clear()
        if entry.input.is_stream:
            entry.input.leftover()
        entry.table.hold(entry, len(entry.input))

    def fail(self, problem: Exception) -> None:
        """In the loop: it could not be begun, or gone on with."""
        assert self.entry.table.owner is not None
        self.entry.table.owner.post_result(self.entry, self.number, Failure(problem))

    def exited(self, child: Child) -> None:
        """In the loop that children are watched in: the child has been waited for."""
        entry = self.entry
        how = child.ending()
        if child.status in _ENDINGS:
            entry.ending = entry.ending or _ENDINGS[child.status]
        elif how is not None and not self._is_killed:
            entry.ending = entry.ending or "error"
            log.warning("%s: request %d: its child %s", address_text(entry.peer), entry.id, how)
        owner = entry.table.owner
        assert owner is not None
        if owner.in_other_thread:
            owner.post(self.end)
        else:
            self.end()

    def finish(self) -> None:
        self._read_back()
        super().finish()

    def release(self) -> None:
        if self._pid is not None and not self.is_let_go:
            self._is_killed = True
            self._policy.kill(self._pid)
            self.transport.shut()  # for children of its own, too
        self._read_back()
        super().release()

    def abandon(self) -> None:
        super().abandon()
        for end in self._pair or ():
            end.close()

    def _forward(self, data: bytes) -> None:
        assert self._pair is not None
        try:
            send_message(self._pair[0], data)
        except OSError:
            self.transport.inbox.dropped += 1  # type: ignore[attr-defined]

    def _read_back(self) -> None:
        if self._pair is None:
            return
        session: Any = self.transport
        session.forward = None
        with contextlib.suppress(BlockingIOError):
            while (data := take_message(self._pair[1])) is not None:
                session.deliver(data)
        for end in self._pair:
            end.close()
        self._pair = None


class Fork(Delegating):
    name = "fork"

    def __init__(self, dispatcher: Any) -> None:
        if not hasattr(os, "fork"):
            raise ConfigurationError("dispatch policy 'fork': this platform has no fork(): choose 'thread'")
        super().__init__(dispatcher)
        self.children: dict[int, Child | None] = {}  # None: about to be watched
        self._due: deque[InChild] = deque()  # to be forked when this pass ends, or when there is a process left

    @classmethod
    def check_step(cls, handler_class: Any) -> None:
        check_shippable(handler_class, cls.name, by_import=False)

    @property
    def most(self) -> int | None:
        configured = self.dispatcher.config.fork.max_children
        return configured or getattr(self.dispatcher.server, "max_children", None) or _MAX_CHILDREN

    @property
    def busy(self) -> int:
        return len(self.children) + len(self._due)

    def resumable(self, entry: Entry, handler: Any) -> Resumable:
        return HandingOff(entry, handler, self)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return Shipped(entry, handler, self.dispatcher.executor("fork"))

    def start(self, entry: Entry) -> None:
        delegation = InChild(self, entry)
        if self.in_pass(entry):
            if not self._due:
                self.engine.retry(self._fork_due, in_s=0)
            self._due.append(delegation)
            return
        flush_streams()
        try:
            pid, pair = self._fork(delegation)
        except BaseException:
            delegation.undo()
            raise
        self._watch(delegation, pid, pair)

    def adopt(self, entry: Entry, child: Forked) -> Want[Any]:
        """The child, which its handler has forked, has the rest of `entry`. Returns what to wait for."""
        self._watch(InChild(self, entry), child.pid, None, child.detach())
        return ELSEWHERE

    def _fork_due(self) -> None:
        """Fork for all that this pass has taken over, and only then go on with each.

        After a fork the first write to a page of memory copies it, here as in the child: so little is done in between.
        """
        flush_streams()
        begun: deque[tuple[InChild, int, Pair | None]] = deque()
        try:
            while self._due:
                delegation = self._due.popleft()
                if delegation.entry.state is State.CLOSED:
                    continue
                try:
                    begun.append((delegation, *self._fork(delegation)))
                except Exception as problem:
                    if isinstance(problem, BlockingIOError) and (begun or self.children):
                        self._due.appendleft(delegation)  # no process is left, until a child has ended
                        self.engine.retry(self._fork_due)
                        break
                    delegation.undo()
                    delegation.fail(problem)
        finally:
            while begun:
                self._go_on(*begun.popleft())

    def _go_on(self, delegation: InChild, pid: int, pair: Pair | None) -> None:
        try:
            self._watch(delegation, pid, pair)
        except Exception as problem:  # of a hook
            delegation.fail(problem)

    def _fork(self, delegation: InChild) -> tuple[int, Pair | None]:
        """In the parent: the child, and the pair that it shares with us if the request is a session's."""
        transport = delegation.transport
        pair = None
        try:
            if isinstance(transport, Session) and delegation.entry.peer:
                pair = socket.socketpair(socket.AF_UNIX, _PACKETS)
                _send_later_ones(transport.inbox, pair[0])
            pid = fork()
        except BaseException:
            for end in pair or ():
                end.close()
            raise
        if not pid:
            self._be_child(delegation, pair)
        return pid, pair

    def _watch(self, delegation: InChild, pid: int, pair: Pair | None, pidfd: int | None = None) -> None:
        """In the parent: the child `pid` has the request."""
        delegation.begin(pid, pair)
        server = delegation.entry.server
        active = getattr(server, "active_children", None)
        if active is None:
            active = server.active_children = set()  # type: ignore[attr-defined]
        active.add(pid)
        self.children[pid] = None
        if self.dispatcher.loop.in_other_thread:  # a driver of another thread may be gone before the child is
            self.dispatcher.loop.post(self._register, pid, delegation, pidfd)
        else:
            self._register(pid, delegation, pidfd)
        if isinstance(delegation.transport, Lent):
            server.close_request(delegation.request)
        else:
            delegation.entry.handler._leave()
            delegation.transport.leave()  # type: ignore[attr-defined]
            delegation.leave_buffers()

    def _register(self, pid: int, delegation: InChild, pidfd: int | None) -> None:
        """In the loop that all children are watched in."""

        def ended(child: Child) -> None:
            self._forget(pid)
            delegation.exited(child)
            self.vacate()

        self.children[pid] = Child(self.dispatcher.loop, pid, ended, pidfd)

    def kill(self, pid: int) -> None:
        """End a child, now, unless it has been waited for."""
        child = self.children.get(pid)
        if child is not None:
            child.kill()
        elif pid in self.children:
            send_signal(pid, -1, signal.SIGKILL)

    def collect(self, blocking: bool = False) -> None:
        """Wait for the children that have exited; with `blocking`, for all."""
        engine = self.dispatcher.loop
        if engine.in_other_thread:  # that thread does it; here we can only wait
            none_left = threading.Event()
            engine.post(self._watch_for_none, none_left)
            while blocking and engine.running and not none_left.wait(_LOOK_S):
                pass  # someone may end the loop meanwhile
        for child in [] if engine.in_other_thread else list(self.children.values()):
            if child is not None:
                child.collect(blocking)

    def _watch_for_none(self, none_left: threading.Event) -> None:
        if self.children:
            self.dispatcher.loop.retry(lambda: self._watch_for_none(none_left))
        else:
            none_left.set()

    def wait(self) -> None:
        self.collect(blocking=True)

    def let_go(self) -> None:
        self.collect()
        if self.children and not self.engine.in_other_thread:  # they go on; someone has to wait for them
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
        self.children.clear()
        self.dispatcher.server.active_children = None

    def _forget(self, pid: int) -> None:
        self.children.pop(pid, None)
        active = getattr(self.dispatcher.server, "active_children", None)
        if active is not None:
            active.discard(pid)

    def _be_child(self, delegation: InChild, pair: Pair | None) -> NoReturn:
        entry = delegation.entry
        status = 1
        try:
            delegation.undo()  # it is ours
            become_child(entry, self.dispatcher)
            if isinstance(entry.transport, Lent):
                serve_in_child(entry, entry.transport.request)
                ended = entry
            else:
                driver = Driver(entry, self, self.dispatcher, entry.transport.request)
                self.dispatcher.loop = driver
                if pair is not None:
                    pair[0].close()
                    driver.feed(pair[1])
                driver.drive()
                ended = driver.entry
            status = _STATUSES[ended.ending or "done"]
        except Exception:
            entry.server.handle_error(entry.transport.request, entry.peer)
        finally:
            try:
                self.dispatcher.close(wait=True, calls=True)  # no exit function will
            finally:
                leave_child(status)


def _send_later_ones(inbox: Inbox, end: socket.socket) -> None:
    """Datagrams that came after the request's own, and that nothing has been read of, go the way of those to come."""
    waiting = inbox.unopened()
    own = 0 if inbox.asked else 1
    for data in waiting[:own]:
        inbox.deliver(data, 1)
    for data in waiting[own:]:
        try:
            send_message(end, data)
        except OSError:
            inbox.dropped += 1


def _wait_for_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
