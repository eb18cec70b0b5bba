"""TLS by the server itself (`Config.tls`): the handshake is a state of the request, under every policy.

The conformance tests cover dialogues over TLS. These tests use real sockets, with `ssl`, openssl and curl as clients.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

import reqtable
from reqtable import ConfigurationError, Limits, flushed, line, state
from reqtable.config import Certificate, Config, TLSOptions
from reqtable.net.tls import TLSSocket
from tests.certificates import AUTHORITY, TLSStream, client_context, write_certificate
from tests.service import Service
from tests.support import WAIT_S, Client, Started, open_descriptors, serving, wait_until
from tests.test_cli import run
from tests.test_examples import program

ANY = ("127.0.0.1", 0)
BIG = bytes(range(256)) * 20_000  # 5 MB: more than both kernels' buffers hold
CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)  # the beginning of one


class Lines(reqtable.StateRequestHandler):
    refusal = b"busy\n"

    @state(line())
    def one(self, text: bytes) -> Any:
        if text == b"who\n":
            certificate = self.tls.getpeercert() or {}
            names = dict(certificate.get("subjectAltName", ()))
            self.send(b"%s %s\n" % (names.get("email", "-").encode(), str(self.tls.selected_alpn_protocol()).encode()))
        elif text == b"big\n":
            self.send(BIG)
            return None
        else:
            self.send(text)
        return self.one


class AsyncLines(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while text := await self.read(line()):
            await self.send(BIG if text == b"big\n" else text)
            if text == b"big\n":
                return


class BlockingLines(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            self.wfile.write(BIG if text == b"big\n" else text)
            if text == b"big\n":
                return


STYLES = [Lines, AsyncLines, BlockingLines]


@contextlib.contextmanager
def secured(folder: Path, handler: Any = Lines, dispatch: str | None = None, **options: Any) -> Any:
    limits = options.pop("limits", Limits())
    options.setdefault("cert", write_certificate(folder))
    config = Config(tls=TLSOptions(**options), limits=limits)
    made = type("Server", (reqtable.TCPServer,), {"request_queue_size": 1024})
    with serving(made(ANY, handler, dispatch=dispatch, config=config)) as server:
        yield server


@contextlib.contextmanager
def connected(server: Any, *args: Any, **kwargs: Any) -> Any:
    client = TLSStream(server.server_address, *args, **kwargs)
    try:
        yield client
    finally:
        client.close()


def everything(client: TLSStream) -> bytes:
    """Return all data up to a close_notify. Raises an error at any other end."""
    data = bytearray()
    while more := client.recv(65_536):
        data += more
    return bytes(data)


def ask(client: TLSStream, text: bytes) -> bytes:
    client.sendall(text)
    data = b""
    while not data.endswith(b"\n"):
        data += client.recv(1000)
    return data


def finished(server: Any, ending: str, count: int = 1) -> None:
    wait_until(server, lambda: server.stats()["finished"][ending] == count)


# -- the handshake is a state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("handler", STYLES)
def test_silent_and_half_shaken_clients_hold_up_nobody(handler: Any, dispatch: str, tmp_path: Path) -> None:
    with secured(tmp_path, handler, dispatch) as server, contextlib.ExitStack() as stack:
        for opening in [b""] * 10 + [CLIENT_HELLO[:3]] * 5 + [CLIENT_HELLO] * 5:
            stack.enter_context(Client(server.server_address)).send(opening)
        wait_until(server, lambda: len(server.table) == 20)
        with connected(server) as client:
            assert ask(client, b"one\n") == b"one\n"
        rows = server.table.snapshot(state="OPENING")
        assert len(rows) == 20
        assert {row["waits_for"] for row in rows} == {"handshake()"}


def test_a_handshake_has_a_bounded_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = open_descriptors()
    with secured(tmp_path, limits=Limits(handshake_timeout_s=0.2)) as server:
        with Client(server.server_address) as silent, Client(server.server_address).send(CLIENT_HELLO) as half:
            assert silent.rest() == half.rest() == b""
        with connected(server) as client:
            assert ask(client, b"one\n") == b"one\n"
            finished(server, "timeout", 2)
            wait_until(server, lambda: server.table.now - server.table.get(3).created_at > 0.3)
            assert ask(client, b"two\n") == b"two\n"  # that time is the handshake's alone
    assert open_descriptors() == before
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


def test_who_speaks_no_tls_is_told_so_and_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reqtable")
    with secured(tmp_path) as server:
        with Client(server.server_address) as plain:
            answer = plain.send(b"GET / HTTP/1.1\r\n\r\n").rest()
        assert answer[:1] in (b"", b"\x15"), "an alert, or nothing"
        finished(server, "error")
        (message,) = [record.getMessage() for record in caplog.records]
        assert "its TLS handshake failed: [SSL: HTTP_REQUEST]" in message
        with connected(server) as client:
            assert ask(client, b"one\n") == b"one\n"


def test_who_speaks_tls_to_a_plain_server_ends() -> None:
    config = Config(limits=Limits(read_timeout_s=0.1))
    with serving(reqtable.TCPServer(ANY, Lines, config=config)) as server:
        with pytest.raises(ssl.SSLError):
            TLSStream(server.server_address)
        with Client(server.server_address) as client:
            assert client.ask(b"one\n") == b"one\n"


def test_a_full_table_says_nothing_in_the_clear_and_evicts_who_does_not_shake(tmp_path: Path) -> None:
    with secured(tmp_path, limits=Limits(entries_max=1, when_full="reject")) as server, connected(server) as client:
        assert ask(client, b"one\n") == b"one\n"
        with Client(server.server_address) as refused:
            assert refused.rest() == b""
        assert server.stats()["refused"] == {"entries_max": 1}
    with secured(tmp_path, limits=Limits(entries_max=1, when_full="evict")) as server:
        with Client(server.server_address) as silent:
            wait_until(server, lambda: len(server.table) == 1)
            with connected(server) as client:
                assert ask(client, b"one\n") == b"one\n"
                assert silent.rest() == b""


# -- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("handler", STYLES)
def test_a_long_answer_ends_with_close_notify_though_there_was_no_room_for_it(
    handler: Any, dispatch: str, tmp_path: Path
) -> None:
    with secured(tmp_path, handler, dispatch) as server, connected(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.sendall(b"big\n")
        first = client.recv(100)
        assert first + everything(client) == BIG


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("handler", STYLES)
def test_close_notify_waits_for_room(
    handler: Any, dispatch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_goodbye = TLSSocket.say_goodbye
    tried: list[object] = []

    def without_room(own: TLSSocket) -> bool:
        tried.append(own)
        return len(tried) > 2 and say_goodbye(own)

    monkeypatch.setattr(TLSSocket, "say_goodbye", without_room)
    with secured(tmp_path, handler, dispatch) as server, connected(server) as client:
        client.sendall(b"big\n")
        assert everything(client) == BIG
        assert len(tried) > 2


@pytest.mark.parametrize("handler", [Lines, AsyncLines])
def test_an_end_without_close_notify_cuts_a_line_and_ends_between_lines(handler: Any, tmp_path: Path) -> None:
    with secured(tmp_path, handler) as server:
        with connected(server) as client:
            assert ask(client, b"one\n") == b"one\n"
        finished(server, "done")
        with connected(server) as client:
            client.sendall(b"one\nhalf of")
            assert client.recv(100) == b"one\n"
        finished(server, "reset")


def test_the_rest_of_the_input_is_known_for_all_of_it(tmp_path: Path) -> None:
    taken: list[bytes] = []

    class Upload(reqtable.StateRequestHandler):
        @state(reqtable.rest(100_000))
        def all_of_it(self, data: bytes) -> None:
            taken.append(data)

    with secured(tmp_path, Upload) as server:
        with connected(server) as cut:
            cut.sendall(b"half")
            wait_until(server, lambda: any(len(entry.input) for entry in server.table))
        finished(server, "reset")
        with connected(server) as whole:
            whole.sendall(b"whole")
            whole.shutdown(socket.SHUT_WR)
            assert everything(whole) == b""
    assert taken == [b"whole"]


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_file_is_sent_by_reading_it(kind: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(BIG)
    with open(tmp_path / "big", "rb") if kind == "file" else io.BytesIO(BIG) as file:

        class Files(reqtable.StateRequestHandler):
            @state(line())
            def one(self, text: bytes) -> Any:
                self.send(b"here: ")
                self.send_file(file, 7, 4_000_000)
                self.send(b"that was it")
                return self.sent, flushed()

            @state()
            def sent(self, item: None) -> None:
                pass

        with secured(tmp_path, Files) as server, connected(server) as client:
            client.sendall(b"file\n")
            assert everything(client) == b"here: " + BIG[7:4_000_007] + b"that was it"


def test_an_idle_one_is_told_of_a_drain(tmp_path: Path) -> None:
    with secured(tmp_path, limits=Limits(drain_idle_s=0.05)) as server, connected(server) as client:
        assert ask(client, b"one\n") == b"one\n"
        server.drain(WAIT_S)
        assert everything(client) == b""
        assert server.stats()["finished"]["done"] == 1


@pytest.mark.parametrize("handler", ["state", "async", "blocking"])
def test_a_child_has_the_secured_connection_to_itself(handler: str, tmp_path: Path) -> None:
    """Runs in its own process: a child that is forked while another thread is in OpenSSL may wait for its locks."""
    certificate = write_certificate(tmp_path)
    index = ["state", "async", "blocking"].index(handler)
    program = f"""
