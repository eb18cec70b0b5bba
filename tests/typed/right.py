"""Right programs. A type checker with strict rules may mark none of these lines."""

# pyright: strict

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, ParamSpec, TypeVar, assert_type

from reqtable import (
    Arrived,
    AsyncRequestHandler,
    Connection,
    ForkingMixIn,
    LimitExceeded,
    StateRequestHandler,
    StreamRequestHandler,
    TCPServer,
    ThreadingTCPServer,
    TimedOut,
    Transition,
    call,
    chunk,
    connect,
    datagram,
    disconnected,
    either,
    end_output,
    exactly,
    flushed,
    hand_off,
    line,
    nothing,
    parsed,
    rest,
    serve,
    skip_line,
    sleep,
    start_tls,
    state,
    told,
    until,
)
from reqtable.http import HTTPRequestHandler, WebSocketHandler, route, ws_message
from reqtable.testing import exercise
from reqtable.wants import MISSING, Missing, Waiting, Want

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class Message:
    """A message of a program's own protocol."""


class WholeMessage(Want[Message]):
    """A want of a program's own."""

    def take(self, entry: Waiting) -> Message | Missing:
        return MISSING if not entry.input else Message()


class Netstring(Want[bytes]):
    """A want of a program's own, with items of a well-known type."""


def parse(data: bytes) -> tuple[Message, int] | int | None:
    return (Message(), 4) if len(data) > 3 else 4


def rank(words: int) -> float:
    return words / 2


def logged(function: Callable[P, R]) -> Callable[P, R]:
    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    return wrapper


def counted(function: F) -> F:
    return function


class Machine(StateRequestHandler):
    """Goes from state to state in every way."""

    shared: ClassVar[dict[str, int]] = {}
    words: int = 0
    names: list[bytes] = []
    upstream: Connection

    def start(self) -> Transition:
        self.send(b"hello")
        self.send(bytearray(b"hello"))
        return self.command

    @state(line(), timeout=30, dispatch="pool")
    def command(self, text: bytes) -> Transition:
        """Read a command."""
        match text:
            case b"self":
                return self.command
            case b"exactly":
                return self.body, exactly(3)
            case b"whichever":
                return self.body, (line() if self.words else until(b";"))
            case b"maybe":
                return (self.body, rest(10)) if self.words else None
            case b"one of two":
                return self.command if self.words else self.ended
            case b"either":
                return self.arrived, either(line(), flushed(), self.upstream.chunk())
            case b"connect":
                return self.connected, connect("tcp://127.0.0.1:7000")
            case b"call":
                return self.ranked, call(rank, self.words)
            case b"own":
                return self.message, WholeMessage()
            case b"own bytes":
                return self.body, Netstring()
            case b"parsed":
                return self.message, parsed(parse)
            case b"told":
                return self.message, told()
            case b"sleep":
                return self.ended, sleep(2)
            case b"two types":
                return self.maybe, (line() if self.words else sleep(2))
            case b"variable":
                want: Want[bytes] = chunk()
                return self.body, want
            case b"pair":
                target = self.body, self.upstream.line()
                return target
            case b"helper":
                return self.helper()
            case _:
                return None

    def helper(self) -> Transition:
        return self.ended, end_output()

    @state()
    def body(self, note: bytes) -> Transition:
        return self.command

    @state()
    def maybe(self, note: bytes | None) -> Transition:
        return self.anything, chunk()

    @state()
    def anything(self, item: object) -> Transition:
        return self.whatever, flushed()

    @state()
    def whatever(self, item: Any) -> Transition:
        return self.anything

    @state()
    def ranked(self, result: float) -> Transition:
        return self.above

    @state(told())
    def message(self, message: Message) -> Transition:
        return self.again

    @state(either(chunk(), told(), disconnected()))
    def arrived(self, arrived: Arrived) -> Transition:
        return self.arrived if arrived.index else None

    @state()
    def connected(self, upstream: Connection) -> Transition:
        self.upstream = upstream
        self.upstream.send(b"hello")
        return self.ended, self.upstream.flushed()

    @state()
    def ended(self, _: None) -> Transition:
        return None

    @state(nothing())
    def shipped(self, _: None) -> Transition:
        return self.ended, hand_off("thread")

    @logged
    @state(line())
    def above(self, text: bytes) -> Transition:
        return self.under

    @state(line())
    @logged
    def under(self, text: bytes) -> Transition:
        return self.kept

    @counted
    @state(line())
    def kept(self, text: bytes) -> Transition:
        return self.above, until(b";")

    @state(line())
    def again(self, text: bytes, *, tries: int = 0) -> Transition:
        return self.command(text)

    def on_eof(self, partial: bytes) -> Transition:
        return self.body, exactly(0)

    def on_timeout(self) -> Transition:
        return self.command

    def on_limit(self, error: LimitExceeded) -> Transition:
        return self.ended, skip_line()

    def on_error(self, error: Exception) -> Transition:
        if isinstance(error, TimedOut):
            return None
        raise error

    def on_close(self) -> None:
        self.tell(self.words)


