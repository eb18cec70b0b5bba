"""Our selectors. They can watch for a reset alone, and tell a reset from an end: those of `selectors` can't.

`Epoll` is the default selector. It takes less memory per descriptor than `selectors.EpollSelector`. `Poll` is for few
descriptors.
"""

from __future__ import annotations

import contextlib
import select
import selectors
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, Final

from reqtable.table.states import PEER_END, READ, RESET, WRITE

Ready = list[tuple[int, int]]  # for each ready descriptor: the place of its target in a list, and what was reported
# How the loop polls: a function, called with the most seconds to wait (None: no bound); the list of the targets; and
# what a target is ready for, by what was reported.
Polling = tuple[Callable[[float | None], Ready], list[Any], Mapping[int, int]]

_ALL: Final = READ | WRITE | RESET | PEER_END


def _translations(kind: str) -> tuple[list[int], dict[int, int]]:
    """Return the events to ask the kernel for, by interest, and what a descriptor is ready for, by reported events.

    `kind` is the prefix of the kernel's names: EPOLL or POLL. For the interest RESET the kernel is asked for nothing:
    it reports errors and hang-ups anyway.
    """
    reads, writes, failed, hung_up = (getattr(select, kind + name) for name in ("IN", "OUT", "ERR", "HUP"))
    ended = getattr(select, kind + "RDHUP", 0)
    asked = [
        (reads if interest & READ else 0) | (writes if interest & WRITE else 0) | (ended if interest & PEER_END else 0)
        for interest in range(_ALL + 1)
    ]
    masks = {}
    for events in product((0, reads), (0, writes), (0, ended), (0, failed), (0, hung_up)):
        reported = sum(set(events))
        if reported & failed:
            mask = READ | WRITE | RESET
        elif reported & hung_up:
            mask = READ | WRITE | PEER_END
        else:
            mask = (READ if reported & reads else 0) | (WRITE if reported & writes else 0)
            mask |= READ | PEER_END if reported & ended else 0
        masks[reported] = mask
    return asked, masks


class _Nobody:
    """Is the target of a descriptor that is not registered."""

    def on_ready(self, mask: int) -> None:
        """Do nothing: the descriptor was left in this pass, or the kernel knows a duplicate of it."""


NOBODY: Final = _Nobody()


def _number_of(fileobj: Any) -> int:
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())


def _no_interest(events: int) -> ValueError:
    return ValueError(f"events must be some of READ, WRITE, RESET and PEER_END, not {events!r}")


if hasattr(select, "epoll"):
    _EVENTS, _MASKS = _translations("EPOLL")

    class Epoll(selectors.BaseSelector):
        """Watches descriptors with epoll(7), and keeps their data in lists that are indexed by descriptor.

        Descriptors are small numbers and reused, so the lists take a tenth of the memory of a dict of keys. A newly
        registered target enters `_targets` with the next poll. So an event of this poll never reaches another target,
        to which the number belongs by then.

        An exception (Ctrl-C) may interrupt a method after the kernel's change. Then the method can be called again.
        """

        interests = _ALL

        def __init__(self) -> None:
            self._epoll = select.epoll()
            self._targets: list[Any] = []
            self._arrived: dict[int, Any] = {}  # by descriptor: the data that has been registered since the last poll
            self._events = bytearray()  # 0: not registered

        def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            fd = fileobj if type(fileobj) is int else _number_of(fileobj)
            if not 0 < events <= _ALL:
                raise _no_interest(events)
            if 0 <= fd < len(self._events) and self._events[fd]:
                raise KeyError(f"descriptor {fd} is registered already")
            try:
                self._epoll.register(fd, _EVENTS[events])
            except FileExistsError:
                self._epoll.modify(fd, _EVENTS[events])
            more = fd + 1 - len(self._targets)
            if more > 0:
                self._targets += [NOBODY] * more
                self._events += bytes(more)
            self._note(fd, events, data)
            return selectors.SelectorKey(fd, fd, events, data)

        def unregister(self, fileobj: Any) -> selectors.SelectorKey:
            fd = self._known(fileobj)
            key = self._key(fd)
            with contextlib.suppress(OSError):  # the descriptor was closed
                self._epoll.unregister(fd)
            self._note(fd, 0)
            return key

        def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            fd = self._known(fileobj)
            self._epoll.modify(fd, _EVENTS[events])
            self._note(fd, events, data)
            return self._key(fd)

        def ready(self, timeout: float | None = None) -> Ready:
            """Wait at most `timeout` seconds, which are not negative. Returns the descriptors that are ready.

            The timeout is rounded up to milliseconds: a pass just before a deadline would find nothing to do.
            """
            if self._arrived:
                for fd, data in self._arrived.items():
                    self._targets[fd] = data
                self._arrived.clear()
            return self._epoll.poll(timeout)

        def polling(self) -> Polling:
            """Return how the loop polls this selector."""
            return self.ready, self._targets, _MASKS

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            ready = self.ready(None if timeout is None else max(0, timeout))
            # The kernel still reports a closed descriptor while a duplicate of it is open.
            return [(self._key(fd), _MASKS[event]) for fd, event in ready if self._events[fd]]

        def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
            return {fd: self._key(fd) for fd, events in enumerate(self._events) if events}

        def fileno(self) -> int:
            """Return the descriptor of the selector itself, which another selector can poll."""
            return self._epoll.fileno()

        def close(self) -> None:
            self._epoll.close()

        def _is_known(self, fd: int) -> bool:
            return 0 <= fd < len(self._events) and self._events[fd] > 0

        def _known(self, fileobj: Any) -> int:
            fd = _number_of(fileobj)
            if not self._is_known(fd):
                raise KeyError(f"descriptor {fd} is not registered")
            return fd

        def _note(self, fd: int, events: int, data: Any = NOBODY) -> None:
            if events:
                self._arrived[fd] = data
            else:
                self._arrived.pop(fd, None)
                self._targets[fd] = NOBODY
            self._events[fd] = events

        def _key(self, fd: int) -> selectors.SelectorKey:
            data = self._arrived[fd] if fd in self._arrived else self._targets[fd]
            return selectors.SelectorKey(fd, fd, self._events[fd], data)

    DefaultSelector: type[selectors.BaseSelector] = Epoll