import sys, reqtable
from reqtable.config import Config, TLSOptions
from tests.test_tls import STYLES
server = reqtable.TCPServer(("127.0.0.1", 0), STYLES[{index}], dispatch="fork",
                            config=Config(tls=TLSOptions(cert={certificate!r})))
print(server.server_address[1], flush=True)
server.serve_forever()
"""
    with Started([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = ("127.0.0.1", int(process.stdout.readline()))
            for _ in range(3):
                client = TLSStream(address)
                assert ask(client, b"one\n") == b"one\n"
                client.sendall(b"big\n")
                assert everything(client) == BIG
                assert client.leavings() == b""  # the parent has nothing to say
                client.close()
            client = TLSStream(address)
            assert ask(client, b"two\n") == b"two\n"
            client.shutdown(socket.SHUT_WR)
            assert everything(client) == b""
            client.close()
        finally:
            process.kill()


def test_a_request_is_handed_to_a_thread_with_its_secured_connection(tmp_path: Path) -> None:
    class Moving(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            await self.send(await self.read(line()))
            await self.hand_off("thread")
            await self.send(await self.read(line()))
            await self.send(BIG)

    with secured(tmp_path, Moving) as server, connected(server) as client:
        assert ask(client, b"one\n") == b"one\n"
        client.sendall(b"two\n")
        assert everything(client) == b"two\n" + BIG


# -- who is who -------------------------------------------------------------------------------------------------------


def names_of(client: TLSStream) -> set[str]:
    certificate: Any = client.tls.getpeercert()
    return {name for _, name in certificate["subjectAltName"]}


def test_the_certificate_is_that_of_the_name_asked_for(tmp_path: Path) -> None:
    others = {
        name: Certificate(write_certificate(tmp_path, name)) for name in ("b.example", "*.c.example", "Upper.example")
    }
    with secured(tmp_path, cert=write_certificate(tmp_path, "a.example", "d.example"), names=others) as server:
        for name, expected in [
            ("a.example", {"a.example", "d.example"}),
            ("b.example", {"b.example"}),
            ("x.c.example", {"*.c.example"}),
            ("upper.example", {"upper.example"}),
            ("d.example", {"a.example", "d.example"}),
        ]:
            with connected(server, name=name) as client:
                assert {each.lower() for each in names_of(client)} == expected


def test_clients_show_a_certificate(tmp_path: Path) -> None:
    ca = str(tmp_path / "ca.pem")
    with secured(tmp_path, client_ca=ca) as server:
        with connected(server, client_context(True)) as ann:
            assert ask(ann, b"who\n") == b"ann@example.org None\n"
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"), connected(server) as nobody:
            ask(nobody, b"who\n")
        strange = ssl.create_default_context()
        AUTHORITY.configure_trust(strange)
        trustme.CA().issue_cert("eve@example.org").configure_cert(strange)
        with pytest.raises((ssl.SSLError, ConnectionError)), connected(server, strange) as eve:
            ask(eve, b"who\n")
    with secured(tmp_path, client_ca=ca, client_cert_required=False) as server:
        with connected(server) as nobody:
            assert ask(nobody, b"who\n") == b"- None\n"
        with connected(server, client_context(True)) as ann:
            assert ask(ann, b"who\n") == b"ann@example.org None\n"


def test_the_protocol_and_the_version_are_agreed_upon(tmp_path: Path) -> None:
    with secured(tmp_path, alpn=("two", "one"), min_version="1.3") as server:
        context = ssl.create_default_context()
        AUTHORITY.configure_trust(context)
        context.set_alpn_protocols(["one", "two"])
        with connected(server, context) as client:
            assert client.tls.selected_alpn_protocol() == "two"
            assert ask(client, b"who\n") == b"- two\n"
            assert client.tls.version() == "TLSv1.3"
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError), connected(server, context):
            pass
    with secured(tmp_path) as server, connected(server, context) as client:
        assert client.tls.version() == "TLSv1.2"


def test_certificates_are_renewed_and_nobody_is_dropped(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    with secured(tmp_path, cert=certificate) as server, connected(server) as early:
        config = server._policies.config
        serial: Any = early.tls.getpeercert()["serialNumber"]  # type: ignore[index]
        assert ask(early, b"one\n") == b"one\n"
        write_certificate(tmp_path)
        server.engine.post(server.reconfigure, config)
        wait_until(server, lambda: True)
        with connected(server) as late:
            assert late.tls.getpeercert()["serialNumber"] != serial  # type: ignore[index]
            assert ask(late, b"two\n") == b"two\n"
        Path(certificate).write_text("no certificate")
        refused: list[Exception] = []

        def reconfigure() -> None:
            try:
                server.reconfigure(config)
            except ConfigurationError as error:
                refused.append(error)

        server.engine.post(reconfigure)
        wait_until(server, lambda: bool(refused))
        with connected(server) as later:
            assert ask(later, b"three\n") == b"three\n"
        assert ask(early, b"four\n") == b"four\n"


# -- what can't be ----------------------------------------------------------------------------------------------------


def refusal_of(**options: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        reqtable.TCPServer(ANY, Lines, config=Config(tls=TLSOptions(**options))).server_close()
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_what_can_not_be_used_is_named(tmp_path: Path) -> None:
    before = open_descriptors()
    own, other = write_certificate(tmp_path), write_certificate(tmp_path, "other.example")
    (tmp_path / "junk.pem").write_text("junk")
    missing = str(tmp_path / "missing.pem")
    encrypted = str(tmp_path / "encrypted.key")
    command = [program("openssl"), "pkey", "-in", own, "-aes256", "-passout", "pass:secret", "-out", encrypted]
    subprocess.run(command, check=True, timeout=WAIT_S)
    mismatch = f"tls.cert {own} is not the certificate of the key in {other}: give a certificate and its key"
    assert refusal_of(cert=own, key=other) == mismatch
    assert refusal_of(cert=missing) == f"tls.cert {missing} can't be used: no such file or directory"
    assert refusal_of(cert=own, key=missing) == f"tls.key {missing} can't be used: no such file or directory"
    junk = str(tmp_path / "junk.pem")
    assert refusal_of(cert=junk).endswith(": give PEM files, the key without a passphrase")
    assert refusal_of(cert=own, key=encrypted).endswith(": give PEM files, the key without a passphrase")
    alone = str(tmp_path / "alone.pem")
    Path(alone).write_text(Path(own).read_text().partition("-----END EC PRIVATE KEY-----\n")[2])
    no_key = "has no private key in it: name the file that has the key, as"
    assert refusal_of(cert=alone) == f"tls.cert {alone} {no_key} tls.key"
    named = refusal_of(cert=own, names={"b.example": Certificate(alone)})
    assert named == f"tls.names.b.example.cert {alone} {no_key} tls.names.b.example.key"
    only_key = str(tmp_path / "key.pem")
    Path(only_key).write_text(Path(own).read_text().partition("-----BEGIN CERTIFICATE-----")[0])
    assert refusal_of(cert=only_key).startswith(f"tls.cert {only_key} has no certificate in it: ")
    for wrong in (alone, junk):
        assert refusal_of(cert=alone, key=wrong) == f"tls.cert {alone} can't be used: its key {wrong} {no_key} PEM"
    assert refusal_of(cert=own, key=str(tmp_path)) == f"tls.key {tmp_path} can't be used: is a directory"
    assert refusal_of(cert=own, client_ca=junk).endswith(": give certificates as PEM")
    assert refusal_of(cert=own, client_ca=missing).endswith("no such file or directory: give certificates as PEM")
    assert "tls.names.x.example.cert" in refusal_of(cert=own, names={"x.example": Certificate(missing)})
    assert refusal_of(cert=own, ciphers="nonsense").startswith("tls.ciphers: OpenSSL has none of 'nonsense'")
    assert refusal_of(cert=own, min_version="1.1") == "tls.min_version must be one of 1.2, 1.3, not '1.1'"
    assert refusal_of(cert=own, alpn=("",)).startswith("tls.alpn has '': ")
    assert refusal_of(key=own).startswith("tls.key is given, but no tls.cert")
    assert open_descriptors() == before


def test_the_file_says_it_all(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    file = tmp_path / "reqtable.toml"
    file.write_text(
        f"""
        [tls]
        cert = "{certificate}"
        alpn = ["h2"]
        [tls.names."b.example"]
        cert = "{certificate}"
        [proxy]
        trusted = ["10.0.0.0/8", "unix"]
        """
    )
    config = Config.load(file)
    assert config.tls == TLSOptions(cert=certificate, alpn=("h2",), names={"b.example": Certificate(certificate)})
    assert config.proxy.trusted == ("10.0.0.0/8", "unix")
    for before, after, message in [
        ('"h2"', "7", ":4: tls.alpn must be a list, such as "),
        ("10.0.0.0/8", "10.0.0.1/8", ":8: proxy.trusted has '10.0.0.1/8': "),
        (f'"b.example"]\n        cert = "{certificate}"', '"b.example"]\n', ":5: cert: name the file"),
        (
            '"b.example"]',
            '"b.example"]\nkex = 1',
            ":6: there is no key tls.names.b.example.kex (= 1): did you mean key?",
        ),
    ]:
        broken = tmp_path / "broken.toml"
        broken.write_text(file.read_text().replace(before, after))
        with pytest.raises(ConfigurationError) as refused:
            Config.load(broken)
        assert message in str(refused.value)


def test_less_than_a_record_at_a_time_is_refused(tmp_path: Path) -> None:
    options = TLSOptions(cert=write_certificate(tmp_path))
    with pytest.raises(ConfigurationError, match=r"limits.recv_bytes is 1000: TLS needs at least 16384"):
        reqtable.TCPServer(ANY, Lines, config=Config(tls=options, limits=Limits(recv_bytes=1000)))


# -- other people's clients -------------------------------------------------------------------------------------------


def test_openssl_and_curl(tmp_path: Path) -> None:
    class Web(reqtable.StateRequestHandler):
        @state(reqtable.until(b"\r\n\r\n"))
        def request(self, head: bytes) -> None:
            self.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + BIG)

    ca = str(tmp_path / "ca.pem")
    with secured(tmp_path) as server:
        port = server.server_address[1]
        command = [program("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", ca, "-quiet"]
        command.append("-verify_return_error")
        asked = subprocess.run(command, input=b"one\nbig\n", capture_output=True, timeout=WAIT_S)
        assert asked.stdout == b"one\n" + BIG
        finished(server, "done")
    with secured(tmp_path, Web) as server:
        url = f"https://localhost:{server.server_address[1]}/"
        got = subprocess.run(
            [program("curl"), "-sS", "--max-time", "20", "--cacert", ca, url], capture_output=True, timeout=2 * WAIT_S
        )
        assert (got.returncode, got.stderr) == (0, b"")
        assert got.stdout == BIG


@pytest.mark.parametrize("handler", STYLES)
def test_a_first_answer_does_not_wait_for_an_acknowledgement(handler: Any, tmp_path: Path) -> None:
    """The first answer follows OpenSSL's session tickets, so Nagle's algorithm would hold it back for 40 ms."""
    with secured(tmp_path, handler, "greenlet") as server, connected(server) as client:
        assert ask(client, b"one\n") == b"one\n"
        [entry] = server.table
        assert entry.transport.request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_mixed_in_server_of_the_standard_library_speaks_tls(tmp_path: Path) -> None:
    """`Config.tls` belongs to the loop, so all server classes that the loop serves speak TLS."""
    import http.server

    class Server(reqtable.TableMixIn, http.server.HTTPServer):
        pass

    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(BIG)

        def log_message(self, *args: Any) -> None:
            pass

    config = Config(tls=TLSOptions(cert=write_certificate(tmp_path)))
    with serving(Server(ANY, Hello, config=config)) as server:
        url = f"https://localhost:{server.server_address[1]}/"
        ca = str(tmp_path / "ca.pem")
        got = subprocess.run(
            [program("curl"), "-sS", "--max-time", "20", "--cacert", ca, url], capture_output=True, timeout=2 * WAIT_S
        )
        assert (got.returncode, got.stderr) == (0, b"")
        assert got.stdout == BIG


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [None, 2])
def test_sighup_takes_renewed_certificates_and_drops_nobody(workers: int | None, tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)

    def serial_of(client: TLSStream) -> str:
        return str(client.tls.getpeercert()["serialNumber"])  # type: ignore[index]

    with Service(bind=f"tls://127.0.0.1:0?cert={certificate}", workers=workers) as service:
        if workers is not None:
            service.wait_for("2 of 2 workers are ready")
        early = TLSStream(service.address)
        before = serial_of(early)
        assert ask(early, b"echo one\n").endswith(b"one\n")
        write_certificate(tmp_path)
        service.signal(signal.SIGHUP)
        service.wait_for("the configuration was read again")
        if workers is not None:
            service.wait_for("2 of 2 workers are ready", times=2)
        until = time.monotonic() + WAIT_S
        late = TLSStream(service.address)
        while serial_of(late) == before:  # a worker that is told to end takes those who have connected by then
            late.close()
            assert time.monotonic() < until
            late = TLSStream(service.address)
        assert ask(late, b"echo two\n").endswith(b"two\n")
        Path(certificate).write_text("")
        service.signal(signal.SIGHUP)
        service.wait_for("the new configuration was refused, the old one stays in force: tls.cert")
        assert ask(late, b"echo three\n").endswith(b"three\n")
        if workers is None:  # with workers, who had it drains and ends it
            assert ask(early, b"echo four\n").endswith(b"four\n")
        for client in (early, late):
            client.close()
        service.signal(signal.SIGTERM)
        assert service.wait() == 0


@pytest.mark.parametrize("where", ["bind", "file"])
def test_what_can_not_be_used_is_exit_code_78_before_anything_is_bound(where: str, tmp_path: Path) -> None:
    own, other = write_certificate(tmp_path), write_certificate(tmp_path, "other.example")
    file = tmp_path / "reqtable.toml"
    file.write_text(f'[tls]\ncert = "{own}"\nkey = "{other}"\n' if where == "file" else "")
    bind = "tls://127.0.0.1:0" + (f"?cert={own}&key={other}" if where == "bind" else "")
    path = tmp_path / "socket"
    result = run("serve", "tests/teller.py:Teller", "--config", str(file), "--bind", f"unix://{path}", "--bind", bind)
    message = f"tls.cert {own} is not the certificate of the key in {other}: give a certificate and its key"
    assert (result.returncode, result.stderr) == (78, f"reqtable: {message}\n")
    assert not path.exists()


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ("tls://127.0.0.1:0", "name a certificate: ?cert=server.pem here, or cert under [tls]"),
        ("tcp://127.0.0.1:0?key=a.pem", "key without a cert: name the certificate's file, too"),
        ("tcp://127.0.0.1:0?proxy=here", "proxy.trusted has 'here': "),
    ],
)
def test_a_bind_that_can_not_be_is_named(bind: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        reqtable.serve(Lines, bind)
    assert str(refused.value).startswith(f"bind {bind!r}: {message}")


def test_one_configuration_is_for_plain_and_secured_binds(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    config = Config(tls=TLSOptions(cert=certificate, client_ca=str(tmp_path / "ca.pem")))
    seen: list[str] = []

    def look(names: list[str]) -> None:
        seen.extend(names)
        thread.start()

    def ask_all() -> None:
        try:
            ports = [int(name.rpartition(":")[2]) for name in seen]
            with Client(("127.0.0.1", ports[0])) as plain:
                answers.append(plain.ask(b"plain\n"))
            for port in ports[1:]:
                client = TLSStream(("127.0.0.1", port), client_context(True))
                answers.append(ask(client, b"secured\n"))
                client.close()
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    answers: list[bytes] = []
    thread = threading.Thread(target=ask_all)
    binds = ["tcp://127.0.0.1:0", "tls://127.0.0.1:0", f"tls://127.0.0.1:0?cert={certificate}"]
    reqtable.serve(Lines, *binds, config=config, on_listening=look)
    thread.join()
    assert [name.partition(":")[0] for name in seen] == ["tcp", "tls", "tls"]
    assert answers == [b"plain\n", b"secured\n", b"secured\n"]
