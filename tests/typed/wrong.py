"""Wrong programs. A type checker without strict rules marks each line that says so, with its words in the message."""

# pyright: basic

from reqtable import (
    AsyncRequestHandler,
    Connection,
    StateRequestHandler,
    TCPServer,
    Transition,
    call,
    connect,
    either,
    exactly,
    flushed,
    hand_off,
    line,
    parsed,
    serve,
    sleep,
    state,
    told,
    until,
)
from reqtable.http import AsyncWebSocketHandler, HTTPRequestHandler, WebSocketHandler, route, ws_message
from reqtable.testing import exercise


def rank(words: int) -> float:
    return words / 2


def parse(data: bytes) -> tuple[list[str], int] | None:
    return ([data.decode()], len(data)) if data else None


class Machine(StateRequestHandler):
    def start(self) -> Transition:
        self.send("text")  # error: bytes | bytearray
        self.send(3)  # error: bytes | bytearray
        self.send(line())  # error: WantOf[bytes]
        self.sned(b"text")  # error: sned
        return self.comand  # error: comand

    @state(line())
    def command(self, text: bytes) -> Transition:
        match text:
            case b"no state":
                return self.no_state  # error: DecoratedByState
            case b"no state, with a want":
                return self.no_state, line()  # error: DecoratedByState
            case b"other item":
                return self.takes_text, exactly(3)  # error: DecoratedByState
            case b"None":
                return self.command, flushed()  # error: WantOf[None]
            case b"sleep":
                return self.takes_text, sleep(3)  # error: WantOf[None]
            case b"arrived":
                return self.command, either(line(), sleep(3))  # error: WantOf[Arrived]
            case b"connection":
                return self.command, connect("tcp://127.0.0.1:7000")  # error: WantOf[Connection]
            case b"hand off":
                return self.command, hand_off("thread")  # error: WantOf[None]
            case b"upstream":
                return self.connected, self.upstream.line()  # error: WantOf[bytes]
            case b"no want":
                return self.takes_text  # error: DecoratedByState
            case b"want alone":
                return line()  # error: WantOf[bytes]
            case b"wrong way round":
                return line(), self.command  # error: tuple[WantOf[bytes]
            case b"text":
                return "command"  # error: return
            case b"number":
                return self.command, 3  # error: return
            case b"called":
                return self.command("text")  # error: bytes
            case b"class":
                return Machine  # error: type[Machine]
            case b"three":
                return self.command, line(), line()  # error: tuple[
            case b"declared":
                return state  # error: return
            case _:
                return self.command, line  # error: tuple[

    def no_state(self, text: bytes) -> Transition:
        return self.command

    @state()
    def takes_text(self, text: str) -> Transition:
        return None

    @state()
    def connected(self, upstream: Connection) -> Transition:
        self.upstream = upstream
        upstream.send("text")  # error: bytes | bytearray
        return None

    @state(line())  # error: str
    def other_item(self, text: str) -> Transition:
        return None

    @state(told)  # error: state
    def want_not_called(self, text: str) -> Transition:
        return None

    @state(line(), timeout="30")  # error: state
    def other_timeout(self, text: bytes) -> Transition:
        return None

    @state(either(line(), sleep(3)))  # error: Arrived
    def not_arrived(self, text: bytes) -> Transition:
        return None

    @state(line())  # error: Argument
    def no_item(self) -> Transition:
        return None

    @state(line())  # error: bytes
    def two_items(self, text: bytes, more: int) -> Transition:
        return None

    @state()  # error: Argument
    def no_item_and_no_want(self) -> Transition:
        return None

    @state(line())  # error: Coroutine
    async def coroutine(self, text: bytes) -> Transition:
        return None

    @state(line())  # error: str
    def returns_text(self, text: bytes) -> str:
        return "command"

    @state(line())  # error(pyright): Literal['command']
    def returns_text_inferred(self, text: bytes):
        return "command"

    @state(line())  # error(pyright): Transition
    def returns_a_method_inferred(self, text: bytes):
        return self.no_state

    @state(line())  # error(pyright): WantOf[None]
    def returns_another_item_inferred(self, text: bytes):
        return self.command, flushed()

    def on_eof(self, partial: bytes) -> Transition:
        return self.no_state  # error: DecoratedByState

    def on_timeout(self) -> Transition:
        return self.takes_text, line()  # error: WantOf[bytes]

    def on_close(self) -> None:
        self.tell()  # error: item


class Coroutine(AsyncRequestHandler):
    async def handle(self) -> None:
        text = self.read(line())
        text.strip()  # error: strip
        await self.send("text")  # error: bytes | bytearray
        await self.send(self.read(line()))  # error: Awaitable[bytes]
        size: int = await self.read(exactly(3))  # error: bytes
        await self.read(line)  # error: Want[
        await self.read(b"\n")  # error: Want[
        await self.read(line("3"))  # error: line
        await self.read(until("\n"))  # error: bytes
        await self.read(line(), timeout="3")  # error: float | None
        number: int = await self.read(call(rank, 3))  # error: float
        other: int = await self.call(rank, 3)  # error: float
        words: list[bytes] = await self.read(parsed(parse))  # error: list[str]
        await self.read(parsed(rank))  # error: parsed
        arrived = await self.read(either(line(), sleep(3)))
        arrived.strip()  # error: strip
        await self.read(either(line(), 3))  # error: either
        await self.hand_off(3)  # error: hand_off
        upstream = await self.read(connect("tcp://127.0.0.1:7000"))
        upstream.sned(b"text")  # error: sned
        text_upstream: str = await self.read(upstream.line())  # error: str
        await self.read(connect(("127.0.0.1", 7000)))  # error: connect
        print(size, number, other, words, text_upstream)


class Site(HTTPRequestHandler):
    def do_GET(self) -> Transition:
        self.answer("200", "hello")  # error: answer
        self.answer(200, ["hello"])  # error: answer
        self.write("text")  # error: write
        return "hello"  # error: return

    @route("GET", "/")  # error: F
    def note(self) -> str:
        return "hello"

    @route("/")  # error: path
    def no_method(self) -> Transition:
        return self.answer(200)


class Echo(WebSocketHandler):
    def on_message(self, message: str | bytes) -> Transition:
        self.send_text(b"bytes")  # error: send_text
        return "message"  # error: return

    @state(ws_message())  # error: str
    def text_only(self, message: str) -> Transition:
        return None


class AsyncEcho(AsyncWebSocketHandler):
    async def handle(self) -> None:
        text: str = await self.read(ws_message())  # error: str | bytes
        await self.send_text(text)
        await self.send_text(b"bytes")  # error: send_text


def program() -> None:
    serve("tcp://127.0.0.1:7000", Machine)  # error: serve
    serve(Machine, ("127.0.0.1", 7000))  # error: serve
    serve(Machine, workers="2")  # error: serve
    serve(Machine, port=7000)  # error: port
    serve(Machine, config={"workers": 2})  # error: serve
    TCPServer(("127.0.0.1", 0))  # error: RequestHandlerClass
    TCPServer(("127.0.0.1", 0), "Machine")  # error: Any
    TCPServer(("127.0.0.1", 0), Machine, dispatch=3)  # error: dispatch


def test() -> None:
    exercise(Machine).send("text")  # error: send
    exercise(Machine).send(b"text").expect("text")  # error: expect
    exercise("Machine")  # error: exercise
    exercise(Machine).jump("3")  # error: jump
