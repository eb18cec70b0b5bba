"""Our selector does the same as the standard library's, only faster."""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import time
from typing import Any

import pytest

import reqtable
from reqtable.loop.selector import NOBODY, DefaultSelector, Epoll, Poll, polling_of
from reqtable.table.states import PEER_END, READ, RESET, WRITE


def ready(selector: selectors.BaseSelector, seconds: float = 0) -> list[tuple[Any, int]]:
    """Return the targets that the loop would call after a poll, and what they are ready for."""
    poll, targets, masks = polling_of(selector)
    return [(targets[place], masks[event]) for place, event in poll(seconds) if targets[place] is not NOBODY]


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="this platform has no epoll")
def test_epoll_says_what_the_standard_librarys_says_and_overlooks_what_it_overlooks() -> None:
    with contextlib.ExitStack() as stack:
        own, plain = stack.enter_context(DefaultSelector()), stack.enter_context(selectors.EpollSelector())
        pairs = [socket.socketpair() for _ in range(4)]
        for pair in pairs:
            for each in pair:
                stack.enter_context(each)
        (reads, peer), (writes, _), (both, other), (gone, left) = pairs
        copy = stack.enter_context(gone.dup())
        for selector in (own, plain):
            selector.register(reads, READ, "reads")
            selector.register(writes, WRITE, "writes")
            selector.register(both, READ | WRITE, "both")
            selector.register(gone, READ, "gone")
        peer.send(b"x")
        other.close()
        left.send(b"x")
        number = gone.fileno()
        gone.close()
        for selector in (own, plain):
            selector.unregister(number)  # too late for the kernel, for which `copy` is the same
        said = [{(key.data, mask) for key, mask in selector.select(0)} for selector in (own, plain)]
        # the kernel tells of so many at once, `gone` among them, and of the others the next time
        said += [set(ready(selector) + ready(selector)) for selector in (own, plain)]
        found = {("reads", READ), ("writes", WRITE), ("both", READ | WRITE)}
        assert said[1] == found
        found = found - {("both", READ | WRITE)} | {("both", READ | WRITE | PEER_END)}  # only ours tells why
        assert [said[0], *said[2:]] == [found, found, said[1]]
        for each in (writes, both, reads):
            own.unregister(each)
        assert own.select(0) == []
        assert copy.recv(1) == b"x"
        begun = time.monotonic()
        assert own.select(0.02) == own.select(0) == own.select(-1) == []
        assert time.monotonic() - begun >= 0.02


