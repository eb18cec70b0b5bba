"""The example forwarder, with curl, openssl and a gigabyte in either direction."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import examples.forward
import reqtable
from examples.echo import StateEcho
from examples.forward import Forward
from reqtable import AsyncRequestHandler, chunk, connect, either, end_output
from reqtable.config import Config, TLSOptions
from tests.certificates import write_certificate
from tests.service import Service
from tests.support import WAIT_S, Client, Started, serving, wait_until
from tests.test_examples import program, run

HIGH_WATER = reqtable.Limits().high_water_bytes
MIB = 2**20


class Measured(reqtable.TCPServer):
    """A server that remembers the most that its rows have held between two passes."""

    most_held = 0
    most_of_a_row = 0

    def service_actions(self) -> None:
        table = self.table
        rows = [*table, *table.connections.values()]
        held = [len(row.input) + row.output.held for row in rows]
        self.most_held = max(self.most_held, sum(held))
        self.most_of_a_row = max(self.most_of_a_row, *held, 0)


class AsyncForward(AsyncRequestHandler):
    """The same forwarder as a coroutine."""

    target: ClassVar[str]

    async def handle(self) -> None:
        upstream = await self.read(connect(self.target))
        is_open = 2
        while is_open:
            index, data = await self.read(either(chunk(), upstream.chunk()))
            if data:
                await (self.send(data) if index else upstream.send(data))
                continue
            is_open -= 1
            if index:
                await self.read(end_output())
            else:
                upstream.end_output()


def at(address: Any) -> str:
    """Return the address of a server as `connect` takes it."""
    return f"tcp://{address[0]}:{address[1]}"


@contextlib.contextmanager
def forwarding(monkeypatch: pytest.MonkeyPatch, target: str, handler: Any = Forward) -> Iterator[Any]:
    """Run a forwarder to `target` during the block. Then no row may be left."""
    monkeypatch.setenv("FORWARD_TO", target)
    monkeypatch.setattr(AsyncForward, "target", target, raising=False)
    with serving(Measured(("127.0.0.1", 0), handler)) as server:
        yield server
        wait_until(server, lambda: not (len(server.table) or server.table.connections))
        assert server.stats()["buffered_bytes"] == 0


@contextlib.contextmanager
def both_ends(monkeypatch: pytest.MonkeyPatch, handler: Any) -> Iterator[tuple[Any, socket.socket, socket.socket]]:
    """Yield a forwarder, a client of it, and the connection that the forwarder has opened for that client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT_S)
        target = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with forwarding(monkeypatch, target, handler) as server:
            with Client(server.server_address) as client:
                upstream, _ = listener.accept()
                with upstream:
                    upstream.settimeout(WAIT_S)
                    yield server, client.socket, upstream


# -- other people's programs through it -------------------------------------------------------------------------------


def test_curl_fetches_a_file_through_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data := bytes(range(256)) * 10_000)

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments: Any) -> None:
            pass

    with serving(reqtable.TableTCPServer(("127.0.0.1", 0), Files)) as web:
        with forwarding(monkeypatch, at(web.server_address)) as server:
            url = f"http://127.0.0.1:{server.server_address[1]}/file"
            assert run(program("curl"), "-sS", "--max-time", "15", url, url) == data * 2


def secured_echo(folder: Path) -> Any:
    config = Config(tls=TLSOptions(cert=write_certificate(folder)))
    return serving(reqtable.TCPServer(("127.0.0.1", 0), StateEcho, config=config))


def test_openssl_talks_tls_through_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with secured_echo(tmp_path) as echo, forwarding(monkeypatch, at(echo.server_address)) as server:
        address = f"127.0.0.1:{server.server_address[1]}"
        command = [program("openssl"), "s_client", "-connect", address, "-CAfile", f"{tmp_path}/ca.pem"]
        command += ["-verify_return_error", "-verify_ip", "127.0.0.1", "-quiet"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with Started(command, bufsize=0, **pipes) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            for text in (b"hello\n", b"x" * 5000 + b"\n"):
                client.stdin.write(text)
                assert client.stdout.read(1) == text[:1]
                rest = b""
                while not rest.endswith(b"\n"):
                    rest += client.stdout.read(65_536)
                assert rest == text[1:]
            client.terminate()


def test_the_other_service_may_be_behind_a_unix_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = f"{tmp_path}/echo.sock"
    with serving(reqtable.UnixStreamServer(path, StateEcho)), forwarding(monkeypatch, f"unix://{path}") as server:
        with Client(server.server_address) as client:
            assert client.ask(b"over unix\n") == b"over unix\n"


def test_the_command_of_its_docstring_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"^    FORWARD_TO=\S+ reqtable serve (\S+)$", examples.forward.__doc__ or "", re.MULTILINE)
    assert found is not None
    with serving(reqtable.TCPServer(("127.0.0.1", 0), StateEcho)) as echo:
        monkeypatch.setenv("FORWARD_TO", at(echo.server_address))
        with Service(handler=found[1], workers=None) as service, Client(service.address) as client:
            assert client.ask(b"hello\n") == b"hello\n"


