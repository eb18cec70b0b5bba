"""Which styles and policies keep a request movable; and why each other request can't move."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import (
    AsyncRequestHandler,
    Connection,
    NotMovable,
    State,
    StateRequestHandler,
    StreamRequestHandler,
    Transition,
    call,
    connect,
    hand_off,
    line,
    state,
)
from reqtable.config import TLSOptions
from tests.certificates import client_context, write_certificate
from tests.hosts import Host, client_of, hosts, move
from tests.support import WAIT_S, serving
from tests.test_moving import receive


class Words(StateRequestHandler):
    """Counts words, in a state that runs where its policy says."""

    words: int = 0
    where: str = ""

    @state(line())
    def command(self, text: bytes) -> Transition:
        self.words += len(text.split())
        self.send(b"%d\n" % self.words)
        return self.command


class Pinned(StateRequestHandler):
    words: int = 0

    @state(line(), dispatch="pool")
    def command(self, text: bytes) -> Transition:
        self.words += len(text.split())
        self.send(b"%d\n" % self.words)
        return self.command


class Threaded(StateRequestHandler):
    words: int = 0

    @state(line(), dispatch="thread")
    def command(self, text: bytes) -> Transition:
        self.words += len(text.split())
        self.send(b"%d\n" % self.words)
        return self.command


@pytest.mark.parametrize(
    ("handler", "dispatch"),
    [
        (Words, "inline"),
        (Words, "greenlet"),
        (Words, "executor"),
        (Words, "pool"),
        (Pinned, "inline"),
        (Threaded, "inline"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_between_two_steps_a_state_machine_moves_under_each_policy_that_steps_on_the_loop(
    handler: Any, dispatch: str
) -> None:
    with hosts(handler, dispatch=dispatch) as (first, second), client_of(first) as client:
        client.sendall(b"one two\nthr")
        entry = first.take()
        assert receive(client, first, 2) == b"2\n"
        first.until(lambda: entry.state is State.READING)
        moved = move(first, second, entry)
        client.sendall(b"ee\n")
        assert receive(client, second, 2) == b"3\n"
        second.until(lambda: moved.state is State.READING)
        assert moved.handler.words == 3


# -- what can't move --------------------------------------------------------------------------------------------------


class Gate:
    """Holds up what runs in another thread."""

    opened = threading.Event()

    @classmethod
    def wait(cls) -> str:
        assert cls.opened.wait(WAIT_S)
        return "done"


class Holds(StateRequestHandler):
    """Goes into one state of its own for each line, from which it can't move."""

    upstream: Connection | None = None
    field: Any = None

    @state(line())
    def command(self, text: bytes) -> Transition:
        word = text.decode().strip()
        if word == "call":
            return self.called, call(Gate.wait, on="thread")
        if word == "either":
            return self.called, reqtable.either(line(), call(Gate.wait, on="thread"))
        if word.startswith("connect "):
            return self.connected, connect(word[8:])
        if word == "hand off":
            return self.handed, hand_off("thread")
        if word == "sends":
            return self.called
        return self.command

    @state()
    def called(self, _: Any) -> Transition:
        self.send(b"called\n")
        return self.command

    @state()
    def connected(self, made: Connection) -> Transition:
        self.upstream = made
        return self.command

    @state()
    def handed(self, _: None) -> Transition:
        Gate.wait()
        return None

    def on_error(self, error: Exception) -> Transition:
        return None


class Coroutine(AsyncRequestHandler):
    async def handle(self) -> None:
        await self.read(line())


class Blocking(StreamRequestHandler):
    def handle(self) -> None:
        self.rfile.readline()


def refused(host: Host, entry: Any, reason: str) -> None:
    """Check that a request can't move, for that reason, and that it is left out of a copy of the whole table."""
    with pytest.raises(NotMovable) as raised:
        host.table.save([entry.id])
    assert str(raised.value).endswith(f" can't be recorded now: {reason}")
    assert host.table.save() == []


IN_FLIGHT = "a call, or a step that runs elsewhere, is in flight"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (b"call", IN_FLIGHT),
        (b"either", "a call, a connect or a handshake is in flight"),
        (b"hand off", "a thread or a child has it"),
    ],
)
def test_a_request_that_waits_for_something_in_this_process_stays(word: bytes, reason: str) -> None:
    Gate.opened.clear()
    with hosts(Holds) as (first, _), client_of(first) as client:
        client.sendall(word + b"\n")
        entry = first.take()
        first.passes()
        refused(first, entry, reason)
        Gate.opened.set()
        first.until(lambda: entry.state in (State.READING, State.CLOSED, State.LINGERING))


def test_a_request_of_a_thread_stays() -> None:
    with hosts(Words, dispatch="thread") as (first, _), client_of(first) as client:
        entry = first.take()
        first.until(lambda: entry.state is State.DELEGATED)
        refused(first, entry, "a thread or a child has it")
        client.shutdown(socket.SHUT_WR)
        first.until(lambda: not len(first.table))


