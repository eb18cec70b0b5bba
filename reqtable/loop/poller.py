"""Polls for the loop: holds the selector, the wake-up that ends a poll, and the descriptors that are watched."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from reqtable.loop.platform import System
from reqtable.loop.process import Process, end_child
from reqtable.loop.selector import Ready, interests_of, polling_of
from reqtable.loop.wakeup import Wakeup
from reqtable.table.states import READ


class Poller:
    """Holds the selector and the wake-up of one loop, and opens them when they are first needed."""

    def __init__(self, system: System) -> None:
        # How the loop polls: see `Polling`.
        self.poll: Callable[[float | None], Ready]
        self.targets: list[Any]
        self.masks: Mapping[int, int]
        self._system = system
        self.dup = system.dup
        self._selector: selectors.BaseSelector | None = None
        self._wakeup: Wakeup | None = None
        self.interests = 0  # those that the selector knows
        self.forks = -1  # `Process.forks` of the process that opened the selector; -1: it is not open

    @property
    def is_open(self) -> bool:
        """Whether the selector is open."""
        return self._selector is not None

    @property
    def selector(self) -> selectors.BaseSelector:
        """The selector, which is opened if it is not open."""
        self.open()
        assert self._selector is not None
        return self._selector

    def open(self) -> None:
        """Open the selector and the wake-up, unless they are open."""
        self.forks = Process.forks
        if self._selector is None:
            wakeup = self._system.wakeup()
            try:
                self._selector = self._system.selector()
            except BaseException:
                wakeup.close()
                raise
            self.poll, self.targets, self.masks = polling_of(self._selector)
            self.interests = interests_of(self._selector)
            self._wakeup = wakeup
            self._selector.register(wakeup, READ, wakeup)

    def close(self) -> None:
        """Close the selector and the wake-up."""
        selector, self._selector = self._selector, None
        wakeup, self._wakeup = self._wakeup, None
        if selector is not None and wakeup is not None:
            selector.close()
            wakeup.close()

    def wake(self) -> None:
        """End the poll. Callable from any thread and from a signal handler."""
        wakeup = self._wakeup  # a local name: another thread may be closing it
        if wakeup is not None and not self.is_copy:
            wakeup.wake()

    def on_signals(self) -> AbstractContextManager[None]:
        """Return a context manager. Inside it, a signal ends the poll too."""
        assert self._wakeup is not None
        return self._wakeup.on_signals()

    # -- in a forked child --------------------------------------------------------------------------------------------

    @property
    def is_copy(self) -> bool:
        """True if this process was forked from the one that opened the selector."""
        return self.forks != Process.forks and self.forks >= 0

    def end_if_copy(self, error: BaseException | None = None) -> None:
        """End this process if foreign code has forked it. `error` is what that code raised in the child.

        Call this after code that may have forked. Frequent callers compare `forks` first, which is faster.
        """
        if self.is_copy:
            end_child(error)

    def forked(self) -> None:
        """Close this child's copies. The selector is the parent's, so no descriptor is unregistered from it."""
        if self._wakeup is not None:
            self._wakeup.forked()
        self.close()

    def start_over(self) -> None:
        """Close this child's copies, so that the next `open` opens descriptors of its own."""
        self.close()
        self.forks = -1


class Selectable:
    """Has the selector watch one descriptor, `fd`. `watched` is the interest that it was last told."""

    __slots__ = ("watched",)

    def __init__(self) -> None:
        self.watched = 0

    @property
    def fd(self) -> int:
        raise NotImplementedError

    @property
    def poller(self) -> Poller:
        raise NotImplementedError

    def on_ready(self, mask: int) -> None:
        """Handle the descriptor, which is ready for `mask`."""
        raise NotImplementedError

    def watch(self, interest: int) -> None:
        """Have the selector watch the descriptor for exactly `interest`; 0: not at all.

        Only our own selectors can watch for RESET and PEER_END. Any other is not told of these.
        """
        if interest == self.watched:
            return
        poller = self.poller
        if poller.forks != Process.forks and poller.is_copy:
            return
        if not interest and not poller.is_open:  # a closed selector watches nothing
            self.watched = 0
            return
        selector = poller.selector
        interest &= poller.interests
        if interest == self.watched:
            return
        try:
            if not interest:
                selector.unregister(self.fd)
            elif not self.watched:
                selector.register(self.fd, interest, self)
            else:
                selector.modify(self.fd, interest, self)
        except KeyError:
            # An earlier call may have changed the selector but not `watched`, if a signal handler (Ctrl-C) raised then.
            if interest:
                with contextlib.suppress(KeyError):
                    selector.unregister(self.fd)
                selector.register(self.fd, interest, self)
        self.watched = interest


class Descriptor(Selectable):
    """Watches a plain descriptor: stores the `fd` and the poller."""

    __slots__ = ("fd", "poller")

    fd: int
    poller: Poller

    def __init__(self, poller: Poller, fd: int) -> None:
        super().__init__()
        self.poller = poller
        self.fd = fd


def abandon_socket(request: object) -> None:
    """Close a forked child's copy of a socket, for good, without a word to the peer or the selector."""
    if isinstance(request, socket.socket):
        close_copy(socket.socket.detach(request))  # `close` would wait until files made from the socket are closed


def close_copy(fd: int) -> None:
    """Close a forked child's copy of a descriptor, if there is one: a thread may have closed it before the fork."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)
