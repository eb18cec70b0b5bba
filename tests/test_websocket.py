"""WebSockets: their handlers, exercised without sockets, and over sockets with a client that others wrote."""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import reqtable
from examples.websocket_chat import NAME_REFUSED, Room
from reqtable import Config, Limits, Transition, either, sleep, state, told
from reqtable.http import AsyncWebSocketHandler, WebSocketClosed, WebSocketError, WebSocketHandler, ws_message
from reqtable.http.frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT
from reqtable.http.ws_messages import WebSocketInput
from reqtable.table.errors import ConfigurationError, HandlerError, LimitExceeded
from reqtable.table.record import restore
from reqtable.table.saving import head_of, read, save
from reqtable.table.states import Ending, State
from reqtable.table.table import Entry, RequestTable
from reqtable.testing import Exercise, exercise
from tests.support import WAIT_S, Client, served, serving, slow_but, wait_until
from tests.websockets_by_hand import (
    ACCEPT,
    binary,
    close,
    code_of,
    frame,
    frames,
    handshake,
    ping,
    pong,
    text,
)


class Echo(WebSocketHandler):
    """Sends back each message. "bye" closes, "fail" fails."""

    def on_message(self, message: str | bytes) -> Transition:
        if message == "bye":
            self.close_ws(3000, "as you wish")
        elif message == "fail":
            raise ValueError("as you wish")
        elif isinstance(message, str):
            self.send_text(message)
        else:
            self.send_bytes(message)


class States(WebSocketHandler):
    """Waits for a name, and then for messages or what it is told."""

    name: str = ""
    ended: ClassVar[list[tuple[int, str]]] = []

    @state(ws_message(limit=10))
    def hello(self, name: str) -> Transition:
        self.name = name
        self.send_text(f"hello {name}")
        return self.talk

    @state(either(ws_message(), told()))
    def talk(self, arrived: Any) -> Transition:
        if arrived.item == "bye":
            return None
        self.send_text(f"{'sent' if arrived.index == 0 else 'told'} {arrived.item}")
        return self.talk

    def on_close(self) -> None:
        if self.websocket is not None:
            self.ended.append((self.websocket.close_code, self.websocket.close_reason))


class Coroutine(AsyncWebSocketHandler):
    async def handle(self) -> None:
        while (message := await self.read(ws_message())) != "bye":
            if message == "fail":
                raise ValueError("as you wish")
            await (self.send_text(message) if isinstance(message, str) else self.send_bytes(message))


def opened(handler: Any, *fields: bytes, **options: Any) -> Exercise:
    """Begin to exercise a handler, with the handshake done."""
    begun = exercise(handler, **options).send(handshake(*fields))
    head, _, rest = begun.output.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head
    assert ACCEPT in head
    assert not rest
    begun._wire.received.clear()
    return begun


def said(begun: Exercise) -> list[tuple[int, bytes]]:
    """Take what the handler has sent since the last time, as frames."""
    found = list(frames(begun.output))
    begun._wire.received.clear()
    return found


# -- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", [Echo, Coroutine])
def test_messages_come_whole(handler: Any) -> None:
    begun = opened(handler)
    begun.send(text("hällo") + binary(b"\xff\0"))
    assert said(begun) == [(TEXT, "hällo".encode()), (BINARY, b"\xff\0")]
    begun.send(frame(TEXT, b"a", False)).send(ping(b"there?"))
    assert said(begun) == [(PONG, b"there?")]
    begun.send(frame(CONTINUATION, b"b"))
    assert said(begun) == [(TEXT, b"ab")]
    begun.send(pong() + close(1001, "leaving"))
    assert said(begun) == [(CLOSE, b"\x03\xe9")]
    begun.expect_end()
    assert begun.entry.ending in (None, Ending.DONE)
    assert begun.handler.websocket.close_code == 1001
    assert begun.handler.websocket.close_reason == "leaving"


