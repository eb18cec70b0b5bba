"""The PROXY protocol: valid headers, trusted proxies, and a real HAProxy in front of two servers."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import ConfigurationError, Limits, line, state
from reqtable.config import Config, ProxyOptions, TLSOptions
from reqtable.net.proxy_protocol import ProxyHeader, ProxyHeaderError, header_end, parse
from reqtable.testing import Client as Script
from reqtable.testing import simulate
from tests.certificates import client_context, write_certificate
from tests.support import WAIT_S, Client, serving, slow_but, wait_until
from tests.test_examples import program

ANY = ("127.0.0.1", 0)
SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 5000 443\r\n"
ADDRESSES = socket.inet_aton("192.0.2.7") + socket.inet_aton("198.51.100.1") + b"\x13\x88\x01\xbb"
KNOWN = ProxyHeader(("192.0.2.7", 5000), ("198.51.100.1", 443))


def v2(block: bytes, family: int = 0x11, command: int = 0x21) -> bytes:
    return SIGNATURE + bytes([command, family]) + len(block).to_bytes(2, "big") + block


V2 = v2(ADDRESSES)
SIX = socket.inet_pton(socket.AF_INET6, "2001:db8::7") + socket.inet_pton(socket.AF_INET6, "::1") + ADDRESSES[8:]
HEADERS = {
    V1: KNOWN,
    b"PROXY TCP6 2001:db8::7 ::1 5000 443\r\n": ProxyHeader(("2001:db8::7", 5000, 0, 0), ("::1", 443, 0, 0)),
    b"PROXY UNKNOWN\r\n": ProxyHeader(),
    b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n": ProxyHeader(),
    V2: KNOWN,
    v2(ADDRESSES + b"\x04\x00\x03abc"): KNOWN,  # a field to be read over
    v2(SIX, 0x21): ProxyHeader(("2001:db8::7", 5000, 0, 0), ("::1", 443, 0, 0)),
    v2(b"/run/a".ljust(108, b"\0") + b"\0name".ljust(108, b"\0"), 0x31): ProxyHeader("/run/a", "\0name"),
    v2(ADDRESSES, 0x11, 0x20): ProxyHeader(),  # the proxy's own connection
    v2(b"", 0x00): ProxyHeader(),
    v2(b"what is this", 0x51): ProxyHeader(),
}
BAD = [
    b"GET / HTTP/1.1\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 5000\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 5000 443 6\r\n",
    b"PROXY TCP4 192.0.2.700 198.51.100.1 5000 443\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 443\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 -1 443\r\n",
    b"PROXY TCP6 192.0.2.7 ::1 5000 443\r\n",
    b"PROXY UDP4 192.0.2.7 198.51.100.1 5000 443\r\n",
    b"PROXY TCP6 fe80::1%eth0 ::1 5000 443\r\n",  # a zone is the proxy's own, and may be any text (RFC 4007, 11.2)
    b"PROXY TCP6 ::1 fe80::1%1 5000 443\r\n",
    b"PROXY TCP6 fe80::1%\n\x1b[31m ::1 5000 443\r\n",
    b"PROXY TCP4 " + b"1" * 100,
    v2(ADDRESSES[:11]),
    v2(ADDRESSES, 0x11, 0x22),
    v2(ADDRESSES, 0x11, 0x11),
    v2(bytes(5000)),
    SIGNATURE[:11] + b"X",
]


class Who(reqtable.StateRequestHandler):
    @state(line())
    def one(self, text: bytes) -> Any:
        self.send(b"%s %s" % (str(self.client_address[0]).encode(), text))
        return self.one


class AsyncWho(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while text := await self.read(line()):
            await self.send(b"%s %s" % (self.client_address[0].encode(), text))


class BlockingWho(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            self.wfile.write(b"%s %s" % (self.client_address[0].encode(), text))


class Failing(reqtable.StateRequestHandler):
    @state(line())
    def one(self, text: bytes) -> Any:
        raise reqtable.PeerError(text.decode())


SHOWN = r"/run/\udcff\n\x1b[31m\x9b"


def configured(*trusted: str, limits: Limits | None = None, tls: TLSOptions | None = None) -> Config:
    return Config(proxy=ProxyOptions(trusted), limits=limits or Limits(), tls=tls or TLSOptions())


# -- the header -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", HEADERS, ids=repr)
def test_a_header_says_who(header: bytes) -> None:
    for count in range(len(header)):
        assert header_end(header[:count]) in (None, len(header)), "it never seems to be over too early"
    assert header_end(header) == header_end(header + b"what follows") == len(header)
    assert parse(header) == HEADERS[header]


@pytest.mark.parametrize("data", BAD, ids=repr)
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(ProxyHeaderError):
        if header_end(data) is not None:
            parse(data)


# -- a server ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool", "fork"])
@pytest.mark.parametrize("handler", [Who, AsyncWho, BlockingWho])
@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
def test_a_request_is_the_clients_not_the_proxys(header: bytes, handler: Any, dispatch: str) -> None:
    verified: list[Any] = []

    class Verifying(reqtable.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            verified.append(client_address)
            return True

    with serving(Verifying(ANY, handler, dispatch=dispatch, config=configured("127.0.0.1"))) as server:
        with Client(server.server_address) as client:
            assert client.ask(header + b"one\n") == b"192.0.2.7 one\n"
            assert client.ask(b"two\n") == b"192.0.2.7 two\n"
            [row] = server.table.snapshot()
            assert (row["peer"], row["local"]) == ("192.0.2.7:5000", "198.51.100.1:443")
            client.end()
            assert client.rest() == b""
        assert verified == [("192.0.2.7", 5000)]


def test_a_unix_client_of_a_proxy_writes_no_lines_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """A Unix address in a header can be any bytes."""
    caplog.set_level(logging.INFO, "reqtable")
    header = v2(b"/run/\xff\n\x1b[31m\xc2\x9b".ljust(108, b"\0") + bytes(108), 0x31)
    with serving(reqtable.TCPServer(ANY, Failing, config=configured("127.0.0.1"))) as server:
        with Client(server.server_address) as client:
            client.send(header)
            wait_until(server, lambda: any(entry.bytes_in for entry in server.table))
            [row] = server.table.snapshot(peer=SHOWN)
            assert (row["peer"], SHOWN in repr(next(iter(server.table)))) == (SHOWN, True)
            assert client.send(b"\x1b[2Jone\n").rest() == b""
        wait_until(server, lambda: not len(server.table))
    assert [record.getMessage() for record in caplog.records] == [SHOWN + ": \\x1b[2Jone\\n"]


@pytest.mark.parametrize("seed", range(5))
def test_however_it_is_cut_up(seed: int) -> None:
    """The simulated network cuts up the header. The bytes that follow it belong to the request."""
    clients = [
        Script().send(header + b"one\ntwo\n").expect(b"192.0.2.7 one\n192.0.2.7 two\n").end().expect_end()
        for header in (V1, V2)
        for _ in range(4)
    ]
    simulate(lambda: reqtable.TCPServer(ANY, Who, config=configured("0.0.0.0/0")), clients, seed=seed)


def test_only_the_trusted_are_believed() -> None:
    with serving(reqtable.TCPServer(ANY, Who, config=configured("10.0.0.0/8", "::1", "unix"))) as server:
        with Client(server.server_address) as client:
            assert client.ask(b"one\n") == b"127.0.0.1 one\n"
            assert client.ask(V1) == b"127.0.0.1 " + V1, "to others it is input like any"


def test_a_proxy_on_a_unix_socket(tmp_path: Path) -> None:
    server = reqtable.UnixStreamServer(str(tmp_path / "s"), Who, config=configured("unix"))
    with serving(server), Client(server.server_address, socket.AF_UNIX) as client:
        assert client.ask(V1 + b"one\n") == b"192.0.2.7 one\n"


def test_an_ipv4_proxy_of_a_dual_stack_server() -> None:
    class Dual(reqtable.TCPServer):
        address_family = socket.AF_INET6

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            super().server_bind()

    with serving(Dual(("::", 0), Who, config=configured("127.0.0.0/8"))) as server:
        with Client(("127.0.0.1", server.server_address[1])) as client:
            assert client.ask(V2 + b"one\n") == b"192.0.2.7 one\n"


def test_the_header_comes_before_tls(tmp_path: Path) -> None:
    config = configured("127.0.0.1", tls=TLSOptions(cert=write_certificate(tmp_path)))
    with serving(reqtable.TCPServer(ANY, Who, config=config)) as server:
        for header in (V1, V2):
            plain = socket.create_connection(server.server_address, timeout=WAIT_S)
            plain.sendall(header)
            with client_context().wrap_socket(plain, server_hostname="127.0.0.1") as client:
                client.sendall(b"one\n")
                assert client.recv(100) == b"192.0.2.7 one\n"


@pytest.mark.parametrize("data", BAD, ids=repr)
def test_what_is_no_header_ends_its_connection_alone(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reqtable")
    with serving(reqtable.TCPServer(ANY, Who, config=configured("127.0.0.1"))) as server:
        with Client(server.server_address) as client, Client(server.server_address) as other:
            assert client.send(data).rest() == b""
            client.close()
            wait_until(server, lambda: server.stats()["finished"]["error"] == 1)
            assert other.ask(V1 + b"one\n") == b"192.0.2.7 one\n"
    [message] = [record.getMessage() for record in caplog.records]
    assert ": its PROXY header failed: " in message
    assert message.isprintable()


def test_a_header_has_a_bounded_time_and_may_end_early() -> None:
    config = configured("127.0.0.1", limits=Limits(handshake_timeout_s=0.2))
    with serving(reqtable.TCPServer(ANY, Who, config=config)) as server:
        with Client(server.server_address) as silent, Client(server.server_address).send(V2[:15]) as half:
            wait_until(server, lambda: len(server.table.snapshot(state="OPENING")) == 2)
            assert {row["waits_for"] for row in server.table.snapshot()} == {"proxyheader()"}
            assert silent.rest() == half.rest() == b""
        wait_until(server, lambda: server.stats()["finished"]["timeout"] == 2)
        with Client(server.server_address).send(V1[:20]) as cut:
            assert cut.end().rest() == b""
        wait_until(server, lambda: server.stats()["finished"]["reset"] == 1)


def test_a_limit_for_each_peer_counts_clients_not_the_proxy() -> None:
    config = configured("127.0.0.1", limits=Limits(entries_per_peer_max=2, when_full="reject"))

    def header(host: str) -> bytes:
        return V1.replace(b"192.0.2.7", host.encode())

    with serving(reqtable.TCPServer(ANY, Who, config=config)) as server, contextlib.ExitStack() as stack:
        for host in ("192.0.2.1", "192.0.2.2", "192.0.2.1", "192.0.2.3"):
            client = stack.enter_context(Client(server.server_address))
            assert client.ask(header(host) + b"one\n") == host.encode() + b" one\n"
        with Client(server.server_address).send(header("192.0.2.1")) as third:
            assert third.rest() == b""
        assert server.stats()["refused"] == {"entries_per_peer_max": 1}
        assert not server.table.census.neighbours(("127.0.0.1", 1))
        wait_until(server, lambda: len(server.table.census.neighbours(("192.0.2.1", 1))) == 2)


def test_a_hook_may_refuse_whom_the_header_names() -> None:
    class Choosy(reqtable.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            return bool(client_address[0] != "192.0.2.7")

    with serving(Choosy(ANY, Who, config=configured("127.0.0.1"))) as server:
        with Client(server.server_address).send(V1 + b"one\n") as refused:
            with contextlib.suppress(ConnectionResetError):
                assert refused.rest() == b""
        wait_until(server, lambda: len(server.table) == 0)
        with Client(server.server_address) as other:
            assert other.ask(V1.replace(b".7 ", b".8 ") + b"one\n") == b"192.0.2.8 one\n"


def test_what_is_no_network_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"^proxy.trusted has 'proxy.example': .*: write 10.0.0.1, "):
        configured("proxy.example")


# -- a real proxy -----------------------------------------------------------------------------------------------------

SERVER = """
import sys, reqtable
from reqtable.config import Config, ProxyOptions
from tests.test_proxy import Who

