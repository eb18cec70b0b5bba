"""What a channel does with the descriptors that it hands on: this process's copies never stay open."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from reqtable.handover import messages
from reqtable.handover.channel import Channel, receive_packet
from reqtable.server.engine import Engine


@pytest.fixture
def pair() -> Iterator[tuple[Engine, Channel, socket.socket]]:
    """Yield an engine, a channel of it, and the other end."""
    engine = Engine()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(engine.loop.poller, ours, lambda *_: None, lambda: None)
    yield engine, channel, theirs
    channel.close()
    theirs.close()
    engine.close()


def ends() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_what_is_handed_on_is_closed_here_and_open_there(pair: Any) -> None:
    _, channel, theirs = pair
    given, kept = ends()
    channel.hand_on(messages.Give(1), [given])
    assert given.fileno() == -1
    _, [number] = receive_packet(theirs)
    with socket.socket(fileno=number) as other, kept:
        other.send(b"here")
        assert kept.recv(10) == b"here"


@pytest.mark.parametrize("how", ["is gone", "is closed"])
def test_what_can_not_be_handed_on_is_closed(pair: Any, how: str) -> None:
    _, channel, theirs = pair
    if how == "is gone":
        theirs.close()
    else:
        channel.close()
    given, kept = ends()
    channel.hand_on(messages.Give(1), [given])
    with kept:
        assert given.fileno() == -1
        assert kept.recv(10) == b""


def test_what_waits_to_be_handed_on_is_closed_with_the_channel(pair: Any) -> None:
    _, channel, _ = pair
    channel.send(messages.Abort("x" * 5_000_000))  # more than the kernel takes
    given, kept = ends()
    channel.hand_on(messages.Give(1), [given])
    with kept:
        kept.setblocking(False)
        with pytest.raises(BlockingIOError):  # the channel has a copy
            kept.recv(10)
        channel.close()
        assert kept.recv(10) == b""
