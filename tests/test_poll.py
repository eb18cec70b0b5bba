"""The selector is the standard library's, only faster."""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import time

import pytest

from reqtable.core.states import READ, WRITE
from reqtable.engine.poll import DefaultSelector


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
        assert said[0] == said[1] == {("reads", READ), ("writes", WRITE), ("both", READ | WRITE)}
        for each in (writes, both, reads):
            own.unregister(each)
        assert own.select(0) == []
        assert copy.recv(1) == b"x"
        begun = time.monotonic()
        assert own.select(0.02) == own.select(0) == own.select(-1) == []
        assert time.monotonic() - begun >= 0.02