class Derived(Machine):
    """Overrides states, and goes to those of its base."""

    @state(line(512), timeout=5)
    def command(self, text: bytes) -> Transition:
        if text == b"body":
            return self.body, exactly(3)
        return super().command(text)

    @state(line())
    def body(self, note: bytes) -> Transition:
        super().body(note)
        return self.again


class Coroutine(AsyncRequestHandler):
    """Awaits every want."""

    async def handle(self) -> None:
        assert_type(await self.read(line()), bytes)
        assert_type(await self.read(until(b";", 10), timeout=3), bytes)
        assert_type(await self.read(exactly(3)), bytes)
        assert_type(await self.read(chunk()), bytes)
        assert_type(await self.read(rest(10)), bytes)
        assert_type(await self.read(datagram()), bytes)
        assert_type(await self.read(flushed()), None)
        assert_type(await self.read(either(line(), sleep(3))), Arrived)
        assert_type(await self.read(call(rank, 3)), float)
        assert_type(await self.call(rank, 3, on="process"), float)
        assert_type(await self.read(parsed(parse)), Message)
        assert_type(await self.read(WholeMessage()), Message)
        assert_type(await self.read(told()), Any)
        await self.read(start_tls(cert="server.pem"))
        await self.read(hand_off("thread"))
        await self.hand_off("thread")
        upstream = await self.read(connect("tls://example.org:443", verify=False))
        assert_type(upstream, Connection)
        assert_type(await self.read(upstream.line()), bytes)
        assert_type(await self.read(upstream.parsed(parse)), Message)
        await upstream.send(b"hello")
        await self.send(memoryview(b"hello"))
        await self.sleep(1)
        assert_type(await line(), bytes)


class Blocking(StreamRequestHandler):
    """Reads from its socket itself."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


class Site(HTTPRequestHandler):
    """Answers requests."""

    def do_GET(self) -> Transition:
        return self.answer(200, "hello", {"X": "1"}, content_type="text/plain")

    def do_POST(self) -> Transition:
        self.begin_answer(200)
        return self.more

    @route("GET", "/notes/{id}")
    def note(self, id: str) -> Transition:
        return self.answer(200, id)

    @state(flushed())
    def more(self, _: None) -> Transition:
        self.write(b"hello")
        return self.end_answer()

    def on_head(self) -> Transition:
        return None if self.request.head.content_length else self.answer(411)


class Echo(WebSocketHandler):
    """Echoes messages."""

    def on_message(self, message: str | bytes) -> Transition:
        if isinstance(message, str):
            self.send_text(message)
        return self.second

    @state(ws_message(limit=10))
    def second(self, message: str | bytes) -> Transition:
        return self.second, ws_message(limit=20)


class ForkingServer(ForkingMixIn, TCPServer):
    """Mixes in."""


def program() -> None:
    serve(Machine, "tcp://127.0.0.1:7000", "unix:///run/x.sock", workers=2)
    serve({"tcp://127.0.0.1:7000": Machine, "unix:///run/admin.sock": Blocking})
    serve(ThreadingTCPServer, "tcp://127.0.0.1:7000", handler=Blocking)
    with ThreadingTCPServer(("127.0.0.1", 0), Blocking) as server:
        server.serve_forever()
    with ForkingServer(("127.0.0.1", 0), Machine, dispatch="thread") as forking:
        forking.shutdown()


def test() -> None:
    exercise(Machine).send(b"self\n").jump(3).expect(b"hello").end().expect_end()
    exercise(Coroutine).accept("tls://example.org:443").send(b"hello")
