"""Taking new requests: a bounded number a pass, none while the table is full, and no spinning when accepting fails."""

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

# accept(2): the process's or the machine's descriptors or memory are used up. The connection stays in the queue, so
# the listener stays readable: polling it on would spin.
# EINVAL: someone has shut the listening socket down; it stays readable too.
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL}


_QUEUE_MAX = 4096  # net.core.somaxconn of today's kernels: no queue is longer, however fast others come
_SO_ATTACH_FILTER = 26  # linux/socket.h; the same on every architecture but PA-RISC and SPARC
_BPF_RETURN = 0x06
_PROBES_MAX = 4
_TCP_KEEPIDLE: int = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", 0))  # macOS has the other name


class Listening(Protocol):
    """What a listener needs of its server."""

    server_address: Any
    socket: socket.socket  # of a stream server, at least
    _owns_queue: bool
    _is_left_non_blocking: bool

    def fileno(self) -> int: ...
    def _handle_request_noblock(self) -> bool:
        """Take a request that is there; True where there may be another."""


class Listener(Descriptor):
    """A server's listening socket, or the socket that its datagrams come to."""

    __slots__ = (
        "_allowance",
        "_allowed_at",
        "_batch",
        "_full",
        "_holds_back",
        "_loop",
        "_most",
        "_said_exhausted",
        "_set_timeout",
        "_timeout",
        "resting_until",
        "server",
        "taken",
    )

    def __init__(self, loop: Loop, server: Listening, most: int) -> None:
        super().__init__(loop.poller, server.fileno())
        self.server = server
        self._loop = loop
        self.resting_until = inf  # accepting failed: look again then, or when a descriptor is free
        self.taken = 0  # requests, so far
        self._full = False  # the table was: look again when an entry has gone
        self._said_exhausted = False
        self._allowance = inf  # how many more may be taken at once, at most as many as in a second
        self._allowed_at = loop.table.now
        self._most = self._batch = most
        # A connection can be gone again before it is accepted; accept must not block then. A datagram server's socket
        # is its handlers' too, and stays as they expect it.
        self._timeout: float | None = None
        # The queue of a stream server holds those who connect. A datagram server's socket is its sessions' too.
        stream = self._holds_back = getattr(server, "socket_type", None) == socket.SOCK_STREAM
        self._set_timeout = stream and isinstance(getattr(server, "socket", None), socket.socket)
        if self._set_timeout:
            self._timeout = listening_timeout(server)
            server.socket.setblocking(False)
        elif not getattr(server, "receives_without_waiting", False):
            self._most = self._batch = 1  # its get_request may block when nothing is there
        self.watch(READ)

    def on_ready(self, mask: int) -> None:
        """Take what has come: as many as last time, and twice as many where that was not all.

        So where clients come one at a time no call is made only to learn that there is no other.
        """
        taken = 0
        while taken < self._batch:
            if not self.watched or self._loop.stopping:
                return
            if self._holds_back and not self._has_room():
                return
            try:
                if not self.server._handle_request_noblock():
                    if self._holds_back:  # the kernel drops datagrams that are not fetched in time
                        self._batch = max(1, taken)
                    return
            except BaseException:
                self._rest(self._pause_end())  # a `get_request` that fails each time would be called again at once
                raise
            taken += 1
            self.taken += 1
            self._allowance -= 1
            self._said_exhausted = False
        self._batch = min(self._most, 2 * taken)

    def _has_room(self) -> bool:
        """Whether the table and the rate of new connections allow another; if not, listening rests."""
        table = self._loop.table
        limits = table.limits
        if limits.when_full == "wait" and table.full:
            self._full = True
            self.watch(0)
            return False
        return limits.accepts_per_s_max is None or self._may_take_one()

    def _may_take_one(self) -> bool:
        """Whether the rate of new connections allows another; where it does not, listening rests until it does."""
        rate = self._loop.table.limits.accepts_per_s_max
        assert rate is not None
        now = self._loop.table.now
        self._allowance = min(float(rate), self._allowance + (now - self._allowed_at) * rate)
        self._allowed_at = now
        if self._allowance < 1:
            self._rest(now + (1 - self._allowance) / rate)
            return False
        return True

    def _is_full(self) -> bool:
        table = self._loop.table
        return table.limits.when_full == "wait" and table.full

    def rest(self, error: OSError) -> None:
        """Accepting failed for want of descriptors or memory: stop polling for a while."""
        self._rest(self._pause_end())
        if not self._said_exhausted:
            self._said_exhausted = True
            log.warning("%s: can't accept: %s; waiting", address_text(self.server.server_address), printable(error))

    def _pause_end(self) -> float:
        return self._loop.table.clock() + self._loop.table.limits.accept_pause_s

    def _rest(self, until: float) -> None:
        self.resting_until = until
        self.watch(0)
        self._loop.mailbox.call_later(bool, until - self._loop.table.clock())  # the loop passes by then

    def consider(self, now: float, freed: bool) -> None:
        """After a pass: take requests again where there is room for them; `freed`: something has closed in it."""
        if self.watched or not (self._full or self.resting_until < inf):
            return
        if freed or now >= self.resting_until:
            self.resting_until = inf
        self._full = self._is_full()
        if not self._full and self.resting_until == inf:
            self.watch(READ)

    def take_the_last(self) -> None:
        """Take those who have connected, and let nobody else: who were in the queue when it goes would be reset."""
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
            # Blocking again, it would have the other processes wait in accept(2): two are woken for one connection.
            self.server._is_left_non_blocking = True
        else:
            self.server.socket.settimeout(self._timeout)


def listening_timeout(server: Listening) -> float | None:
    """The timeout of a server's listening socket as the program has set it; None: it blocks."""
    timeout: float | None = server.socket.gettimeout()
    return None if timeout == 0 and server._is_left_non_blocking else timeout


def set_keepalive(listening: socket.socket, seconds: float | None) -> None:
    """Have the kernel probe each client that is accepted from here on and silent for so many seconds; None: no client.

    Accepted sockets inherit these options. The unanswered probes take about as long again; then the connection is lost
    with ETIMEDOUT (tcp(7), TCP_KEEPIDLE).
    """
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, seconds is not None)
    if seconds is not None:
        idle_s = ceil(seconds)
        probes = min(idle_s, _PROBES_MAX)
        for option, value in ((_TCP_KEEPIDLE, idle_s), (socket.TCP_KEEPINTVL, round(idle_s / probes))):
            listening.setsockopt(socket.IPPROTO_TCP, option, value)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)


def _drop_newcomers(listening: socket.socket) -> None:
    """Have the kernel drop what comes for a listening socket, whoever else holds it.

    Who connects between the last accept and the close would be reset. Dropped, they try again (tcp(7), a second later)
    and are refused, which a proxy takes for a reason to go elsewhere. Linux: SO_ATTACH_FILTER in socket(7), with a
    program of one instruction, "return 0 bytes".
    """
    if not sys.platform.startswith("linux") or listening.family not in (socket.AF_INET, socket.AF_INET6):
        return
    import ctypes  # slow to import, and needed once at most

    instructions = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, 0))
    with contextlib.suppress(OSError):  # then some of them are reset
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(instructions)))