def test_states_wait_for_messages_and_more() -> None:
    States.ended.clear()
    begun = opened(States)
    begun.send(text("ann"))
    begun.tell("one").send(text("two")).tell("three")
    assert [words.decode() for _, words in said(begun)] == ["hello ann", "told one", "sent two", "told three"]
    begun.send(frame(TEXT, b"ha", False)).send(ping()).tell("in between").send(frame(CONTINUATION, b"lf"))
    assert said(begun) == [(PONG, b""), (TEXT, b"told in between"), (TEXT, b"sent half")]
    begun.send(text("bye"))
    assert said(begun) == [(CLOSE, b"\x03\xe8")]
    begun.expect_end()
    assert States.ended == [(0, "")]


def test_a_limit_of_the_want() -> None:
    begun = opened(States)
    with pytest.raises(LimitExceeded):
        begun.send(text("eleven char"))
    assert [(opcode, code_of(rest)) for opcode, rest in said(begun)] == [(CLOSE, 1009)]
    assert begun.entry.ending is Ending.LIMIT


@pytest.mark.parametrize("handler", [Echo, Coroutine])
@pytest.mark.parametrize(
    ("sent", "error", "code"),
    [
        (frame(CONTINUATION), WebSocketError, 1002),
        (b"\x81\x01a", WebSocketError, 1002),
        (frame(TEXT, b"\xff"), WebSocketError, 1007),
        (frame(TEXT, b"a", rsv1=True), WebSocketError, 1002),
        (b"\x82\xff" + (2**20 + 1).to_bytes(8, "big") + b"mask", LimitExceeded, 1009),
        (text("fail"), ValueError, 1011),
    ],
)
def test_what_ends_a_websocket(handler: Any, sent: bytes, error: type[Exception], code: int) -> None:
    begun = opened(handler)
    with pytest.raises(error):
        begun.send(sent)
    assert [(opcode, code_of(rest)) for opcode, rest in said(begun)] == [(CLOSE, code)]
    begun.expect_end()


@pytest.mark.parametrize("handler", [Echo, Coroutine])
def test_the_handler_closes(handler: Any) -> None:
    begun = opened(handler).send(text("bye"))
    [(opcode, payload)] = said(begun)
    assert (opcode, code_of(payload)) == (CLOSE, 3000 if handler is Echo else 1000)
    begun.expect_end()


@pytest.mark.parametrize("handler", [Echo, Coroutine])
def test_a_connection_that_ends_without_a_close_frame(handler: Any) -> None:
    for sent, ending in (
        (b"", Ending.DONE),
        (text("half")[:5], Ending.RESET),
        (frame(TEXT, b"h", False), Ending.RESET),
    ):
        begun = opened(handler).send(sent).end()
        assert said(begun) == [(CLOSE, b"\x03\xe9")]
        begun.expect_end()
        assert begun.handler.websocket.close_code == 1006
        assert begun.entry.ending is ending


def test_after_a_close_frame_nothing_is_sent() -> None:
    class Talks(WebSocketHandler):
        def on_open(self) -> Transition:
            self.close_ws()
            self.send_text("more")
            self.ping()
            self.close_ws(3000)
            assert not self.is_open

        def on_message(self, message: Any) -> None:
            raise AssertionError

    begun = opened_with_output(Talks)
    assert said(begun) == [(CLOSE, b"\x03\xe8")]
    begun.send(text("ignored")).send(close())
    assert said(begun) == []
    begun.expect_end()
    assert begun.handler.websocket.close_code == 1000


def opened_with_output(handler: Any) -> Exercise:
    begun = exercise(handler).send(handshake())
    begun._wire.received[:] = [begun.output.partition(b"\r\n\r\n")[2]]
    return begun


def test_a_client_that_does_not_answer_a_close_frame() -> None:
    class Closes(Echo):
        def on_open(self) -> Transition:
            self.close_ws()

    begun = opened_with_output(Closes)
    assert begun.jump(9).entry.state is State.READING
    begun.jump(1).expect(b"\x88\x02\x03\xe8").expect_end()


def test_sends_take_what_they_name() -> None:
    begun = opened(Echo)
    for call in (lambda: begun.handler.send_text(b"a"), lambda: begun.handler.send_bytes("a")):
        with pytest.raises(TypeError, match=r"(is|are) sent by"):
            call()
    with pytest.raises(ValueError, match="at most 125 bytes"):
        begun.handler.ping(bytes(126))
    with pytest.raises(ValueError, match="can't be closed with the code 1005"):
        begun.handler.close_ws(1005)


