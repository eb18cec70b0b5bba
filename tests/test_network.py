"""An engine can't tell simulated sockets from the kernel's. The tests compare both, call by call."""

from __future__ import annotations

import errno
import select
import selectors
import socket
from pathlib import Path
from typing import Any

import pytest

from reqtable.loop.platform import SYSTEM
from reqtable.testing import FakeClock, Faults, SimNetwork, SimSelector
from reqtable.testing.sockets import SimSocket

ANY = ("127.0.0.1", 0)


@pytest.fixture
def network() -> SimNetwork:
    return SimNetwork(faults=Faults.none())


def connected_in_memory() -> tuple[socket.socket, socket.socket]:
    return SimNetwork(faults=Faults.none()).pair()


def connected_by_tcp() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(ANY) as listening:
        far = socket.create_connection(listening.getsockname())
        near, _ = listening.accept()
    for each in (near, far):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def settle(near: socket.socket, far: socket.socket, name: str) -> None:
    """Wait until the effect of a call has arrived, on loopback or on the simulated network."""
    own, other = (near, far) if name.startswith("near") else (far, near)
    if isinstance(near, SimSocket):
        near.network.happen()
    elif name.endswith(("send", "sendall", "shutdown", "close")):
        # at the other end; or it comes back, as a reset
        poll = select.poll()
        for each in (own, other):
            if each.fileno() >= 0:
                poll.register(each, select.POLLIN | select.POLLRDHUP if each is other else 0)
        poll.poll(1000)


