"""`reqtable talk`: with standard input from a pipe and from a terminal, to real servers."""

from __future__ import annotations

import os
import pty
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import StateRequestHandler, Transition, line, state
from reqtable.run.commands.talk import Transcript
from reqtable.run.encryption import Encryption
from reqtable.run.talking import Talk, Where, in_lines, talk_to_person
from tests.certificates import write_certificate
from tests.pages import blocks
from tests.support import WAIT_S, Started, served, serving
from tests.test_cli import COMMAND, ROOT
from tests.test_tls import secured

BIG = bytes(range(256)) * 4096  # 1 MiB


class Answers(StateRequestHandler):
    """Answers each line with its repr; `bye` closes, `big` gets a MiB. At the end of file it says how many came."""

    count: int = 0

    @state(line(limit=10_000_000))
    def command(self, text: bytes) -> Transition:
        self.count += 1
        if text.strip() == b"bye":
            return None
        self.send(BIG if text.strip() == b"big" else b"got %r\n" % text[:20])
        return self.command

    def on_eof(self, partial: bytes) -> Transition:
        self.send(b"%d, then %r\n" % (self.count, partial))


def talk(given: bytes, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, "talk", *arguments]
    return subprocess.run(command, input=given, capture_output=True, cwd=ROOT, timeout=WAIT_S, check=False, **options)


def where(server: Any) -> str:
    return "{}:{}".format(*server.server_address)


def test_it_sends_what_is_piped_and_prints_until_the_server_closes() -> None:
    with served(Answers) as server:
        done = talk(b"one\n\xff\0\npart", f"tcp://{where(server)}")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == b"got b'one\\n'\ngot b'\\xff\\x00\\n'\n2, then b'part'\n"


def test_lines_may_end_by_crlf() -> None:
    with served(Answers) as server:
        for sent in (b"one\ntwo", b"one\r\ntwo\r\n"):
            done = talk(sent, "--crlf", where(server))
            assert done.stdout == b"got b'one\\r\\n'\ngot b'two\\r\\n'\n2, then b''\n"


def test_bytes_may_be_hexadecimal() -> None:
    with served(Answers) as server:
        done = talk(b"ff 0a\n", "--hex", where(server))
        assert bytes.fromhex(done.stdout.decode()) == b"got b'\\xff\\n'\n1, then b''\n"
        wrong = talk(b"xyz\n", "--hex", where(server))
        assert (wrong.returncode, wrong.stderr) == (
            2,
            b"reqtable: not hexadecimal digits, such as 68 69 0a: xyz\n",
        )


def test_much_goes_both_ways_at_once(tmp_path: Path) -> None:
    with served(Answers) as server:
        done = talk(b"big\n" * 8 + b"x" * 1_000_000 + b"\n", where(server))
        assert done.stdout == BIG * 8 + b"got %r\n9, then b''\n" % (b"x" * 20)


def test_a_file_and_no_input_at_all(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"a\nb\n")
    with served(Answers) as server:
        command = [*COMMAND, "talk", where(server)]
        with (tmp_path / "lines").open("rb") as file:
            done = subprocess.run(command, stdin=file, capture_output=True, cwd=ROOT, timeout=WAIT_S, check=True)
        assert done.stdout.endswith(b"2, then b''\n")
        closed = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
        done = subprocess.run(closed, capture_output=True, cwd=ROOT, timeout=WAIT_S, check=True)
        assert done.stdout == b"0, then b''\n"


def test_a_unix_socket_and_tls(tmp_path: Path) -> None:
    class Unix(reqtable.TCPServer):
        address_family = socket.AF_UNIX

    with serving(Unix(str(tmp_path / "s"), Answers)):
        assert talk(b"a\n", f"unix://{tmp_path}/s").stdout.endswith(b"1, then b''\n")
    with served(Answers) as server:
        refused = talk(b"a\n", f"tls://{where(server)}")
        assert refused.stderr.endswith(b": the server does not speak TLS there: write tcp:// in place of tls://\n")
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(talk, b"a\n", "tls://{}:{}".format(*listener.getsockname()))
        listener.accept()[0].close()
        assert b": TLS failed: " in asked.result().stderr or b"reset" in asked.result().stderr
    certificate = Path(write_certificate(tmp_path))
    with secured(tmp_path, Answers) as server:
        address = f"tls://{where(server)}"
        assert talk(b"a\nbig\n", "--insecure", address).stdout == b"got b'a\\n'\n" + BIG + b"2, then b''\n"
        refused = talk(b"a\n", address)
        assert (refused.returncode, refused.stderr.count(b"\n")) == (2, 1)
        assert refused.stderr.decode().startswith(f"reqtable: can't connect to {address}: the certificate is refused")
        trusting = os.environ | {"SSL_CERT_FILE": str(certificate.parent / "ca.pem")}
        assert talk(b"bye\n", address, env=trusting).returncode == 0