def test_messages_are_compressed_if_that_was_agreed_upon() -> None:
    packed: list[int] = []
    for fields in ([b"Sec-WebSocket-Extensions: permessage-deflate"], []):
        begun = exercise(Echo).send(handshake(*fields))
        head, _, rest = begun.output.partition(b"\r\n\r\n")
        assert (b"permessage-deflate" in head) == bool(fields)
        begun._wire.received[:] = [rest]
        begun.send(text("short") + text("long " * 1000))
        (_, short), (_, long) = said(begun)
        assert short == b"short"
        packed.append(len(long))
    assert packed[0] < 100
    assert packed[1] == 5000


def test_what_cant_be_made_smaller_is_sent_as_it_is() -> None:
    noise = bytes(i * i * 7919 % 251 ^ (i * 104729 >> 7) & 255 for i in range(2000))
    begun = opened(Echo, b"Sec-WebSocket-Extensions: permessage-deflate")
    begun.send(binary(noise))
    output = begun.output
    assert output[0] & 64 == 0 or len(output) < len(noise)


@pytest.mark.parametrize("handler", [Echo, States])
def test_frames_without_end_are_answered_in_turns(handler: Any) -> None:
    begun = opened(handler, limits=Limits(recv_bytes=100_000))
    if handler is States:
        begun.send(text("ann"))
        said(begun)
    passes = begun._loop.times.passes
    begun.send(ping() * 2000 + text("a"))
    *pongs, (_, last) = said(begun)
    assert pongs == [(PONG, b"")] * 2000
    assert last.endswith(b"a")
    assert begun._loop.times.passes - passes >= 2000 // 256


# -- the handshake ----------------------------------------------------------------------------------------------------


class Page(Echo):
    subprotocols = ("v2", "v1")

    def do_GET(self) -> Transition:
        return self.answer(200, "a page")

    def on_upgrade(self) -> Transition:
        if self.request.path != "/ws":
            return self.answer(404)
        return None

    def on_open(self) -> Transition:
        assert self.websocket is not None
        self.send_text(f"{self.websocket.subprotocol} {self.request.get('cookie')} {self.request.query}")


def test_a_handler_of_pages_and_websockets() -> None:
    begun = exercise(Page).send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert begun.output.endswith(b"\r\n\r\na page")
    begun._wire.received.clear()
    begun.send(handshake())
    assert begun.output.startswith(b"HTTP/1.1 404 ")
    begun._wire.received.clear()
    begun.send(handshake(b"Sec-WebSocket-Protocol: v1, v2", b"Cookie: a=b", path=b"/ws?x=1"))
    head, _, rest = begun.output.partition(b"\r\n\r\n")
    assert b"Sec-WebSocket-Protocol: v2" in head
    assert list(frames(rest)) == [(TEXT, b"v2 a=b x=1")]
    assert begun.handler.request.path == "/ws"
    assert begun.handler.request.head.fields == ()


@pytest.mark.parametrize("handler", [Echo, Coroutine])
@pytest.mark.parametrize(
    ("sent", "status", "named"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 426, b"Upgrade: websocket"),
        (handshake().replace(b"Version: 13", b"Version: 7"), 426, b"Sec-WebSocket-Version: 13"),
        (handshake().replace(b"Key: d", b"Key: "), 400, b"base64"),
        (handshake(b"Origin: https://evil.example"), 403, b"https://evil.example"),
        (handshake(b"Origin : x"), 400, b"name of a header field"),
    ],
)
def test_a_handshake_that_is_refused(handler: Any, sent: bytes, status: int, named: bytes) -> None:
    begun = exercise(handler).send(sent).end()
    assert begun.output.startswith(b"HTTP/1.1 %d " % status)
    assert named in begun.output
    assert begun.is_over
    assert begun.handler.websocket is None


def test_origins_that_the_handler_allows() -> None:
    class Open(Echo):
        def allow_origin(self, origin: str | None) -> bool:
            return origin == "https://elsewhere.example"

    opened(Open, b"Origin: https://elsewhere.example")
    assert exercise(Open).send(handshake()).output.startswith(b"HTTP/1.1 403 ")


def test_a_handler_without_messages_is_refused() -> None:
    class Nothing(WebSocketHandler):
        pass

    with pytest.raises(ConfigurationError, match="define on_message"):
        exercise(Nothing)


