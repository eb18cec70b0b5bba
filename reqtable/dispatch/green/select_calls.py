"""`select`, `selectors` and `time.sleep`, for blocking handlers under `suspend_all_sockets`.

Each function first looks, without waiting, whether a descriptor is ready. If none is, a private epoll(7) object watches
them all, and the loop watches that object: the descriptors may be many, and may be watched for events that the loop
does not know. So on a system without epoll, `select` and the like block as ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import threading
import time
from collections.abc import Callable, Mapping
from operator import index
from typing import Any

from reqtable.dispatch.green.handler import suspend, suspending
from reqtable.dispatch.green.replacements import REPLACEMENTS, replaces
from reqtable.dispatch.green.waiting import DescriptorsReady, Patience, Watch, sleep
from reqtable.net.poll_only import PollOnly
from reqtable.table.engine_wants import TURN
from reqtable.table.states import READ, WRITE

_SHOWN_MAX = 4  # how many descriptors a listing shows
_PAUSE_S = 0.01


def _may_wait(timeout: Any) -> bool:
    """Return whether a call with this timeout waits. False if it is not a timeout: what is replaced says so."""
    return timeout is None or (isinstance(timeout, int | float) and timeout > 0)


@replaces(time, "sleep")
def _sleep(transport: PollOnly, before: Any, seconds: Any) -> None:
    if isinstance(seconds, int | float) and 0 < seconds < threading.TIMEOUT_MAX:
        sleep(transport, seconds)
        return
    before(seconds)  # raises for what is no time
    suspend(TURN)  # as `time.sleep(0)` lets other threads run


def _until_ready(
    transport: PollOnly, timeout_s: float | None, look: Callable[[], Any], wait: Callable[[float | None], None]
) -> Any:
    """Call `look` until it finds something or the time is over, and `wait` in between. Returns what `look` returned.

    `wait` gets the seconds that are left, and raises TimeoutError.
    """
    patience = Patience(transport, timeout_s)
    is_first = True
    while True:
        found = look()
        if any(found):
            return found
        try:
            if not is_first:  # epoll also reports errors that nobody asked for, again and again
                sleep(transport, min(patience.left() or _PAUSE_S, _PAUSE_S))
            wait(patience.left())
        except TimeoutError:
            return look()
        is_first = False


def _number(fileobj: Any) -> int:
    return index(fileobj if hasattr(fileobj, "__index__") else fileobj.fileno())


if hasattr(select, "epoll"):
    _Epoll = select.epoll

    def _wait_for(transport: PollOnly, what: str, events: Mapping[int, int], timeout_s: float | None) -> None:
        """Suspend until one of the descriptors is ready for its events. Raises TimeoutError."""
        numbers = tuple(events)
        shown = ", ".join(map(str, numbers[:_SHOWN_MAX])) + (", …" if len(numbers) > _SHOWN_MAX else "")
        with _Epoll() as epoll:
            for fd, wanted in events.items():
                with contextlib.suppress(PermissionError):  # a file on a disk: it is ready now, or never
                    epoll.register(fd, wanted)
            watch = Watch(transport, os.dup(epoll.fileno()), numbers)
        watch.wait(READ, DescriptorsReady(f"{what} (fd {shown})"), timeout_s)

    def _wait_for_epoll(transport: PollOnly, epoll: Any, timeout_s: float | None) -> None:
        """Suspend until the handler's own epoll object has an event. Raises TimeoutError."""
        fd = epoll.fileno()
        Watch(transport, os.dup(fd)).wait(READ, DescriptorsReady(f"epoll (fd {fd})"), timeout_s)

    @replaces(select, "select")
    def _select(transport: PollOnly, before: Any, rlist: Any, wlist: Any, xlist: Any, timeout: Any = None) -> Any:
        if not _may_wait(timeout):
            return before(rlist, wlist, xlist, timeout)
        lists = list(rlist), list(wlist), list(xlist)

        def wait(timeout_s: float | None) -> None:
            events: dict[int, int] = {}
            for each, kind in zip(lists, (select.EPOLLIN, select.EPOLLOUT, select.EPOLLPRI), strict=True):
                for fileobj in each:
                    fd = _number(fileobj)
                    events[fd] = events.get(fd, 0) | kind
            if not events and timeout_s is not None:
                sleep(transport, timeout_s)
            else:
                _wait_for(transport, "select", events, timeout_s)

        return _until_ready(transport, timeout, lambda: before(*lists, 0), wait)

    class Poll:
        """Stands in for what `select.poll()` returns: waiting in its `poll` suspends the request."""

        def __init__(self, poll: Any) -> None:
            self._poll = poll
            self._events: dict[int, int] = {}

        def register(self, fd: Any, eventmask: int = select.POLLIN | select.POLLPRI | select.POLLOUT) -> None:
            self._poll.register(fd, eventmask)
            self._events[_number(fd)] = eventmask

        def modify(self, fd: Any, eventmask: int) -> None:
            self._poll.modify(fd, eventmask)
            self._events[_number(fd)] = eventmask

        def unregister(self, fd: Any) -> None:
            self._poll.unregister(fd)
            del self._events[_number(fd)]

        def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
            """Wait for events; `timeout` is in milliseconds. None or a negative number: for ever."""
            if isinstance(timeout, int | float) and timeout < 0:
                timeout = None
            transport = suspending() if _may_wait(timeout) else None
            if transport is None:
                return self._poll.poll(timeout)  # type: ignore[no-any-return]
            return _until_ready(  # type: ignore[no-any-return]
                transport,
                None if timeout is None else timeout / 1000,
                lambda: self._poll.poll(0),
                lambda left: _wait_for(transport, "poll", self._events, left),  # the numbers are those of epoll(7)
            )

    @replaces(select, "poll")
    def _poll(transport: PollOnly, before: Any) -> Poll:
        return Poll(before())

    class EpollObject:
        """Stands in for an object of `select.epoll`: waiting in its `poll` suspends the request."""

        def __init__(self, epoll: Any) -> None:
            self._epoll = epoll

        def __getattr__(self, name: str) -> Any:
            return getattr(self._epoll, name)

        def __enter__(self) -> EpollObject:
            self._epoll.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self._epoll.close()

        def poll(self, timeout: float | None = None, maxevents: int = -1) -> Any:
            if isinstance(timeout, int | float) and timeout < 0:
                timeout = None
            transport = suspending() if _may_wait(timeout) else None
            if transport is None:
                return self._epoll.poll(timeout, maxevents)
            return _until_ready(
                transport,
                timeout,
                lambda: self._epoll.poll(0, maxevents),
                lambda left: _wait_for_epoll(transport, self._epoll, left),
            )

    class EpollClass:
        """Stands in for the class `select.epoll`. Outside a blocking handler it makes the original's objects."""

        def __init__(self, before: Any) -> None:
            self._before = before

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            made = self._before(*args, **kwargs)
            return made if suspending() is None else EpollObject(made)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._before, name)

        def __instancecheck__(self, instance: object) -> bool:
            return isinstance(instance, self._before | EpollObject)

    REPLACEMENTS.add(select, "epoll", EpollClass)

    def _selected(transport: PollOnly, before: Any, selector: Any, timeout: Any = None) -> Any:
        """Do what the `select` of a selector of `selectors` does."""
        if not _may_wait(timeout):
            return before(selector, timeout)

        def wait(timeout_s: float | None) -> None:
            if isinstance(selector, selectors.EpollSelector):
                _wait_for_epoll(transport, selector, timeout_s)
                return
            kinds = select.EPOLLIN, select.EPOLLOUT
            events = {
                key.fd: sum(kind for bit, kind in zip((READ, WRITE), kinds, strict=True) if key.events & bit)
                for key in selector.get_map().values()
            }
            _wait_for(transport, "select", events, timeout_s)

        return _until_ready(transport, timeout, lambda: before(selector, 0), wait)

    for _kind in (selectors.SelectSelector, selectors.PollSelector, selectors.EpollSelector):
        replaces(_kind, "select")(_selected)