def test_what_can_not_be_reached_is_one_line(tmp_path: Path, unused_port: int) -> None:
    for address, said in [
        (f"127.0.0.1:{unused_port}", f"can't connect to 127.0.0.1:{unused_port}: connection refused"),
        (f"unix://{tmp_path}/none", f"can't connect to unix://{tmp_path}/none: no such file or directory"),
        ("udp://h:1", "'udp://h:1': write tcp://HOST:PORT, tls://HOST:PORT, unix:///PATH or HOST:PORT"),
        ("tcp://[::1:70", "'tcp://[::1:70': write tcp://HOST:PORT, tls://HOST:PORT, unix:///PATH or HOST:PORT"),
        ("h:99999", "'h:99999': write tcp://HOST:PORT, tls://HOST:PORT, unix:///PATH or HOST:PORT"),
        (f"{'h' * 64}:1", f"can't connect to {'h' * 64}:1: no name service can have a host of that name"),
        ("h", "'h': write tcp://HOST:PORT, tls://HOST:PORT, unix:///PATH or HOST:PORT"),
    ]:
        done = talk(b"", address)
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
        assert done.stderr.decode().startswith(f"reqtable: {said}")


def test_addresses() -> None:
    assert Where.read("[::1]:70") == ("tcp", ("::1", 70))
    assert Where.read(":70") == ("tcp", ("127.0.0.1", 70))
    assert Where.read("/run/s") == Where.read("unix:///run/s") == ("unix", "/run/s")
    assert Where.read("unix://@name") == ("unix", "\0name")


def test_lines_are_put_together() -> None:
    encode = in_lines(lambda each: b"<%s>" % each)
    assert [encode(each) for each in (b"a", b"b\nc\n", b"d", b"", b"")] == [b"", b"<ab><c>", b"", b"<d>", b""]


class Endless(socket.socket):
    """Always has something to read, until something is sent."""

    sent = b""

    def recv(self, size: int, flags: int = 0) -> bytes:
        return b"" if self.sent else b"x"

    def send(self, data: Any, flags: int = 0) -> int:
        self.sent += data
        return len(data)


def test_a_server_that_never_stops_sending_is_answered() -> None:
    ours, theirs = socket.socketpair()
    source, typed = os.pipe()
    os.write(typed, b"stop\n")
    shown: list[bytes] = []

    def show(data: bytes) -> None:
        shown.append(data)
        assert len(shown) < 10

    with Endless(fileno=ours.detach()) as own, theirs:
        theirs.send(b"x")  # the descriptor is ready
        Talk(own, source, bytes, show).run()
        assert (own.sent, shown[-1]) == (b"stop\n", b"")
    os.close(source)
    os.close(typed)


@contextmanager
def encrypted(folder: Path) -> Iterator[tuple[socket.socket, Encryption, ssl.SSLSocket]]:
    """Yield our socket, its encryption, and the server's end."""
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(write_certificate(folder))
    tls = Encryption("localhost", trusts_all=True)
    with ours, ThreadPoolExecutor(1) as pool:
        secured = pool.submit(context.wrap_socket, theirs, server_side=True)
        tls.shake_hands(ours)
        with secured.result(WAIT_S) as peer:
            yield ours, tls, peer


def opened(ours: socket.socket, tls: Encryption) -> list[bytes]:
    """Return what comes, in pieces, up to the end."""
    pieces: list[bytes] = []
    while b"" not in pieces:
        pieces += tls.open(ours.recv(65_536))
    return pieces


def test_an_answer_that_comes_as_the_end_is_sent_is_shown(tmp_path: Path) -> None:
    with encrypted(tmp_path) as (ours, tls, peer):
        peer.sendall(b"an answer")
        ours.sendall(tls.end())
        assert peer.recv(10) == b""
        peer.sendall(b" and more")
        peer.unwrap().close()
        assert opened(ours, tls) == [b"an answer", b" and more", b""]


def test_a_server_that_ends_first_ends_the_talk(tmp_path: Path) -> None:
    with encrypted(tmp_path) as (ours, tls, peer), ThreadPoolExecutor(1) as pool:
        peer.sendall(b"bye")
        ended = pool.submit(peer.unwrap)
        assert opened(ours, tls) == [b"bye", b""]
        ours.sendall(tls.end())
        ended.result(WAIT_S).close()


