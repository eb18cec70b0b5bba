"""Our selector does the same as the standard library's, only faster."""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import time

import pytest

from reqtable.loop.selector import DefaultSelector, ready_of
from reqtable.table.states import READ, WRITE


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
        said += [set(ready_of(selector)(0) + ready_of(selector)(0)) for selector in (own, plain)]
        assert said == [{("reads", READ), ("writes", WRITE), ("both", READ | WRITE)}] * 4
        for each in (writes, both, reads):
            own.unregister(each)
        assert own.select(0) == []
        assert copy.recv(1) == b"x"
        begun = time.monotonic()
        assert own.select(0.02) == own.select(0) == own.select(-1) == []
        assert time.monotonic() - begun >= 0.02


def test_what_is_registered_is_known_by_its_number_as_in_the_standard_librarys() -> None:
    near, far = socket.socketpair()
    with near, far, DefaultSelector() as own, selectors.DefaultSelector() as plain:
        for selector in (own, plain):
            key = selector.register(near, READ, "first")
            assert (key.fd, key.events, key.data) == (near.fileno(), READ, "first")
            with pytest.raises(KeyError):
                selector.register(near.fileno(), WRITE)
            with pytest.raises(ValueError, match="events"):
                selector.register(far, READ | WRITE | 4)
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
