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
from collections.abc import Callable
from typing import Any

from reqtable.core.buffers import Inbox
from reqtable.core.errors import ConfigurationError
from reqtable.core.table import Entry, Resumable, address_text
from reqtable.core.wants import ELSEWHERE, Want
from reqtable.dispatch.blocking import serve_in_child
from reqtable.dispatch.children import Child, become_child, fork, leave_child, log
from reqtable.dispatch.delegating import Delegating, Delegation, HandingOff
from reqtable.dispatch.driver import DATAGRAM_BYTES, Driver
from reqtable.dispatch.shipping import Shipped, check_shippable
from reqtable.engine.datagram import Session
from reqtable.engine.transports import Lent

# Keeps messages apart, and holds as many as its buffer does.
_PACKETS = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)
_LOOK_S = 0.05
_MAX_CHILDREN = 40  # as in `socketserver`


class InChild(Delegation):
    """A request that a child has. The later datagrams of a session reach it by a socket pair.

    Whatever of them it leaves unread is read back by the parent: if it was no session, they are new requests.
    """

    def __init__(self, policy: Fork, entry: Entry, pid: int, pair: tuple[socket.socket, socket.socket] | None) -> None:
        super().__init__(entry)
        self._policy = policy
        self._pid = pid
        self.is_killed = False
        self._pair = pair
        if pair is not None:
            self.transport.forward = self._forward  # type: ignore[attr-defined]

    def finish(self) -> None:
        self._read_back()
        super().finish()

    def release(self) -> None:
        if not self.is_let_go:
            self.is_killed = True
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
            self._pair[0].send(data, socket.MSG_DONTWAIT)
        except OSError:
            self.transport.inbox.dropped += 1  # type: ignore[attr-defined]

    def _read_back(self) -> None:
        if self._pair is None:
            return
        session: Any = self.transport
        session.forward = None
        with contextlib.suppress(BlockingIOError):
            while True:
                session.deliver(self._pair[1].recv(DATAGRAM_BYTES, socket.MSG_DONTWAIT))
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

    @classmethod
    def check_step(cls, handler_class: Any) -> None:
        check_shippable(handler_class, cls.name, by_import=False)

    @property
    def most(self) -> int | None:
        configured = self.dispatcher.config.fork.max_children
        return configured or getattr(self.dispatcher.server, "max_children", None) or _MAX_CHILDREN

    @property
    def busy(self) -> int:
        return len(self.children)

    def resumable(self, entry: Entry, handler: Any) -> Resumable:
        return HandingOff(entry, handler, self.name)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return Shipped(entry, handler, self.dispatcher.executor("fork"))

    def start(self, entry: Entry) -> None:
        is_session = isinstance(entry.transport, Session) and bool(entry.peer)
        pair = socket.socketpair(socket.AF_UNIX, _PACKETS) if is_session else None
        try:
            if pair is not None:
                _send_later_ones(entry.transport.inbox, pair[0])  # type: ignore[attr-defined]
            pid = fork()
        except BaseException:
            for end in pair or ():
                end.close()
            raise
        if not pid:
            self._be_child(entry, pair)
        self.watch(entry, pid, pair)

    def watch(self, entry: Entry, pid: int, pair: tuple[socket.socket, socket.socket] | None = None) -> Want[Any]:
        """The child `pid` has the rest of `entry`. Returns what to wait for."""
        delegation = InChild(self, entry, pid, pair)
        entry.policy = self

        owner = entry.table.owner
        assert owner is not None

        def ended(child: Child) -> None:
            self._forget(pid)
            how = child.ending()
            if how is not None and not delegation.is_killed:
                entry.ending = entry.ending or "error"
                log.warning("%s: request %d: its child %s", address_text(entry.peer), entry.id, how)
            if owner.in_other_thread:
                owner.post(delegation.end)
            else:
                delegation.end()
            self.vacate()

        server = entry.server
        active = getattr(server, "active_children", None)
        if active is None:
            active = server.active_children = set()  # type: ignore[attr-defined]
        active.add(pid)
        self.children[pid] = None
        if self.dispatcher.loop.in_other_thread:  # a driver of another thread may be gone before the child is
            self.dispatcher.loop.post(self._register, pid, ended)
        else:
            self._register(pid, ended)
        if isinstance(delegation.transport, Lent):
            server.close_request(delegation.request)
        else:
            entry.handler._leave()
            delegation.transport.leave()  # type: ignore[attr-defined]
            entry.output.clear()  # the child sends it
        return ELSEWHERE

    def _register(self, pid: int, ended: Callable[[Child], None]) -> None:
        """In the loop that all children are watched in."""
        self.children[pid] = Child(self.dispatcher.loop, pid, ended)

    def kill(self, pid: int) -> None:
        """End a child, now, unless it has been waited for."""
        if pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

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

    def _be_child(self, entry: Entry, pair: tuple[socket.socket, socket.socket] | None) -> None:
        status = 1
        try:
            become_child(entry, self.dispatcher)
            if isinstance(entry.transport, Lent):
                serve_in_child(entry, entry.transport.request)
            else:
                driver = Driver(entry, self, self.dispatcher, entry.transport.request)
                self.dispatcher.loop = driver
                if pair is not None:
                    pair[0].close()
                    driver.feed(pair[1])
                driver.drive()
            status = 0
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
            end.send(data, socket.MSG_DONTWAIT)
        except OSError:
            inbox.dropped += 1


def _wait_for_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
