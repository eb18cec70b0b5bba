"""The default selector. With epoll(7), it takes less memory per descriptor than `selectors.EpollSelector`."""

from __future__ import annotations

import contextlib
import math
import select
import selectors
from collections.abc import Callable, Mapping
from typing import Any

from reqtable.table.states import READ, WRITE

Ready = list[tuple[Any, int]]  # the data of each ready descriptor, and what it is ready for

if hasattr(select, "epoll"):
    _EVENTS = (0, select.EPOLLIN, select.EPOLLOUT, select.EPOLLIN | select.EPOLLOUT)  # indexed by READ and WRITE
    # Any other event reports an error or a hang-up. It counts as ready for both: using the descriptor tells the error.
    _MASKS = {select.EPOLLIN: READ, select.EPOLLOUT: WRITE}

    class Epoll(selectors.BaseSelector):
        """Watches descriptors with epoll(7), and keeps their data in lists that are indexed by descriptor.

        Descriptors are small numbers and reused, so the lists take a tenth of the memory of a dict of keys.

        An exception (Ctrl-C) may interrupt a method after the kernel's change. Then the method can be called again.
        """

        def __init__(self) -> None:
            self._epoll = select.epoll()
            self._data: list[Any] = []
            self._events = bytearray()  # 0: not registered
            self._count = 0

        def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            fd = fileobj if type(fileobj) is int else _number_of(fileobj)
            if not 0 < events <= READ | WRITE:
                raise ValueError(f"events must be EVENT_READ, EVENT_WRITE or both, not {events!r}")
            if 0 <= fd < len(self._events) and self._events[fd]:
                raise KeyError(f"descriptor {fd} is registered already")
            try:
                self._epoll.register(fd, _EVENTS[events])
            except FileExistsError:
                self._epoll.modify(fd, _EVENTS[events])
            more = fd + 1 - len(self._data)
            if more > 0:
                self._data += [None] * more
                self._events += bytes(more)
            self._note(fd, events, data)
            return selectors.SelectorKey(fd, fd, events, data)

        def unregister(self, fileobj: Any) -> selectors.SelectorKey:
            fd = self._known(fileobj)
            key = self._key(fd)
            with contextlib.suppress(OSError):  # the descriptor was closed
                self._epoll.unregister(fd)
            self._note(fd, 0, None)
            return key

        def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            fd = self._known(fileobj)
            self._epoll.modify(fd, _EVENTS[events])
            self._note(fd, events, data)
            return self._key(fd)

        def ready(self, timeout: float | None = None) -> Ready:
            """Wait at most `timeout` seconds and return what is ready. A failed descriptor is ready for both."""
            events, data = self._events, self._data
            # The kernel still reports a closed descriptor while a duplicate of it is open.
            return [(data[fd], _MASKS.get(event, READ | WRITE)) for fd, event in self._poll(timeout) if events[fd]]

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            told = [(fd, event) for fd, event in self._poll(timeout) if self._events[fd]]
            return [(self._key(fd), _MASKS.get(event, READ | WRITE)) for fd, event in told]

        def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
            return {fd: self._key(fd) for fd, events in enumerate(self._events) if events}

        def close(self) -> None:
            self._epoll.close()

        def _poll(self, timeout: float | None) -> list[tuple[int, int]]:
            # Rounded up to milliseconds: a pass just before a deadline would find nothing to do.
            wait = None if timeout is None else math.ceil(max(0, timeout) * 1000) / 1000
            try:
                return self._epoll.poll(wait, self._count or 1)
            except InterruptedError:
                return []

        def _is_known(self, fd: int) -> bool:
            return 0 <= fd < len(self._events) and self._events[fd] > 0

        def _known(self, fileobj: Any) -> int:
            fd = _number_of(fileobj)
            if not self._is_known(fd):
                raise KeyError(f"descriptor {fd} is not registered")
            return fd

        def _note(self, fd: int, events: int, data: Any) -> None:
            self._count += (events > 0) - (self._events[fd] > 0)
            self._events[fd] = events
            self._data[fd] = data

        def _key(self, fd: int) -> selectors.SelectorKey:
            return selectors.SelectorKey(fd, fd, self._events[fd], self._data[fd])

    def _number_of(fileobj: Any) -> int:
        return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())

    DefaultSelector: type[selectors.BaseSelector] = Epoll
else:
    DefaultSelector = selectors.DefaultSelector


def ready_of(selector: selectors.BaseSelector) -> Callable[[float | None], Ready]:
    """Return the function that polls `selector`: called with a timeout in seconds, it returns what is ready."""
    own: Callable[[float | None], Ready] | None = getattr(selector, "ready", None)
    return own or (lambda timeout: [(key.data, mask) for key, mask in selector.select(timeout)])