class Named(Who):
    @reqtable.state(reqtable.line())
    def one(self, text):
        self.send(b"%s %s " % (sys.argv[1].encode(), self.client_address[0].encode()) + text)
        return self.one

reqtable.serve(Named, "tcp://127.0.0.1:0", config=Config(proxy=ProxyOptions(("127.0.0.1",))),
               on_listening=lambda names: print(names[0].rpartition(":")[2], flush=True))
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    begun: list[subprocess.Popen[str]] = []
    yield begun
    for process in begun:
        process.kill()
        process.communicate()


def haproxy(folder: Path, ports: list[int], version: str, processes: list[subprocess.Popen[str]]) -> int:
    """Start HAProxy in front of those ports, and return the port that it listens on."""
    with socket.socket() as listening:
        listening.bind(ANY)
        listening.listen(1000)
        listening.set_inheritable(True)
        servers = "\n".join(
            f"  server s{number} 127.0.0.1:{port} {version} check inter 100ms fall 1"
            for number, port in enumerate(ports)
        )
        (folder / "haproxy.cfg").write_text(
            "global\n  stats socket " + str(folder / "admin") + "\n"
            "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n"
            "  retries 5\n  option redispatch 1\n"
            f"frontend f\n  bind fd@{listening.fileno()}\n  default_backend b\n"
            f"backend b\n  balance roundrobin\n{servers}\n"
        )
        command = [program("haproxy"), "-db", "-q", "-f", str(folder / "haproxy.cfg")]
        processes.append(subprocess.Popen(command, pass_fds=[listening.fileno()], text=True, stdout=subprocess.PIPE))
        return int(listening.getsockname()[1])


