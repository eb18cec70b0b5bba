"""The selector: where there is epoll(7), one that keeps less for each descriptor than `selectors.EpollSelector`."""

from __future__ import annotations

import contextlib
import math
import select
import selectors
from collections.abc import Callable, Mapping
from typing import Any

from reqtable.table.states import READ, WRITE

Ready = list[tuple[Any, int]]  # the data of each descriptor that is ready, and for what it is

if hasattr(select, "epoll"):
    _EVENTS = (0, select.EPOLLIN, select.EPOLLOUT, select.EPOLLIN | select.EPOLLOUT)  # by our bits
    # What has gone wrong with a descriptor, whoever waits for it learns by using it.
    _MASKS = {select.EPOLLIN: READ, select.EPOLLOUT: WRITE}

    class Epoll(selectors.BaseSelector):
        """Descriptors are small numbers, and used again: lists by number take a tenth of what a dict of keys does.

        What an exception (Ctrl-C) has interrupted between the kernel and the note of it here can be done again.
        """

        def __init__(self) -> None:
            self._epoll = select.epoll()
            self._data: list[Any] = []
            self._events = bytearray()  # 0: it is not registered
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
            with contextlib.suppress(OSError):  # it was closed
                self._epoll.unregister(fd)
            self._note(fd, 0, None)
            return key

        def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            fd = self._known(fileobj)
            self._epoll.modify(fd, _EVENTS[events])
            self._note(fd, events, data)
            return self._key(fd)

        def ready(self, timeout: float | None = None) -> Ready:
            """What is ready; a failed or a hung-up descriptor is ready for both. Waits `timeout` seconds at most."""
            events, data = self._events, self._data
            # The kernel goes on telling of a descriptor that was closed while a duplicate of it is open.
            return [(data[fd], _MASKS.get(event, READ | WRITE)) for fd, event in self._poll(timeout) if events[fd]]

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            told = [(fd, event) for fd, event in self._poll(timeout) if self._events[fd]]
            return [(self._key(fd), _MASKS.get(event, READ | WRITE)) for fd, event in told]

        def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
            return {fd: self._key(fd) for fd, events in enumerate(self._events) if events}

        def close(self) -> None:
            self._epoll.close()

        def _poll(self, timeout: float | None) -> list[tuple[int, int]]:
            # milliseconds: rounded up, because a pass before a deadline is one too many
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
    """What polls that selector for as many seconds, and gives the data of what is ready."""
    own: Callable[[float | None], Ready] | None = getattr(selector, "ready", None)
    return own or (lambda timeout: [(key.data, mask) for key, mask in selector.select(timeout)])
