"""Listeners: they take a bounded number of requests a pass, none while the table is full, and rest if accept fails."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
import sys
from math import ceil, inf
from typing import Any, Protocol

from reqtable.loop.loop import Loop
from reqtable.loop.poller import Descriptor
from reqtable.loop.process import Process
from reqtable.table.addresses import address_text, printable
from reqtable.table.states import READ

log = logging.getLogger("reqtable")

# Errors of accept(2). The process or the machine has run out of descriptors or memory: the connection stays in the
# queue and the listening socket stays readable, so the loop would spin if it polled on. EINVAL: somebody has shut the
# listening socket down, and it stays readable too.
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL}


_QUEUE_MAX = 4096  # today's default of net.core.somaxconn: a bound on the last accepts, however fast clients connect
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; the same on every architecture but PA-RISC and SPARC
_BPF_RETURN = 0x06
_PROBES_MAX = 4
_TCP_KEEPIDLE: int = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", 0))  # macOS: TCP_KEEPALIVE


class Listening(Protocol):
    """The part of a server that a listener needs."""

    server_address: Any
    socket: socket.socket  # of a stream server, at least
    _owns_queue: bool
    _is_left_non_blocking: bool

    def fileno(self) -> int: ...
    def _handle_request_noblock(self) -> bool:
        """Take a request without waiting for it; True if there may be another."""


class Listener(Descriptor):
    """Takes requests from a server's listening socket, or from the socket that receives its datagrams."""

    __slots__ = (
        "_allowance",
        "_allowed_at",
        "_batch",
        "_batch_max",
        "_full",
        "_full_in",
        "_holds_back",
        "_loop",
        "_said_exhausted",
        "_set_timeout",
        "_timeout",
        "_timer_at",
        "paused_until",
        "server",
        "taken",
    )

    def __init__(self, loop: Loop, server: Listening, most: int) -> None:
        super().__init__(loop.poller, server.fileno())
        self.server = server
        self._loop = loop
        self.paused_until = inf  # after a failed accept: try again then, or when a descriptor is free
        self._timer_at = -inf  # when the loop is to be awake for the end of a pause
        self.taken = 0  # how many requests, so far
        self._full = False  # the table was full: look again when an entry has left it
        self._said_exhausted = False
        self._allowance = inf  # how many requests the rate allows now: at most those of one second
        self._allowed_at = loop.table.now
        self._batch_max = self._batch = most
        self._full_in = -1  # the pass that took a full batch last
        # A connection may vanish before it is accepted; accept must not block then. Handlers use the socket of a
        # datagram server too, so its mode does not change.
        self._timeout: float | None = None
        # The kernel's queue holds clients that connect while the listener rests. A datagram socket is read even then:
        # it also receives for the sessions.
        stream = self._holds_back = getattr(server, "socket_type", None) == socket.SOCK_STREAM
        self._set_timeout = stream and isinstance(getattr(server, "socket", None), socket.socket)
        if self._set_timeout:
            self._timeout = listening_timeout(server)
            server.socket.setblocking(False)
        elif not getattr(server, "receives_without_waiting", False):
            self._batch_max = self._batch = 1  # a second `get_request` may block
        self.watch(READ)

    def on_ready(self, mask: int) -> None:
        """Take as many requests as came the last time; after two full batches in a row, the batch is twice as large.

        If clients connect one at a time, this saves the call that would only find the queue empty.
        """
        taken = 0
        while taken < self._batch:
            if not self.watched or self._loop.stopping:
                return
            if self._holds_back and not self._pause_unless_room():
                return
            try:
                if not self.server._handle_request_noblock():
                    if self._holds_back:  # the kernel drops datagrams that are not fetched in time
                        self._batch = max(1, taken)
                    return
            except BaseException:
                self._pause_until(self._pause_end())  # else a `get_request` that always fails would make the loop spin
                raise
            taken += 1
            self.taken += 1
            self._allowance -= 1
            self._said_exhausted = False
        this_pass = self._loop.times.passes
        if self._full_in == this_pass - 1:
            self._batch = min(self._batch_max, 2 * taken)
        self._full_in = this_pass

    def _pause_unless_room(self) -> bool:
        """Return whether the table and the rate of new connections allow another request; if not, rest."""
        table = self._loop.table
        limits = table.limits
        if limits.when_full == "wait" and table.full:
            self._full = True
            self.watch(0)
            return False
        return limits.accepts_per_s_max is None or self._may_take_one()

    def _may_take_one(self) -> bool:
        """Return whether `accepts_per_s_max` allows another connection; if not, rest until it does."""
        rate = self._loop.table.limits.accepts_per_s_max
        assert rate is not None
        now = self._loop.table.now
        self._allowance = min(float(rate), self._allowance + (now - self._allowed_at) * rate)
        self._allowed_at = now
        if self._allowance < 1:
            self._pause_until(now + (1 - self._allowance) / rate)
            return False
        return True

    def _is_full(self) -> bool:
        table = self._loop.table
        return table.limits.when_full == "wait" and table.full

    def pause(self, error: OSError) -> None:
        """Stop polling for a while: accept failed with `error`, for lack of descriptors or memory."""
        self._pause_until(self._pause_end())
        if not self._said_exhausted:
            self._said_exhausted = True
            log.warning("%s: can't accept: %s; waiting", address_text(self.server.server_address), printable(error))

    def _pause_end(self) -> float:
        return self._loop.table.clock() + self._loop.table.limits.accept_pause_s

    def _pause_until(self, until: float) -> None:
        self.paused_until = until
        self.watch(0)
        self._wake_loop_by(until)

    def _wake_loop_by(self, until: float) -> None:
        """Have the loop make a pass when the pause ends. One timer serves all pauses that end no sooner."""
        now = self._loop.table.clock()
        if not now < self._timer_at <= until:
            self._timer_at = until
            self._loop.mailbox.call_later(self._timer_came, until - now)

    def _timer_came(self) -> None:
        self._timer_at = -inf
        if not self.watched and self._loop.table.clock() < self.paused_until < inf:
            self._wake_loop_by(self.paused_until)

    def listen_again_if_room(self, now: float, freed: bool) -> None:
        """After a pass: listen again if there is room. `freed` says that an entry was released in the pass."""
        if self.watched or not (self._full or self.paused_until < inf):
            return
        if freed or now >= self.paused_until:
            self.paused_until = inf
        self._full = self._is_full()
        if not self._full and self.paused_until == inf:
            self.watch(READ)

    def take_the_last(self) -> None:
        """Take the clients that have connected, then close the socket: clients left in its queue would be reset."""
        if self._set_timeout:
            if self.server._owns_queue:
                _drop_newcomers(self.server.socket)
            try:
                for _ in range(_QUEUE_MAX):
                    if not self.server._handle_request_noblock():
                        break
            except BaseException as problem:
                self._loop.steps.failures.outside_step(None, problem)
            self.close()
            self.server.socket.close()

    def close(self) -> None:
        self.watch(0)
        if not self._set_timeout or self.server.fileno() != self.fd:
            return
        if self._timeout is None and Process.shares_descriptors():
            # The mode is shared with the other processes. If the socket blocked again, a process that is woken for a
            # connection that another one takes would hang in accept(2).
            self.server._is_left_non_blocking = True
        else:
            self.server.socket.settimeout(self._timeout)