# -- the end of a connection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", [Forward, AsyncForward])
@pytest.mark.parametrize("first", ["client", "upstream"])
def test_an_end_of_file_is_passed_on_and_the_other_direction_stays_open(
    monkeypatch: pytest.MonkeyPatch, handler: Any, first: str
) -> None:
    with both_ends(monkeypatch, handler) as (_, client, upstream):
        one, other = (client, upstream) if first == "client" else (upstream, client)
        one.sendall(b"all that I have")
        one.shutdown(socket.SHUT_WR)
        assert other.recv(100, socket.MSG_WAITALL) == b"all that I have"
        assert other.recv(1) == b""
        for part in (b"first ", b"second"):
            other.sendall(part)
            assert one.recv(100) == part
        other.shutdown(socket.SHUT_WR)
        assert one.recv(100) == b""


@pytest.mark.parametrize("handler", [Forward, AsyncForward])
def test_a_reset_of_the_client_ends_the_other_connection(monkeypatch: pytest.MonkeyPatch, handler: Any) -> None:
    with both_ends(monkeypatch, handler) as (server, client, upstream):
        client.sendall(b"x")
        assert upstream.recv(1) == b"x"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        assert upstream.recv(1) == b""
        wait_until(server, lambda: server.stats()["finished"]["reset"] == 1)


def test_a_client_of_a_service_that_refuses_sees_end_of_file(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, unused_port: int
) -> None:
    target = f"tcp://127.0.0.1:{unused_port}"
    with forwarding(monkeypatch, target) as server, Client(server.server_address) as client:
        assert client.receive(1) == b""
    assert server.stats()["finished"]["upstream"] == 1
    assert f"can't connect to {target}: connection refused" in caplog.text
    assert "Traceback" not in caplog.text


# -- much data --------------------------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Return the most bytes of memory that this process has used since `forget_peak_memory()`."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def forget_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5)


def send_much(sender: socket.socket, count: int, digest: Any) -> None:
    """Send `count` bytes that repeat only after a while, and then end of file."""
    block = hashlib.shake_128(b"seed").digest(MIB + 1)
    while count:
        part = block[: min(count, len(block))]
        digest.update(part)
        sender.sendall(part)
        count -= len(part)
    sender.shutdown(socket.SHUT_WR)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("handler", [Forward, AsyncForward])
@pytest.mark.parametrize("direction", ["to the service", "to the client"])
@pytest.mark.parametrize("count", [64 * MIB, pytest.param(1024 * MIB, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("unchecked")
def test_a_fast_sender_and_a_slow_reader_need_little_memory(
    monkeypatch: pytest.MonkeyPatch, handler: Any, direction: str, count: int
) -> None:
    with both_ends(monkeypatch, handler) as (server, client, upstream):
        sender, receiver = (client, upstream) if direction == "to the service" else (upstream, client)
        sent, received = hashlib.blake2b(), hashlib.blake2b()
        forget_peak_memory()
        before = peak_memory()
        thread = threading.Thread(target=send_much, args=(sender, count, sent))
        thread.start()
        buffer = bytearray(MIB)
        total = 0
        stalls = {0, count // 4, count // 2}  # where the reader stops until the forwarder has too much
        while True:
            if any(total >= each for each in stalls):
                stalls = {each for each in stalls if total < each}
                server.most_of_a_row = 0
                wait_until(server, lambda: server.most_of_a_row > HIGH_WATER)
            size = receiver.recv_into(buffer)
            if not size:
                break
            received.update(memoryview(buffer)[:size])
            total += size
        thread.join(WAIT_S)
        grown = peak_memory() - before
        print(f"{handler.__name__}, {count >> 20} MiB {direction}: {server.most_held} held, {grown} more memory")
        assert total == count
        assert received.digest() == sent.digest()
        receiver.shutdown(socket.SHUT_WR)
        assert HIGH_WATER < server.most_held <= 2 * HIGH_WATER
        assert grown < 16 * MIB