@pytest.mark.parametrize("version", slow_but(["send-proxy", "send-proxy-v2"], "send-proxy-v2"))
def test_haproxy_takes_one_of_two_out_and_no_client_sees_it(
    version: str, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    ports = []
    for name in ("first", "second"):
        process = subprocess.Popen([sys.executable, "-c", SERVER, name], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        ports.append(int(process.stdout.readline()))
    port = haproxy(tmp_path, ports, version, processes)
    served: Counter[bytes] = Counter()
    failures: list[Any] = []
    over = threading.Event()

    def ask(number: int) -> None:
        source = f"127.0.1.{number + 1}"
        while not over.is_set():
            try:
                own = socket.create_connection(("127.0.0.1", port), WAIT_S, source_address=(source, 0))
                with own:
                    own.sendall(b"hello\n")
                    name, host, text = own.makefile("rb").readline().split(b" ")
                    assert (host, text) == (source.encode(), b"hello\n")
                    served[name] += 1
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: min(served[b"first"], served[b"second"]) > 100 or bool(failures))
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(WAIT_S) == 0
        before = served.copy()
        wait_for(lambda: served[b"second"] > before[b"second"] + 200 or bool(failures))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert served[b"first"] == before[b"first"]


def wait_for(condition: Any) -> None:
    done = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        if condition():
            return
        done.wait(0.01)
    raise AssertionError("it never came to hold")
