"""What the loop polls: the selector, the wake-up that ends a poll, and the descriptors that are watched."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager

from reqtable.loop.platform import System
from reqtable.loop.process import Process, end_child
from reqtable.loop.selector import Ready, ready_of
from reqtable.loop.wakeup import Wakeup
from reqtable.table.compiled import mypyc_attr
from reqtable.table.states import READ


class Poller:
    """The selector and the wake-up of one loop. They are opened when they are first needed."""

    def __init__(self, system: System) -> None:
        self.poll: Callable[[float | None], Ready]  # waits so many seconds at most; None: as long as it takes
        self._system = system
        self._selector: selectors.BaseSelector | None = None
        self._wakeup: Wakeup | None = None
        self.forks = -1  # `Process.forks` of the process that opened them; -1: none has

    @property
    def selector(self) -> selectors.BaseSelector:
        """What watches the descriptors."""
        self.open()
        assert self._selector is not None
        return self._selector

    def open(self) -> None:
        """Take the descriptors that a loop needs. Harmless when they are there."""
        self.forks = Process.forks
        if self._selector is None:
            wakeup = self._system.wakeup()
            try:
                self._selector = self._system.selector()
            except BaseException:
                wakeup.close()
                raise
            self.poll = ready_of(self._selector)
            self._wakeup = wakeup
            self._selector.register(wakeup, READ, wakeup)

    def close(self) -> None:
        """Give back what `open` took."""
        selector, self._selector = self._selector, None
        wakeup, self._wakeup = self._wakeup, None
        if selector is not None and wakeup is not None:
            selector.close()
            wakeup.close()

    def wake(self) -> None:
        """End the poll. Callable from any thread and from a signal handler."""
        wakeup = self._wakeup  # another thread may be closing it
        if wakeup is not None and not self.is_copy:
            wakeup.wake()

    def on_signals(self) -> AbstractContextManager[None]:
        """A signal ends the poll, too, while this is entered."""
        assert self._wakeup is not None
        return self._wakeup.on_signals()

    # -- in a forked child --------------------------------------------------------------------------------------------

    @property
    def is_copy(self) -> bool:
        """This process was forked from the one that opened the selector."""
        return self.forks != Process.forks and self.forks >= 0

    def end_if_copy(self, error: BaseException | None = None) -> None:
        """After code that may have forked: its child ends. `error` is what the code raised there.

        Where this is called often, `forks` is compared first.
        """
        if self.is_copy:
            end_child(error)

    def forked(self) -> None:
        """In a child that was forked while the loop ran: the selector is the parent's, so nothing is unregistered."""
        if self._wakeup is not None:
            self._wakeup.forked()
        self.close()

    def start_over(self) -> None:
        """In a forked child that is to serve itself: the next `open` is its own."""
        self.close()
        self.forks = -1


@mypyc_attr(allow_interpreted_subclasses=True)
class Selectable:
    """What has a descriptor, `fd`, that the selector watches for what `watch` was last asked for."""

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
        """The descriptor is ready for `mask`."""
        raise NotImplementedError

    def watch(self, interest: int) -> None:
        """Have the selector watch the descriptor for exactly `interest`; 0: not at all."""
        if interest == self.watched:
            return
        poller = self.poller
        if poller.forks != Process.forks and poller.is_copy:
            return
        selector = poller.selector
        try:
            if not interest:
                selector.unregister(self.fd)
            elif not self.watched:
                selector.register(self.fd, interest, self)
            else:
                selector.modify(self.fd, interest, self)
        except KeyError:
            # An exception from a signal handler (Ctrl-C) may have come between the selector and the next line.
            if interest:
                with contextlib.suppress(KeyError):
                    selector.unregister(self.fd)
                selector.register(self.fd, interest, self)
        self.watched = interest


@mypyc_attr(allow_interpreted_subclasses=True)
class Descriptor(Selectable):
    """A selectable that is a descriptor and no more."""

    __slots__ = ("fd", "poller")

    fd: int
    poller: Poller

    def __init__(self, poller: Poller, fd: int) -> None:
        super().__init__()
        self.poller = poller
        self.fd = fd


def abandon_socket(request: object) -> None:
    """In a forked child: close its copy of a socket, for good, and without a word to the peer or the selector."""
    if isinstance(request, socket.socket):
        close_copy(socket.socket.detach(request))  # `close` would wait for the files made of it


def close_copy(fd: int) -> None:
    """In a forked child: close its copy of a descriptor, if it has one: another thread may just have closed it."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)
