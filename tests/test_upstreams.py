"""Outgoing connections on the simulated network: sockets that connect, what answers them, and names."""

from __future__ import annotations

import errno
import select
import selectors
import socket
from collections.abc import Callable
from typing import Any

import pytest

from reqtable.testing import Client, Faults, SimNetwork, SimSelector, Unmet, Upstream, UpstreamPeer

HERE = ("192.0.2.1", 80)
UPSTREAM = "tcp://192.0.2.1:80"
IN_PROGRESS = errno.EINPROGRESS


@pytest.fixture
def network() -> SimNetwork:
    return SimNetwork(faults=Faults.none(), latency_s=0.001)


def connecting(network: SimNetwork, address: Any = HERE, kind: int = socket.SOCK_STREAM) -> Any:
    own = network.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, kind)
    own.setblocking(False)
    assert own.connect_ex(address) == (0 if kind == socket.SOCK_DGRAM else IN_PROGRESS)
    return own


def wait(network: SimNetwork, own: Any, interest: int = selectors.EVENT_WRITE, timeout_s: float = 1000) -> int:
    """Wait as the engine does; returns for what the socket is ready."""
    selector = SimSelector(network)
    selector.register(own, interest)
    until = network.clock.now + timeout_s
    while network.clock.now < until:
        if ready := selector.select(until - network.clock.now):
            return ready[0][1]
    return 0


def error_of(own: Any) -> int:
    return own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # type: ignore[no-any-return]


def listen(network: SimNetwork, *args: Any, **kwargs: Any) -> list[UpstreamPeer]:
    peers: list[UpstreamPeer] = []
    Upstream(*args, **kwargs).listen(network, peers.append)
    return peers


# -- as the kernel does it -------------------------------------------------------------------------------------------