@pytest.mark.parametrize("kind", [DefaultSelector, Poll])
def test_what_is_registered_is_known_by_its_number_as_in_the_standard_librarys(
    kind: type[selectors.BaseSelector],
) -> None:
    near, far = socket.socketpair()
    with near, far, kind() as own, selectors.DefaultSelector() as plain:
        for selector in (own, plain):
            key = selector.register(near, READ, "first")
            assert (key.fd, key.events, key.data) == (near.fileno(), READ, "first")
            with pytest.raises(KeyError):
                selector.register(near.fileno(), WRITE)
            with pytest.raises(ValueError, match="events"):
                selector.register(far, 16)
            if kind is DefaultSelector:  # poll(2) tells of such a descriptor when it polls
                with pytest.raises(OSError if selector is own else (OSError, ValueError)):
                    selector.register(10**6, READ)
            selector.modify(near, WRITE, "second")
            assert [(key.data, mask) for key, mask in selector.select(0)] == [("second", WRITE)]
            assert [(fd, key.events, key.data) for fd, key in selector.get_map().items()] == [
                (near.fileno(), WRITE, "second")
            ]
            assert selector.unregister(near).data == "second"
            for unknown in (near, far, 10**6):
                with pytest.raises(KeyError):
                    selector.unregister(unknown)
                with pytest.raises(KeyError):
                    selector.modify(unknown, READ)
            assert not selector.get_map()
            assert selector.select(0) == []


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="this platform has no epoll")
@pytest.mark.parametrize("method", ["register", "modify", "unregister"])
def test_what_an_exception_has_interrupted_can_be_done_again(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    near, far = socket.socketpair()
    with near, far, DefaultSelector() as own:
        events = () if method == "unregister" else (WRITE,)
        if method != "register":
            own.register(near, READ)
        with monkeypatch.context() as patch:
            patch.setattr(own, "_note", interrupt)
            with pytest.raises(KeyboardInterrupt):
                getattr(own, method)(near, *events)
        getattr(own, method)(near, *events)
        assert [mask for _, mask in own.select(0)] == list(events)
        assert [key.events for key in own.get_map().values()] == list(events)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        return listener.accept()[0], far


def reset(far: socket.socket) -> None:
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    far.close()


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="this platform has no epoll")
@pytest.mark.parametrize("events", [READ, WRITE])
def test_what_a_poll_has_reported_reaches_no_target_that_has_the_number_by_then(events: int) -> None:
    near, far = socket.socketpair()
    with near, far, Epoll() as own:
        own.register(near, READ, "first")
        far.send(b"x")
        poll, targets, masks = polling_of(own)
        [(place, event)] = poll(0)
        assert (targets[place], masks[event]) == ("first", READ)
        own.unregister(near)
        assert targets[place] is NOBODY
        key = own.register(near, READ, "second")
        own.modify(near, events, "third")
        assert targets[place] is NOBODY
        assert (key.data, own.get_map()[near.fileno()].data) == ("second", "third")
        assert [(targets[place], masks[event]) for place, event in poll(0)] == [("third", events)]
        assert own.unregister(near).data == "third"
        own.register(near, READ, "fourth")
        assert own.unregister(near).data == "fourth", "before a poll"
        assert poll(0) == []
        assert targets[place] is NOBODY


OWN = [Epoll, Poll]


@pytest.mark.parametrize("kind", OWN)
def test_a_reset_is_told_from_an_end_and_from_what_can_be_read(kind: type[selectors.BaseSelector]) -> None:
    near, far = tcp_pair()
    with near, far, kind() as own:
        own.register(near, RESET, "near")
        far.send(b"x")
        far.shutdown(socket.SHUT_WR)
        assert own.select(0) == []
        own.modify(near, RESET | PEER_END, "near")
        assert ready(own, 5) == [("near", READ | PEER_END)]
        own.modify(near, RESET, "near")
        assert own.select(0) == []
        near.shutdown(socket.SHUT_WR)
        assert ready(own, 5) == [("near", READ | WRITE | PEER_END)], "both sides have ended"
    near, far = tcp_pair()
    with near, far, kind() as own:
        own.register(near, RESET, "near")
        reset(far)
        assert ready(own, 5) == [("near", READ | WRITE | RESET)]
        own.unregister(near)
        assert own.select(0) == []


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("unread", [False, True])
def test_a_unix_peer_that_closes_has_reset_only_what_it_left_unread(
    kind: type[selectors.BaseSelector], unread: bool
) -> None:
    near, far = socket.socketpair()
    with near, far, kind() as own:
        if unread:
            near.send(b"x")
        own.register(near, RESET, "near")
        far.close()
        assert ready(own) == [("near", READ | WRITE | (RESET if unread else PEER_END))]


def test_poll_overlooks_no_descriptor_that_was_closed() -> None:
    near, far = socket.socketpair()
    with near, far, Poll() as own:
        own.register(near, READ, "near")
        number = near.fileno()
        near.close()
        assert ready(own) == [("near", READ | WRITE)]
        own.unregister(number)
        assert own.select(0) == []


def test_a_poll_for_a_deadline_lasts_a_day_at_most() -> None:
    with contextlib.closing(reqtable.Engine()) as engine:
        loop = engine.loop
        assert [loop._patience(most_s) for most_s in (None, 0.5, 1e9)] == [None, 0.5, 1e9]
        loop.steps.deadlines.soonest = loop.table.now + 2e9
        assert [loop._patience(most_s) for most_s in (None, 0.5, 1e9)] == [86_400, 0.5, 86_400]