def test_a_message_is_for_websockets() -> None:
    class Plain(reqtable.StateRequestHandler):
        @state(ws_message())
        def one(self, message: Any) -> Transition:
            return self.one

    with pytest.raises(HandlerError, match="ws_message\\(\\) is for a WebSocketHandler"):
        exercise(Plain).send(text("a"))


# -- pings ------------------------------------------------------------------------------------------------------------


class Pinging(Echo):
    ping_s = 20.0


class PingingStates(WebSocketHandler):
    ping_s = 20.0

    @state(either(ws_message(), told()), timeout=50)
    def one(self, arrived: Any) -> Transition:
        return self.one

    def on_timeout(self) -> Transition:
        self.send_text("too late")
        return None


class PingingCoroutine(Coroutine):
    ping_s = 20.0


@pytest.mark.parametrize("handler", [Pinging, PingingCoroutine])
def test_a_silent_client_is_pinged_and_then_lost(handler: Any) -> None:
    begun = opened(handler)
    begun.jump(19).send(text("a"))
    assert said(begun) == [(TEXT, b"a")]
    begun.jump(19)
    assert said(begun) == []
    begun.jump(1)
    assert said(begun) == [(PING, b"")]
    begun.send(pong()).jump(20)
    assert said(begun) == [(PING, b"")]
    with contextlib.suppress(TimeoutError):  # the coroutine gets it
        begun.jump(20)
    [(opcode, payload)] = said(begun)
    assert (opcode, code_of(payload)) == (CLOSE, 1001)
    begun.expect_end()
    assert begun.entry.ending is Ending.TIMEOUT


def test_pings_do_not_extend_the_timeout_of_a_state() -> None:
    begun = opened(PingingStates)
    begun.jump(20).send(pong()).jump(20).send(pong()).jump(9.9)
    assert said(begun) == [(PING, b""), (PING, b"")]
    begun.jump(0.1)
    assert said(begun) == [(TEXT, b"too late"), (CLOSE, b"\x03\xe8")]


def test_half_a_message_must_go_on_at_the_rate_of_any_input() -> None:
    begun = opened(Pinging, limits=Limits(read_bytes_per_s_min=10))
    begun.send(frame(BINARY, bytes(100), False)).jump(20)
    for _ in range(3):
        begun.send(frame(CONTINUATION, bytes(200), False)).jump(20)
    assert said(begun) == [(PING, b"")] * 4
    begun.send(frame(CONTINUATION, bytes(100), False)).jump(20)
    assert [opcode for opcode, _ in said(begun)] == [CLOSE]


def test_a_wait_that_would_begin_anew_is_not_pinged() -> None:
    class Sleeps(WebSocketHandler):
        ping_s = 20.0

        @state(either(ws_message(), sleep(100)))
        def one(self, arrived: Any) -> Transition:
            self.send_text(str(arrived.index))
            return self.one

    begun = opened(Sleeps).jump(99)
    assert said(begun) == []
    begun.jump(1)
    assert said(begun) == [(TEXT, b"1")]


# -- as data ----------------------------------------------------------------------------------------------------------


def test_half_a_message_moves_with_its_request() -> None:
    begun = opened(States, b"Sec-WebSocket-Extensions: permessage-deflate")
    begun.send(text("ann")).send(frame(TEXT, "hal\u00e4".encode()[:4], False)).send(frame(CONTINUATION, b"\xa4")[:3])
    record = read(head_of(save(begun.entry, "").record), States, 0.0)
    server: Any = begun.entry.server
    policy: Any = begun.entry.policy
    again = Entry(RequestTable(lambda: 0.0, Limits()), server, policy, begun.entry.peer, None, begun.entry.transport)
    again.handler = States(again)
    restore(record, again, again.handler, 0.0)
    assert again.handler.name == "ann"
    assert again.handler.websocket == begun.handler.websocket
    assert isinstance(again.input, WebSocketInput)
    assert again.input.deflates
    assert again.input.half == begun.entry.input.half
    again.input.feed(frame(CONTINUATION, b"\xa4")[3:])
    assert again.want == either(ws_message(), told())
    assert again.want.take(again) == (0, "halä")