class Kernel:
    """Has the two places at which connections end, in the real kernel."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        with socket.create_server(("127.0.0.1", 0)) as gone:
            self.nobody = gone.getsockname()
        self.somebody = self.listening.getsockname()
        self.make: Callable[..., Any] = socket.socket

    def wait(self, own: Any) -> None:
        poll = select.poll()
        poll.register(own, select.POLLIN | select.POLLOUT)
        poll.poll(1000)

    def close(self) -> None:
        self.listening.close()


class Simulated(Kernel):
    def __init__(self) -> None:
        self.network = SimNetwork(faults=Faults.none(), latency_s=0.001)
        listen(self.network, UPSTREAM)
        self.somebody, self.nobody = HERE, ("192.0.2.1", 81)
        self.make = self.network.socket

    def wait(self, own: Any) -> None:
        wait(self.network, own, selectors.EVENT_READ | selectors.EVENT_WRITE, 1)

    def close(self) -> None:
        pass


CALLS: dict[str, list[Any]] = {
    "it is up": ["somebody", "wait", "error", "peer", "again", "again", "recv", "send"],
    "nobody listens": ["nobody", "wait", "peer", "error", "error", "recv", "send", "shutdown", "recv"],
    "the error is told once": ["nobody", "wait", "recv", "recv", "send"],
    "nothing is sent before": ["somebody", "wait", "shutdown", "send"],
}


def called(kernel: Kernel, own: Any, call: str, address: Any) -> Any:
    try:
        if call == "wait":
            return kernel.wait(own)
        if call == "error":
            return error_of(own)
        if call == "peer":
            return own.getpeername() == address
        if call == "again":
            return own.connect_ex(address)
        if call == "shutdown":
            return own.shutdown(socket.SHUT_WR)
        return own.send(b"x") if call == "send" else own.recv(10)
    except OSError as error:
        return type(error).__name__, error.errno


@pytest.mark.parametrize("name", CALLS)
def test_a_socket_that_connects_answers_as_the_kernels(name: str) -> None:
    first, *calls = CALLS[name]
    outcomes = []
    for kernel in (Kernel(), Simulated()):
        address = getattr(kernel, first)
        with kernel.make() as own:
            own.setblocking(False)
            outcomes.append([own.connect_ex(address), *(called(kernel, own, call, address) for call in calls)])
        kernel.close()
    assert outcomes[1] == outcomes[0]


def test_a_datagram_socket_that_connects_answers_as_the_kernels() -> None:
    calls = ["send", "wait", "recv", "recv", "send", "wait", "send", "error", "send", "wait", "error", "peer"]
    outcomes = []
    for kernel in (Kernel(), Simulated()):
        with kernel.make(socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.setblocking(False)
            if isinstance(kernel, Simulated):
                own.network.latency_s = 0.0

            found = [own.connect_ex(kernel.nobody)]
            for call in calls:
                if call == "wait":
                    refused(kernel, own)
                else:
                    found.append(called(kernel, own, call, kernel.nobody))
        outcomes.append(found)
        kernel.close()
    assert outcomes[1] == outcomes[0]


def refused(kernel: Kernel, own: Any) -> None:
    """Wait until the refusal of a datagram has come."""
    if isinstance(kernel, Simulated):
        kernel.network.happen()
        return
    poll = select.poll()
    poll.register(own, 0)  # errors are always reported
    assert poll.poll(1000)


def test_a_unix_socket_connects_at_once_or_not_at_all(network: SimNetwork) -> None:
    peers = listen(network, "unix:///run/db.sock", Client().send(b"hello"))
    own = network.socket(socket.AF_UNIX)
    own.setblocking(False)
    assert own.connect_ex("/nowhere") == errno.ECONNREFUSED
    assert own.connect_ex("/run/db.sock") == 0
    assert wait(network, own, selectors.EVENT_READ) == selectors.EVENT_READ
    assert own.recv(10) == b"hello"
    assert [repr(peer) for peer in peers] == ["upstream unix:///run/db.sock, connection 0"]


def test_a_full_queue_of_a_unix_socket(network: SimNetwork) -> None:
    listening = network.socket(socket.AF_UNIX)
    listening.bind("/full")
    listening.listen(0)
    first, second = network.socket(socket.AF_UNIX), network.socket(socket.AF_UNIX)
    for each in (first, second):
        each.setblocking(False)
    assert [each.connect_ex("/full") for each in (first, second)] == [0, errno.EAGAIN]


# -- what upstreams do -----------------------------------------------------------------------------------------------


def test_an_upstream_plays_its_script_with_each_connection(network: SimNetwork) -> None:
    peers = listen(network, UPSTREAM, lambda number: Client().expect(b"ask\n").send(b"%d\n" % number).expect_end())
    ours = [connecting(network) for _ in range(3)]
    with pytest.raises(BlockingIOError):
        ours[0].send(b"too early")
    for own in ours:
        assert wait(network, own) == selectors.EVENT_WRITE
        assert error_of(own) == 0
        own.send(b"ask\n")
    for number, own in enumerate(ours):
        assert wait(network, own, selectors.EVENT_READ) == selectors.EVENT_READ
        assert own.recv(10) == b"%d\n" % number
        own.close()
    network.settle()
    assert [(peer.is_done, peer.unmet, peer.received) for peer in peers] == [(True, "", b"ask\n")] * 3
    assert network.files == {}


def test_an_upstream_that_never_answers(network: SimNetwork) -> None:
    peers = listen(network, UPSTREAM, answers_after_s=None)
    own = connecting(network)
    began = network.clock.now
    assert wait(network, own) & selectors.EVENT_WRITE
    assert network.clock.now - began == pytest.approx(127, abs=0.1)
    assert error_of(own) == errno.ETIMEDOUT
    assert peers == []


def test_an_upstream_that_answers_late(network: SimNetwork) -> None:
    peers = listen(network, UPSTREAM, answers_after_s=4)
    own = connecting(network)
    assert wait(network, own, timeout_s=3.5) == 0
    assert own.connect_ex(HERE) == errno.EALREADY
    with pytest.raises(BlockingIOError):
        own.recv(1)
    with pytest.raises(OSError, match="not connected"):
        own.getpeername()
    assert wait(network, own) == selectors.EVENT_WRITE
    assert own.getpeername() == HERE
    network.settle()
    assert len(peers) == 1


@pytest.mark.parametrize("passed_s", [0, 0.0005, 0.0015], ids=["at once", "on the way there", "on the way back"])
@pytest.mark.parametrize("answers_after_s", [0, 4])
def test_an_attempt_that_is_given_up_leaves_nothing(
    network: SimNetwork, answers_after_s: float, passed_s: float
) -> None:
    peers = listen(network, UPSTREAM, answers_after_s=answers_after_s)
    own = connecting(network)
    assert wait(network, own, timeout_s=passed_s) == 0
    own.close()
    network.settle()
    assert network.files == {}
    assert peers == []


def test_a_connection_that_is_closed_before_the_upstream_knows(network: SimNetwork) -> None:
    peers = listen(network, UPSTREAM, Client().expect(b"bye").expect_end())
    own = connecting(network)
    wait(network, own)
    own.send(b"bye")
    own.close()
    network.settle()
    assert [peer.unmet for peer in peers] == [""]


def test_an_upstream_that_resets(network: SimNetwork) -> None:
    listen(network, UPSTREAM, Client().reset())
    own = connecting(network)
    wait(network, own)
    assert error_of(own) == 0
    assert wait(network, own, selectors.EVENT_READ) & selectors.EVENT_READ
    with pytest.raises(ConnectionResetError):
        own.recv(1)


def test_an_expectation_of_an_upstream_that_is_not_met(network: SimNetwork) -> None:
    peers = listen(network, UPSTREAM, Client().expect(b"please"))
    own = connecting(network)
    wait(network, own)
    own.send(b"now!")
    network.settle()
    assert peers[0].unmet == "expected b'please', found b'now!'"
    assert issubclass(Unmet, AssertionError)


def test_bytes_are_counted_as_those_of_accepted_connections(network: SimNetwork) -> None:
    listen(network, UPSTREAM, Client().expect(b"12345").send(b"123"))
    own = connecting(network)
    wait(network, own)
    own.send(b"12345")
    wait(network, own, selectors.EVENT_READ)
    own.recv(2)
    assert (own.file.bytes_out, own.file.bytes_in) == (5, 2)


def test_datagrams(network: SimNetwork) -> None:
    peers = listen(network, "udp://192.0.2.1:53", lambda n: Client().expect(b"ask").send(b"answer %d" % n))
    ours = [connecting(network, ("192.0.2.1", 53), socket.SOCK_DGRAM) for _ in range(2)]
    stranger = network.socket(socket.AF_INET, socket.SOCK_DGRAM)
    stranger.sendto(b"not from the peer", ours[0].getsockname())
    for own in ours:
        own.send(b"ask")
    for number, own in enumerate(ours):
        wait(network, own, selectors.EVENT_READ)
        assert own.recv(100) == b"answer %d" % number
        with pytest.raises(BlockingIOError):
            own.recv(100)
    assert [(peer.is_done, peer.datagrams) for peer in peers] == [(True, [b"ask"])] * 2


def test_a_blocking_socket_waits_for_its_connection(network: SimNetwork) -> None:
    listen(network, UPSTREAM, Client().send(b"hello"), answers_after_s=3)
    own = network.socket()
    own.settimeout(5)
    own.connect(HERE)
    assert own.recv(10) == b"hello"
    with pytest.raises(ConnectionRefusedError):
        network.socket().connect(("192.0.2.1", 81))
    late = network.socket()
    late.settimeout(2)
    with pytest.raises(TimeoutError):
        late.connect(HERE)


@pytest.mark.parametrize("seed", range(5))
def test_the_poll_never_says_that_a_connection_is_there_which_is_not(seed: int) -> None:
    network = SimNetwork(seed, Faults(spurious=0.9, early=0.9))
    listen(network, UPSTREAM, answers_after_s=9)
    own = connecting(network)
    began = network.clock.now
    assert wait(network, own) == selectors.EVENT_WRITE
    assert network.clock.now >= began + 9


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda: Upstream("tls://192.0.2.1:443"), "an upstream listens at tcp://"),
        (lambda: Upstream("tcp://192.0.2.1"), "an upstream listens at tcp://"),
        (lambda: Upstream("unix://"), "an upstream listens at tcp://"),
        (lambda: Upstream("tcp://db.example:80"), "a numeric address, not at 'tcp://db.example:80'"),
        (lambda: Upstream(UPSTREAM, answers_after_s=-1), "answers_after_s must be seconds"),
    ],
)
def test_an_address_that_can_not_be_simulated(attempt: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attempt()


# -- faults ----------------------------------------------------------------------------------------------------------


def errors_of_many(**rates: Any) -> set[int]:
    """Connect many times, and return the errors."""
    network = SimNetwork(1, Faults(**rates), latency_s=0.001)
    listen(network, UPSTREAM, Client().send(b"hello"))
    found = set()
    for _ in range(60):
        with network.socket() as own:
            own.setblocking(False)
            number = own.connect_ex(HERE)
            if number == IN_PROGRESS:
                wait(network, own)
                number = error_of(own)
            while not number:
                try:
                    assert own.recv(10)
                    break
                except (BlockingIOError, InterruptedError):
                    wait(network, own, selectors.EVENT_READ)
                except OSError as error:
                    number = error.errno or -1
            found.add(number)
            assert network.outgoing[-1].was_hit == bool(number)
    assert len(network.outgoing) == 60
    return found


def test_connections_fail_in_every_way() -> None:
    assert errors_of_many() == {0}
    assert errors_of_many(refused=0.5) == {0, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EADDRNOTAVAIL}
    assert errors_of_many(unanswered=0.5) == {0, errno.ETIMEDOUT}
    assert errors_of_many(aborted=0.5) == {0, errno.ECONNRESET}
    assert errors_of_many(reset=0.5) == {0, errno.ECONNRESET}


def test_calls_on_an_outgoing_connection_fail_at_times() -> None:
    network = SimNetwork(1, Faults(would_block=0.5))
    listen(network, UPSTREAM)
    own = connecting(network)
    wait(network, own)
    outcomes = set()
    for _ in range(20):
        try:
            outcomes.add(own.send(b"x"))
        except BlockingIOError:
            outcomes.add(0)
    assert outcomes == {0, 1}


# -- names -----------------------------------------------------------------------------------------------------------

NAMES = {"db.example": ["2001:db8::1", "192.0.2.1"], "empty.example": []}


def looked_up(faults: Faults, *args: Any, seed: int = 1, **kwargs: Any) -> tuple[Any, float]:
    """Look a name up in a thread, as the engine does. Returns the outcome, and after how many seconds it came."""
    network = SimNetwork(seed, faults, names=NAMES)
    began = network.clock.now
    times: list[float] = []
    future = network.system.executor(1, "names", bool).submit(network.system.getaddrinfo, *args, **kwargs)
    future.add_done_callback(lambda _: times.append(network.clock.now))
    network.settle()
    assert network.complaints == []
    try:
        return future.result(0), times[0] - began
    except socket.gaierror as error:
        return error.errno, times[0] - began


def test_names_have_addresses_of_both_families() -> None:
    found, _ = looked_up(Faults.none(), "db.example", 80, type=socket.SOCK_STREAM)
    six = (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("2001:db8::1", 80, 0, 0))
    four = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("192.0.2.1", 80))
    assert found == [six, four]
    assert looked_up(Faults.none(), "db.example", 80, socket.AF_INET, socket.SOCK_STREAM)[0] == [four]
    assert len(looked_up(Faults.none(), "db.example", "80")[0]) == 4
    for unknown in ("nosuch.example", "empty.example"):
        assert looked_up(Faults.none(), unknown, 80)[0] == socket.EAI_NONAME


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "2001:db8::1"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("port", [80, "80", None])
def test_numbers_are_no_names(network: SimNetwork, host: str, kind: int, port: Any) -> None:
    expected = socket.getaddrinfo(host, port, type=kind)
    assert network.system.getaddrinfo(host, port, type=kind) == expected
    assert network.system.getaddrinfo(host, port, type=kind, flags=socket.AI_NUMERICHOST) == expected
    with pytest.raises(socket.gaierror):
        network.system.getaddrinfo("db.example", port, type=kind, flags=socket.AI_NUMERICHOST)
    assert network.complaints == []


def test_a_name_that_is_looked_up_in_the_loop_holds_it_up(network: SimNetwork) -> None:
    network.system.getaddrinfo("localhost", 80)
    assert network.complaints == ["the name 'localhost' was looked up in the loop, which stood still meanwhile"]


def test_looking_up_is_slow_and_fails_and_gives_wrong_addresses_first() -> None:
    args = ("db.example", 80, 0, socket.SOCK_STREAM)
    assert max(looked_up(Faults.none(), *args, seed=seed)[1] for seed in range(20)) < 0.2
    slow = [looked_up(Faults(slow_lookup=1.0, misdirected=0.0), *args, seed=seed)[1] for seed in range(20)]
    assert 2 < max(slow) < 3.2
    failed = {looked_up(Faults(unresolved=1.0), *args, seed=seed)[0] for seed in range(20)}
    assert failed == {socket.EAI_AGAIN, socket.EAI_NONAME, socket.EAI_FAIL}
    firsts = set()
    for seed in range(10):
        found, _ = looked_up(Faults(misdirected=1.0), *args, seed=seed)
        first, *others = [where[0] for *_, where in found]
        assert others == ["2001:db8::1", "192.0.2.1"]
        firsts.add(first)
    assert firsts == {"2001:db8::bad", "2001:db8::dead"}


def test_one_of_the_wrong_addresses_refuses_and_the_other_is_silent(network: SimNetwork) -> None:
    errors = []
    for host in ("203.0.113.13", "203.0.113.14", "2001:db8::bad", "2001:db8::dead"):
        with connecting(network, (host, 80)) as own:
            wait(network, own)
            errors.append(error_of(own))
    assert errors == [errno.ECONNREFUSED, errno.ETIMEDOUT] * 2


def test_a_slow_task_has_its_thread_for_as_long_as_it_takes() -> None:
    network = SimNetwork(1, Faults(slow_lookup=1.0, misdirected=0.0), names=NAMES)
    executor = network.system.executor(1, "names", bool)
    done: list[float] = []
    futures = [executor.submit(network.system.getaddrinfo, "db.example", 80) for _ in range(5)]
    for each in futures:
        each.add_done_callback(lambda _: done.append(network.clock.now))
    network.settle()
    assert done == sorted(set(done))
    assert len(done) == 5
    last = [executor.submit(network.system.getaddrinfo, "db.example", 80) for _ in range(2)]
    network.clock.jump(0.2)
    network.happen()  # the first of them runs, and blocks
    assert last[0].running()
    executor.shutdown()
    assert all(len(each.result(0)) == 4 for each in last)
    network.settle()