def test_without_an_address_it_finds_the_only_server(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = talk(b"", env=environment)
    assert (done.returncode, b"no server of this user is running: name the ADDRESS" in done.stderr) == (2, True)
    command = [*COMMAND, "serve", "examples/notes.py:Notes", "--bind", "tcp://127.0.0.1:0"]
    with Started(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        try:
            [block] = blocks("docs/how-to/talk-to-a-server.md")
            command = block.text.replace("reqtable", f"{sys.executable} -m reqtable")
            assert subprocess.check_output(command, shell=True, env=environment, timeout=WAIT_S) == b"3\n"
        finally:
            server.terminate()


# -- a person at a terminal -------------------------------------------------------------------------------------------


class Typing:
    """Types into a `reqtable talk` in a terminal, and reads its screen."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self.terminal = terminal
        self.seen = b""

    def type(self, text: bytes) -> None:
        os.write(self.terminal, text)

    def until(self, text: bytes) -> bytes:
        """Read until the screen has shown `text`. Returns what was shown, and forgets it."""
        while text not in self.seen:
            self.seen += os.read(self.terminal, 65536)
        shown, _, self.seen = self.seen.partition(text)
        return shown


@contextmanager
def typing(*arguments: str) -> Iterator[Typing]:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "talk", *arguments]
    environment = os.environ | {"TERM": "dumb"}
    try:
        with Started(
            command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        ) as process:
            os.close(theirs)
            try:
                yield Typing(process, ours)
                process.wait(WAIT_S)
            finally:
                process.kill()
    finally:
        os.close(ours)


def test_the_end_is_seen_even_if_the_shell_has_had_sigint_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a job in the background
    try:
        with served(Answers) as server, typing(where(server)) as person:
            person.type(b"bye\n")
            person.until(b"the server has closed the connection")
    finally:
        signal.signal(signal.SIGINT, before)
    assert person.process.returncode == 0


@pytest.mark.parametrize("words", [(), ("--crlf",)])
def test_a_person_types_lines_and_sees_the_end(words: tuple[str, ...]) -> None:
    with served(Answers) as server, typing(where(server), *words) as person:
        person.type(b"one\n")
        person.until(b"got b'one\\r\\n'" if words else b"got b'one\\n'")
        person.type(b"bye\n")
        person.until(b"the server has closed the connection")
    assert person.process.returncode == 0


def test_a_person_sees_what_comes_while_typing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        with typing(f"{host}:{port}") as person, listener.accept()[0] as peer:
            peer.settimeout(WAIT_S)
            peer.sendall(b"hello \x1b[2J\r\n")
            person.until(b"hello \\x1b[2J\r\n")
            person.type(b"first\n")
            assert peer.recv(100) == b"first\n"
            person.type(b"\x10\n")  # Ctrl-P: the line before
            assert peer.recv(100) == (b"first\n" if has_readline() else b"\x10\n")
            person.type(b"\x04")  # Ctrl-D: the end of our half
            assert peer.recv(100) == b""
            peer.sendall(b"still here\n")
            person.until(b"still here")
            peer.shutdown(socket.SHUT_WR)
            person.until(b"the server has closed the connection")
    assert person.process.returncode == 0


def test_a_character_and_a_line_end_may_come_in_two_pieces(capsysbinary: Any) -> None:
    transcript = Transcript()
    for piece in (b"1\xc3", b"\xa9\r", b"\n2\xc3", b""):
        transcript.show(piece)
    assert capsysbinary.readouterr().out == "1é\n2\\xc3".encode()


def has_readline() -> bool:
    return subprocess.run([sys.executable, "-c", "import readline"], check=False, capture_output=True).returncode == 0


def test_ctrl_c_ends_it() -> None:
    with served(Answers) as server, typing(where(server)) as person:
        person.type(b"one\n")
        person.until(b"got")
        while person.process.poll() is None:  # input() misses a signal that comes as it begins
            person.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                person.process.wait(WAIT_S / 5)
    assert person.process.returncode == 1


def test_a_line_that_can_not_be_sent_ends_the_talk_and_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(line: bytes) -> bytes:
        raise ValueError(line)

    monkeypatch.setattr("builtins.input", lambda: "zz")
    before = signal.getsignal(signal.SIGINT)
    own, peer = socket.socketpair()
    try:
        with own, peer:
            own.setblocking(False)
            with pytest.raises(ValueError, match="zz"):
                talk_to_person(own, refuse, lambda _: None)
            assert [each for each in threading.enumerate() if each.name == "reqtable-talk"] == []
    finally:
        signal.signal(signal.SIGINT, before)