@pytest.mark.parametrize(
    ("handler", "dispatch"), [(Coroutine, "inline"), (Coroutine, "greenlet"), (Blocking, "greenlet")]
)
def test_a_request_with_a_stack_stays(handler: Any, dispatch: str) -> None:
    with hosts(handler, dispatch=dispatch) as (first, _), client_of(first) as client:
        entry = first.take()
        refused(first, entry, "its handler has a stack: only a state machine is data")
        client.shutdown(socket.SHUT_WR)
        first.until(lambda: not len(first.table))


def test_a_request_that_is_done_stays() -> None:
    class Once(Words):
        @state(line())
        def command(self, text: bytes) -> Transition:
            return None

    with hosts(Once) as (first, _), client_of(first) as client:
        client.sendall(b"x\n")
        entry = first.take()
        assert entry.state is State.LINGERING
        refused(first, entry, "it is done")


FIELDS: list[tuple[Any, str]] = [
    (threading.Lock(), "a _thread.lock is no plain data"),
    (lambda: None, "a builtins.function is no plain data"),
    (Gate, "a builtins.type is no plain data"),
    (iter(()), "a builtins.tuple_iterator is no plain data"),
    (2j, "a builtins.complex is no plain data"),
]


@pytest.mark.parametrize(("value", "reason"), FIELDS, ids=lambda each: type(each).__name__)
def test_a_request_with_a_field_that_is_no_data_stays(value: Any, reason: str) -> None:
    with hosts(Holds) as (first, _), client_of(first):
        entry = first.take()
        entry.handler.field = [{"deep": (value,)}]
        refused(first, entry, f"its field 'field': {reason}")


def test_a_request_with_a_field_that_contains_itself_stays() -> None:
    with hosts(Holds) as (first, _), client_of(first):
        entry = first.take()
        entry.handler.field = endless = []
        endless.append({"again": endless})
        refused(first, entry, "its field 'field': values are nested more than 64 deep, or contain themselves")


def test_a_request_with_an_attribute_that_is_no_field_stays() -> None:
    with hosts(Holds) as (first, _), client_of(first):
        entry = first.take()
        entry.handler.hidden = 5
        refused(first, entry, "Holds.hidden is not a declared field, and would be lost: annotate it in the class")
        del entry.handler.hidden
        entry.handler._own = 5
        why = (
            "Holds._own is not a declared field, and would be lost: a field is annotated, and begins with no underscore"
        )
        refused(first, entry, why)


def test_a_request_with_a_text_file_stays(tmp_path: Path) -> None:
    with hosts(Holds) as (first, _), client_of(first), (tmp_path / "f").open("w") as file:
        entry = first.take()
        entry.handler.field = file
        refused(first, entry, "its field 'field': it has a text file (TextIOWrapper): open it in binary mode")


def test_a_client_by_tls_stays(tmp_path: Path) -> None:
    config = reqtable.Config(tls=TLSOptions(cert=write_certificate(tmp_path)))
    with hosts(Holds, config=config) as (first, _):
        with client_of(first) as plain:
            plain.setblocking(False)
            entry = first.take()
            refused(first, entry, "its PROXY header or its TLS handshake has not come")
            with client_context().wrap_socket(plain, server_hostname="127.0.0.1", do_handshake_on_connect=False) as own:
                first.until(lambda: shakes_hands(own) and entry.state is State.READING)
                refused(first, entry, "its connection is encrypted (TLS), and the keys stay in this process")


def shakes_hands(own: ssl.SSLSocket) -> bool:
    try:
        own.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def test_a_request_that_connects_stays() -> None:
    with hosts(Holds) as (first, _), client_of(first) as client, socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):  # so the next connection waits
            client.sendall(b"connect tcp://127.0.0.1:%d\n" % full.getsockname()[1])
            entry = first.take()
            refused(first, entry, "a call, a connect or a handshake is in flight")
            with pytest.raises(NotMovable, match=r"it is an outgoing connection, which moves with its request$"):
                first.table.save([next(iter(first.table.connections))])


def test_a_request_with_a_connection_by_tls_stays(tmp_path: Path) -> None:
    class Connects(StateRequestHandler):
        port: int = 0
        upstream: Connection | None = None

        @state(line())
        def begin(self, text: bytes) -> Transition:
            return self.connected, connect(f"tls://127.0.0.1:{int(text)}", ca=str(tmp_path / "ca.pem"))

        @state()
        def connected(self, made: Connection) -> Transition:
            self.upstream = made
            self.send(b"connected\n")
            return self.begin

    config = reqtable.Config(tls=TLSOptions(cert=write_certificate(tmp_path)))
    with (
        hosts(Connects) as (first, _),
        serving(reqtable.TCPServer(("127.0.0.1", 0), Holds, config=config)) as upstream,
        client_of(first) as client,
    ):
        client.sendall(b"%d\n" % upstream.server_address[1])
        entry = first.take()
        assert receive(client, first, 10) == b"connected\n"
        reason = "its connection is encrypted (TLS), and the keys stay in this process"
        refused(first, entry, f"its connection to tls://127.0.0.1:{upstream.server_address[1]}: {reason}")