else:
    DefaultSelector = selectors.DefaultSelector


if hasattr(select, "poll"):
    _POLL_EVENTS, _POLL_MASKS = _translations("POLL")

    class Poll(selectors.BaseSelector):
        """Watches a few descriptors with poll(2), which takes no descriptor of its own."""

        interests = _ALL

        def __init__(self) -> None:
            self._poll = select.poll()
            self._keys: dict[int, selectors.SelectorKey] = {}

        def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            fd = _number_of(fileobj)
            if not 0 < events <= _ALL:
                raise _no_interest(events)
            if fd in self._keys:
                raise KeyError(f"descriptor {fd} is registered already")
            return self._set(fd, events, data)

        def unregister(self, fileobj: Any) -> selectors.SelectorKey:
            key = self._known(fileobj)
            with contextlib.suppress(KeyError):  # an exception interrupted an earlier call
                self._poll.unregister(key.fd)
            return self._keys.pop(key.fd)

        def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            return self._set(self._known(fileobj).fd, events, data)

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            wait = None if timeout is None else max(0, timeout) * 1000  # rounded up to a whole number, as above
            try:
                told = self._poll.poll(wait)
            except InterruptedError:
                return []
            # An event that is not in the table is POLLNVAL: the descriptor is closed, and using it tells the error.
            return [(self._keys[fd], _POLL_MASKS.get(event, READ | WRITE)) for fd, event in told if fd in self._keys]

        def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
            return self._keys

        def _known(self, fileobj: Any) -> selectors.SelectorKey:
            fd = _number_of(fileobj)
            if fd not in self._keys:
                raise KeyError(f"descriptor {fd} is not registered")
            return self._keys[fd]

        def _set(self, fd: int, events: int, data: Any) -> selectors.SelectorKey:
            self._poll.register(fd, _POLL_EVENTS[events])  # also changes the events of a known descriptor
            key = self._keys[fd] = selectors.SelectorKey(fd, fd, events, data)
            return key

    SmallSelector: type[selectors.BaseSelector] = Poll
else:
    SmallSelector = selectors.DefaultSelector


def interests_of(selector: selectors.BaseSelector) -> int:
    """Return the interests that `selector` can watch for. Those of the standard library only know READ and WRITE."""
    return getattr(selector, "interests", READ | WRITE)


def polling_of(selector: selectors.BaseSelector) -> Polling:
    """Return how the loop polls `selector`."""
    own: Callable[[], Polling] | None = getattr(selector, "polling", None)
    if own is not None:
        return own()
    targets: list[Any] = []

    def ready(timeout: float | None) -> Ready:
        found = selector.select(timeout)
        targets[:] = [key.data for key, _ in found]
        return [(place, mask) for place, (_, mask) in enumerate(found)]

    return ready, targets, {mask: mask for mask in range(_ALL + 1)}