def listening_timeout(server: Listening) -> float | None:
    """Return the timeout, in seconds, that the program has set on a server's listening socket; None: it blocks."""
    timeout: float | None = server.socket.gettimeout()
    return None if timeout == 0 and server._is_left_non_blocking else timeout


def set_keepalive(listening: socket.socket, seconds: float | None) -> None:
    """Have the kernel probe each client, accepted from now on, that is silent for `seconds`; None: no probes.

    Accepted sockets inherit these options. If no probe is answered for about as long again, the connection is lost with
    ETIMEDOUT (tcp(7), TCP_KEEPIDLE).
    """
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, seconds is not None)
    if seconds is not None:
        idle_s = ceil(seconds)
        probes = min(idle_s, _PROBES_MAX)
        for option, value in ((_TCP_KEEPIDLE, idle_s), (socket.TCP_KEEPINTVL, round(idle_s / probes))):
            listening.setsockopt(socket.IPPROTO_TCP, option, value)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)


def _drop_newcomers(listening: socket.socket) -> None:
    """Have the kernel drop the packets of new connections to a listening socket, in every process that has it.

    A client that connects between the last accept and the close would be reset. If its packet is dropped, the client
    tries again a second later (tcp(7)) and is refused; a proxy then goes to another server. Linux only:
    SO_ATTACH_FILTER in socket(7), with a program of one instruction, "return 0 bytes".
    """
    if not sys.platform.startswith("linux") or listening.family not in (socket.AF_INET, socket.AF_INET6):
        return
    import ctypes  # slow to import, and needed at most once

    instructions = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, 0))
    with contextlib.suppress(OSError):  # then some clients are reset
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(instructions)))