def test_half_a_message_counts_as_held() -> None:
    begun = opened(Echo)
    begun.send(frame(BINARY, bytes(1000), False)[:-10])
    assert begun.entry.held == 990
    assert begun.entry.table.buffered == 990
    begun.send(bytes(10) + frame(CONTINUATION, b"x"))
    assert begun.entry.held == 0
    assert begun.entry.state is State.READING


def test_half_a_message_has_the_time_of_any_item() -> None:
    begun = opened(Echo, limits=Limits(read_timeout_s=30, idle_timeout_s=None))
    begun.send(frame(TEXT, b"half", False)).jump(29)
    assert not begun.is_over
    begun.jump(1)
    assert [opcode for opcode, _ in said(begun)] == [CLOSE]


# -- over sockets -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def talking(server: Any, **options: Any) -> Iterator[ClientConnection]:
    """Open a WebSocket to the server, and close it after the block."""
    address = f"ws://127.0.0.1:{server.server_address[1]}/"
    # Without pings of its own: their thread may outlive the client.
    with connect(address, open_timeout=WAIT_S, ping_interval=None, **options) as client:
        yield client


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("handler", [Echo, Coroutine])
def test_a_client_that_others_wrote(handler: Any, compression: str | None) -> None:
    with served(handler) as server:
        with talking(server, compression=compression, max_size=None) as client:
            for message in ["", "hällo", "x" * 70_000, b"", bytes(range(256)) * 4000, "ab " * 100_000]:
                client.send(message)
                assert client.recv(WAIT_S) == message
            client.send(["frag", "men", "ts"])
            assert client.recv(WAIT_S) == "fragments"
            assert client.ping().wait(WAIT_S)
        assert client.close_code == 1000
        wait_until(server, lambda: not len(server.table))
        assert server.stats()["finished"]["done"] == 1


@pytest.mark.parametrize("dispatch", slow_but(["inline", "pool", "thread", "fork", "executor"], "inline", "pool"))
def test_under_every_policy(dispatch: str) -> None:
    with served(Echo, dispatch) as server:
        with talking(server, max_size=None) as client:
            for message in ["one", "two " * 50_000, b"three"]:
                client.send(message)
                assert client.recv(WAIT_S) == message
            client.send(["a", "b"])
            assert client.recv(WAIT_S) == "ab"
            client.send("bye")
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(WAIT_S)
            assert caught.value.rcvd is not None
            assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (3000, "as you wish")
        wait_until(server, lambda: not len(server.table))


def test_a_client_is_told_why_it_is_refused() -> None:
    with served(Echo) as server:
        with pytest.raises(InvalidStatus, match="403"), talking(server, origin="https://evil.example"):
            pass


@pytest.mark.parametrize("handler", [Echo, Coroutine])
def test_open_websockets_are_told_that_the_server_drains(handler: Any) -> None:
    config = Config(limits=Limits(drain_idle_s=0.05))
    with serving(reqtable.TCPServer(("127.0.0.1", 0), handler, config=config)) as server, talking(server) as client:
        client.send("a")
        assert client.recv(WAIT_S) == "a"
        server.drain()
        with pytest.raises(ConnectionClosed) as caught:
            client.recv(WAIT_S)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1001
        assert server.stats()["finished"]["drained"] == 0


class Broadcast(WebSocketHandler):
    def on_message(self, message: str | bytes) -> Transition:
        for entry in self.server.table:
            if isinstance(entry.handler, Broadcast):
                entry.handler.send_text(str(message))


def test_requests_send_to_each_other() -> None:
    with served(Broadcast) as server, Client(server.server_address) as half:
        half.send(b"GET / HTTP/1.1\r\n")  # is not open, so it gets nothing
        with talking(server) as one, talking(server) as two:
            one.send("to all")
            assert one.recv(WAIT_S) == two.recv(WAIT_S) == "to all"
        half.send(handshake()[len(b"GET / HTTP/1.1\r\n") :]).send(close())
        assert [opcode for opcode, _ in frames(half.rest().partition(b"\r\n\r\n")[2])] == [CLOSE]


class Large(WebSocketHandler):
    message_bytes_max = 2**23

    def on_message(self, message: str | bytes) -> Transition:
        self.send_text(str(len(message)))