# What is done with the two ends of a connection, one call after the other.
DIALOGUES: dict[str, list[tuple[Any, ...]]] = {
    "bytes come as they were sent": [
        ("far.send", b"one two"),
        ("near.recv", 3),
        ("near.recv", 100),
        ("near.recv", 100),
        ("near.send", b"answer"),
        ("far.recv", 100),
    ],
    "looking is not taking": [
        ("far.send", b"one"),
        ("near.recv", 1, socket.MSG_PEEK),
        ("near.recv", 10, socket.MSG_PEEK | socket.MSG_DONTWAIT),
        ("near.recv", 10),
        ("near.recv", 1, socket.MSG_PEEK),
    ],
    "an end of file is for ever, and the other direction goes on": [
        ("far.send", b"last"),
        ("far.shutdown", socket.SHUT_WR),
        ("near.recv", 100),
        ("near.recv", 100),
        ("near.recv", 100),
        ("near.send", b"answer"),
        ("far.recv", 100),
        ("far.send", b"more"),
        ("near.shutdown", socket.SHUT_WR),
        ("far.recv", 100),
    ],
    "closing is an end of file": [
        ("far.send", b"bye"),
        ("far.close",),
        ("near.recv", 100),
        ("near.recv", 100),
    ],
    "closing with unread input is a reset": [
        ("near.send", b"never read"),
        ("far.recv", 1, socket.MSG_PEEK),  # it has come
        ("far.close",),
        ("near.recv", 100),
        ("near.recv", 100),
        ("near.send", b"x"),
        ("near.shutdown", socket.SHUT_WR),
    ],
    "what comes after closing is answered by a reset": [
        ("far.close",),
        ("near.recv", 100),
        ("near.send", b"to nobody"),
        ("near.send", b"again"),
    ],
    "a reset is told once": [
        ("far.setsockopt", socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"),
        ("far.close",),
        ("near.recv", 100),
        ("near.recv", 100),
        ("near.send", b"x"),
    ],
    "what came before a reset can still be read": [
        ("far.send", b"in time"),
        ("near.recv", 1, socket.MSG_PEEK),
        ("far.setsockopt", socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"),
        ("far.close",),
        ("near.recv", 100),
        ("near.recv", 100),
    ],
    "a reset is told to who sends": [
        ("far.setsockopt", socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"),
        ("far.close",),
        ("near.send", b"x"),
        ("near.send", b"x"),
        ("near.recv", 100),
    ],
    "nothing is sent after one's own end": [
        ("near.shutdown", socket.SHUT_WR),
        ("near.send", b"x"),
        ("far.recv", 10),
    ],
    "a closed socket is no socket": [
        ("near.close",),
        ("near.recv", 1),
        ("near.send", b"x"),
        ("near.fileno",),
        ("near.getsockname",),
    ],
    "blocking calls": [
        ("near.setblocking", True),
        ("far.send", b"line one\nline two\n"),
        ("near.recv_into", bytearray(8)),
        ("near.sendall", b"all of it"),
        ("far.recv", 100),
    ],
    "nothing to send": [
        ("near.send", b""),
        ("far.recv", 10),
    ],
    "buffers of other kinds": [
        ("near.send", memoryview(b"view")),
        ("near.send", bytearray(b"array")),
        ("far.recv", 100),
    ],
}


def outcome(near: socket.socket, far: socket.socket, name: str, *args: Any) -> Any:
    whose, _, call = name.partition(".")
    try:
        return getattr(near if whose == "near" else far, call)(*args)
    except OSError as error:
        return type(error).__name__, error.errno


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_they_answer_as_the_kernel_does(dialogue: str) -> None:
    outcomes = []
    for connect in (connected_by_tcp, connected_in_memory):
        near, far = connect()
        with near, far:
            near.setblocking(False)
            far.setblocking(False)
            found = []
            for call in DIALOGUES[dialogue]:
                found.append(outcome(near, far, *call))
                if call[1:] != (b"",):
                    settle(near, far, call[0])
            outcomes.append(found)
    assert outcomes[1] == outcomes[0]


def test_a_full_buffer_blocks_until_there_is_room(network: SimNetwork) -> None:
    near, far = network.pair()
    near.setblocking(False)
    sent = near.send(bytes(1_000_000))
    assert 0 < sent < 1_000_000
    with pytest.raises(BlockingIOError):
        near.send(b"x")
    assert far.recv(10) == bytes(10)
    assert near.send(bytes(100)) == 10


def test_a_blocking_call_lets_time_pass(network: SimNetwork) -> None:
    near, far = network.pair()
    network.after(5, far.send, b"late")
    assert near.recv(10) == b"late"
    assert network.clock.now == 1005
    near.settimeout(3)
    with pytest.raises(TimeoutError, match="timed out"):
        near.recv(10)
    assert network.clock.now == 1008
    near.settimeout(None)
    with pytest.raises(TimeoutError, match="waits for something that never comes"):
        near.recv(10)


def test_descriptors_are_used_again_and_run_out() -> None:
    network = SimNetwork(faults=Faults.none(), descriptors_max=2)
    first, second = network.socket(), network.socket()
    number = first.fileno()
    with pytest.raises(OSError, match="Too many open files") as refused:
        network.socket()
    assert refused.value.errno == errno.EMFILE
    first.close()
    assert network.socket().fileno() == number
    assert second.fileno() != number
    with pytest.raises(OSError, match="Bad file descriptor"):
        network.file(number + 2)


def test_addresses_are_taken_once(network: SimNetwork) -> None:
    one, other = network.socket(), network.socket()
    one.bind(ANY)
    assert one.getsockname()[1] > 0
    with pytest.raises(OSError, match="Address already in use"):
        other.bind(one.getsockname())
    one.close()
    other.bind(("127.0.0.1", 40_000))


def test_a_connection_waits_to_be_accepted(network: SimNetwork) -> None:
    listening = network.socket()
    listening.bind(ANY)
    listening.listen(1)
    listening.setblocking(False)
    with pytest.raises(BlockingIOError):
        listening.accept()
    ends: list[Any] = []
    for port in range(4):
        network.connect(listening.getsockname(), ("198.51.100.1", port), ends.append)
    assert len(ends) == 2  # a backlog of one holds two; the others try again in a second
    accepted, peer = listening.accept()
    assert peer == ("198.51.100.1", 0) == accepted.getpeername()
    network.clock.jump(1)
    network.happen()
    assert len(ends) == 3
    listening.close()
    network.clock.jump(2)
    network.happen()
    assert ends[3] is None
    assert ends[1].is_broken


def test_the_selector_reports_what_is_ready_and_lets_time_pass(network: SimNetwork) -> None:
    selector = SimSelector(network)
    near, far = network.pair()
    selector.register(near.fileno(), selectors.EVENT_READ, "near")
    assert selector.select(2) == []
    assert network.clock.now == pytest.approx(1002)
    network.after(1, far.send, b"x")
    [(key, mask)] = selector.select(10)
    assert (key.data, mask) == ("near", selectors.EVENT_READ)
    assert network.clock.now == pytest.approx(1003)
    selector.modify(near.fileno(), selectors.EVENT_READ | selectors.EVENT_WRITE, "near")
    assert selector.select(0)[0][1] == 3
    near.close()
    with pytest.raises(RuntimeError, match="was closed while the selector watched it for 'near'"):
        selector.select(0)


@pytest.mark.parametrize("wrong", [0, 16])
def test_the_selector_refuses_what_others_refuse(network: SimNetwork, wrong: int) -> None:
    selector = SimSelector(network)
    near, _ = network.pair()
    with pytest.raises(ValueError, match="invalid events"):
        selector.register(near, wrong)
    selector.register(near, 1)
    with pytest.raises(KeyError, match="already registered"):
        selector.register(near, 1)
    selector.unregister(near)
    with pytest.raises(KeyError, match="not registered"):
        selector.unregister(near)
    with pytest.raises(RuntimeError, match="for ever"):
        selector.select(None)


def test_nothing_of_it_is_real(network: SimNetwork, tmp_path: Path) -> None:
    """Sending a file never passes a simulated descriptor to the kernel's sendfile."""
    (tmp_path / "file").write_bytes(b"0123456789")
    near, far = network.pair()
    with (tmp_path / "file").open("rb") as file:
        assert network.system.sendfile(near.fileno(), file.fileno(), 3, 4) == 4
        assert network.system.sendfile(near.fileno(), file.fileno(), 10, 4) == 0
    assert far.recv(100) == b"3456"
    with network.installed() as system:
        assert SYSTEM.get() is system is network.system
    assert SYSTEM.get() is not network.system


def test_a_clock_of_ones_own() -> None:
    clock = FakeClock(5.0)
    assert SimNetwork(clock=clock).system.clock() == 5.0


def test_datagrams(network: SimNetwork) -> None:
    one, other = (network.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    one.bind(ANY)
    other.bind(ANY)
    one.setblocking(False)
    with pytest.raises(BlockingIOError):
        one.recvfrom(100)
    assert other.sendto(b"too long", one.getsockname()) == 8
    assert one.recvfrom(3) == (b"too", other.getsockname())  # the rest of a datagram is cut off
    with pytest.raises(BlockingIOError):
        one.recvfrom(100)
    assert one.sendto(b"to nobody", ("127.0.0.1", 9)) == 9


def test_unix_datagrams_are_refused_and_wait(network: SimNetwork) -> None:
    one, other = (network.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
    one.bind("/one")
    with pytest.raises(ConnectionRefusedError):
        other.sendto(b"x", "/nowhere")
    other.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            other.sendto(b"x", "/one")
            network.happen()
            sent += 1
    assert sent == 11