def test_a_large_message_is_taken_in_many_passes() -> None:
    with served(Large) as server, Client(server.server_address) as client:
        client.send(handshake())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.line()
        before = server.stats()["loop"]["passes"]
        client.send(binary(bytes(2**23)))
        assert client.receive(9) == b"\x81\x078388608"
        assert server.stats()["loop"]["passes"] - before >= 2**23 // 65_536


IDLE = 300
ONCE = 40


@pytest.mark.usefixtures("unchecked")
def test_an_idle_websocket_takes_little() -> None:
    """Measures what Python has allocated for WebSockets that are idle after a message and its answer."""
    fields = [
        b"Origin: http://example.com",
        b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
        b"Accept: */*",
        b"Accept-Language: en-US,en;q=0.5",
        b"Accept-Encoding: gzip, deflate, br, zstd",
        b"Sec-WebSocket-Extensions: permessage-deflate",
        b"Cookie: session=0123456789abcdef0123456789abcdef",
        b"Pragma: no-cache",
        b"Cache-Control: no-cache",
    ]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(reqtable.TCPServer(("127.0.0.1", 0), Echo, bind_and_activate=False))
        server.request_queue_size = IDLE
        server.server_bind()
        server.server_activate()
        clients = [stack.enter_context(socket.socket()) for _ in range(ONCE + IDLE)]
        server.engine.listeners.listen(server)

        def converse(clients: list[socket.socket]) -> None:
            for client in clients:
                client.connect(("127.0.0.1", server.server_address[1]))
                client.send(handshake(*fields))
            settle(lambda: all(entry.handler.websocket is not None for entry in server.table), len(clients))
            for client in clients:
                client.send(text("a message"))
            settle(lambda: all(entry.steps == 3 for entry in server.table), 0)

        def settle(condition: Callable[[], bool], more: int) -> None:
            count = len(server.table) + more
            while len(server.table) < count or not condition():
                server.engine.loop.run_once()

        converse(clients[:ONCE])
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        converse(clients[ONCE:])
        after, _ = tracemalloc.get_traced_memory()
        each = (after - before) / IDLE
        print(f"{each:.0f} bytes")
        assert each <= 2 * 1024


def test_what_a_closed_websocket_says() -> None:
    error = WebSocketClosed(ws_message(), 1005, "")
    assert str(error) == "the client has closed the WebSocket: 1005"
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.reason) == (1005, "")
    assert repr(ws_message()) == "ws_message()"
    assert repr(ws_message(limit=5)) == "ws_message(5)"
    same = pickle.loads(pickle.dumps(WebSocketError(1002, "why")))
    assert (same.code, same.reason) == (1002, "why")


def ends_with(client: ClientConnection) -> tuple[int, str]:
    """Return the code and the reason with which the server closes."""
    with pytest.raises(ConnectionClosed) as caught:
        client.recv(WAIT_S)
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code, caught.value.rcvd.reason


def test_the_example_is_a_chat_room_for_browsers() -> None:
    with served(Room) as server:
        with Client(server.server_address) as browser:
            browser.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"new WebSocket(" in browser.rest()
        with talking(server) as ann, talking(server) as second, talking(server, compression=None) as bob:

            def both() -> list[dict[str, str]]:
                return [json.loads(each.recv(WAIT_S)) for each in (ann, bob)]

            ann.send("ann")
            assert json.loads(ann.recv(WAIT_S)) == {"text": "ann has joined"}
            second.send("ann")
            assert ends_with(second) == (NAME_REFUSED, "that name is taken")
            bob.send("bob")
            assert json.loads(bob.recv(WAIT_S)) == {"text": "here: ann"}
            assert both() == [{"text": "bob has joined"}] * 2
            ann.send("hällo <b>")
            assert both() == [{"from": "ann", "text": "hällo <b>"}] * 2
            ann.send(b"bytes")
            assert json.loads(bob.recv(WAIT_S)) == {"text": "ann has left"}
            assert ends_with(ann) == (1003, "this room is for text")
        for name in ("", " ", b"", b"\xff\xfe"):
            with talking(server) as nameless:
                nameless.send(name)
                assert ends_with(nameless) == (NAME_REFUSED, "a name is needed")
        wait_until(server, lambda: not len(server.table))
