"""Handler classes: fields and states follow Python's inheritance, and invalid classes get a clear error."""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pytest

import reqtable
from reqtable import (
    AsyncRequestHandler,
    ConfigurationError,
    HandlerError,
    StateRequestHandler,
    call,
    line,
    sleep,
    state,
)
from reqtable.testing import exercise
from tests.support import WAIT_S, served


def line_of(text: str, file: str = __file__) -> str:
    """Return `file:line` of the only line of a file that ends with `text`."""
    lines = Path(file).read_text().splitlines()
    [number] = [number for number, each in enumerate(lines, 1) if each.endswith(text)]
    return f"{file}:{number}"


# -- fields -----------------------------------------------------------------------------------------------------------


class Greets(StateRequestHandler):
    greetings: Any = ["hello"]

    @state(line())
    def command(self, text: bytes) -> Any:
        self.send(b"%d\n" % len(self.greetings))
        return self.command


class GreetsAwaiting(AsyncRequestHandler):
    greetings: Any = ["hello"]

    async def handle(self) -> None:
        await self.read(line())


class Assigned:
    greetings = ["bonjour", "salut"]


class Annotated:
    greetings: list[str] = ["bonjour", "salut"]


class Immutable:
    greetings: tuple[str, ...] = ("bonjour",)


class Nested:
    greetings: tuple[list[str], ...] = (["bonjour"],)


class Absent:
    greetings: None = None


@pytest.mark.parametrize("style", [Greets, GreetsAwaiting])
@pytest.mark.parametrize("said", [Assigned, Annotated, Immutable, Nested, Absent])
@pytest.mark.parametrize("how", ["in the class", "in a mix-in", "two classes up"])
def test_the_nearest_default_of_a_field_is_its_own(style: type, said: type, how: str) -> None:
    if how == "in a mix-in":
        made = type("Made", (said, style), {})
    else:
        namespace = {name: each for name, each in vars(said).items() if name in ("greetings", "__annotations__")}
        made = type("Made", (style,), namespace)
        if how == "two classes up":
            made = type("Lower", (made,), {})
    one, other = exercise(made).handler, exercise(made).handler
    assert one.greetings == said.greetings  # type: ignore[attr-defined]
    shared = one.greetings is other.greetings
    assert shared == (said in (Immutable, Absent)), "only what can't change is shared"
    assert ("greetings" in vars(one)) != shared, "and what is shared costs a request nothing"
    assert made._fields == ("greetings",)  # type: ignore[attr-defined]


def test_fields_of_a_mix_in_are_fields() -> None:
    class Counting:
        seen: list[bytes] = []
        _private: list[bytes] = []
        every: ClassVar[list[bytes]] = []
        entry: Any  # what the mix-in expects of its host is no field
        server: Any
        send: Callable[[bytes], None]

    class Before(Counting, Greets):
        more: int = 0

    class After(Greets, Counting):
        pass

    assert Before.field_names() == ["greetings", "seen", "more"], "those of the bases first"
    assert After.field_names() == ["seen", "greetings"]
    for made in (Before, After):
        one = exercise(made)
        one.handler.seen.append(b"x")
        one.handler.every.append(b"x")
        assert exercise(made).handler.seen == []
        assert one.handler.fields().keys() == set(made.field_names())
        one.send(b"\n").expect(b"1\n")
    assert Counting.seen == []
    assert len(Counting.every) == 2


def test_a_field_that_becomes_a_class_variable_or_a_method_is_none_any_more() -> None:
    class Shared(Greets):
        greetings: ClassVar[list[str]] = ["all"]

    class Again(Shared):
        greetings: list[str] = ["own"]

    class Computed(Greets):
        @property
        def greetings(self) -> list[str]:
            return ["computed"] * 3

    class Slotted(Greets):
        __slots__ = ("late",)
        late: int

    assert Shared.field_names() == Computed.field_names() == []
    assert exercise(Shared).handler.greetings is Shared.greetings
    assert exercise(Again).handler.greetings == ["own"]
    assert exercise(Again).handler.greetings is not Again.greetings
    exercise(Computed).send(b"\n").expect(b"3\n")
    assert Slotted.field_names() == ["greetings", "late"]
    assert exercise(Slotted).handler.fields() == {"greetings": ["hello"]}


def test_a_default_that_can_not_be_copied_is_refused_with_the_mend() -> None:
    with pytest.raises(HandlerError, match=r"Holds\.lock.*can't be copied.*ClassVar.*test_handler_classes") as caught:

        class Holds(Greets):
            lock: Any = __import__("threading").Lock()

    assert "\n" not in str(caught.value)


# -- states -----------------------------------------------------------------------------------------------------------


class Login(StateRequestHandler):
    @state(line(limit=100))
    def password(self, text: bytes) -> Any:
        return self.command

    @state(line())
    def command(self, text: bytes) -> Any:
        return None


class Undeclared:
    def password(self, text: bytes) -> Any:  # in a mix-in
        return None


def plain(self: Any, text: Any) -> Any:
    return None


def loses(function: Any) -> Any:
    def wrapper(self: Any, item: Any) -> Any:
        return function(self, item)

    return wrapper


class LosesToo:
    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def test_a_state_overridden_without_state_is_refused_where_it_stands() -> None:
    with pytest.raises(HandlerError) as caught:

        class Logged(Login):
            def password(self, text: bytes) -> Any:  # undecorated
                return super().password(text)

    assert str(caught.value) == (
        "Logged.password is not a state, but overrides the state Login.password: put @state(line(limit=100)) before it "
        f"({line_of('# undecorated')})"
    )
    with pytest.raises(HandlerError, match=re.escape("Undeclared.password is not a state, ")) as caught:
        type("Mixed", (Undeclared, Login), {})
    assert line_of("# in a mix-in") in str(caught.value)
    assert type("Mixed", (Login, Undeclared), {})._initial == "password"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "value",
    [
        None,
        "secret",
        property(len),
        classmethod(plain),
        staticmethod(plain),
        functools.partialmethod(Login.password),
        functools.partial(print),
        functools.lru_cache(Login.password),
        loses(Login.password),
        LosesToo(Login.password),
        property(Login.password),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_else_takes_a_states_place_is_refused(value: Any) -> None:
    with pytest.raises(
        HandlerError, match=r"Logged\.password is not a state, but overrides the state Login\.password: "
    ):
        type("Logged", (Login,), {"password": value})


@pytest.mark.parametrize(
    "decorate", [loses, LosesToo, classmethod, staticmethod, property, functools.lru_cache, functools.partialmethod]
)
def test_a_state_whose_decorator_loses_it_is_refused(decorate: Any) -> None:
    with pytest.raises(HandlerError, match=r"Lost\.command has lost its @state .*functools\.wraps"):

        class Lost(StateRequestHandler):
            @decorate
            @state(line())
            def command(self, text: bytes) -> Any:
                return None


def test_what_keeps_a_state_or_only_uses_one_is_taken() -> None:
    def keeps(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(self: Any, text: bytes) -> Any:
            return function(self, text.upper())

        return wrapper

    class Kept(StateRequestHandler):
        @keeps
        @state(line())
        def command(self, text: bytes) -> Any:
            self.send(text)
            return self.command

        again = command
        shouting = functools.partialmethod(command, b"HEY\n")  # a helper, and no state
        helper = loses(command)

    exercise(Kept).send(b"a\n").expect(b"A\n")
    assert [each.name for each in Kept.states()] == ["command", "again"]


async def coroutine(self: Any, item: Any) -> Any:
    return None


def generator(self: Any, item: Any) -> Any:
    yield


async def stream(self: Any, item: Any) -> Any:
    yield


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (coroutine, r"coroutine is async def, .*AsyncRequestHandler \(.*test_handler_classes\.py:\d+\)"),
        (stream, r"stream is async def"),
        (generator, r"generator has a yield, .*write return instead \(.*test_handler_classes\.py:\d+\)"),
        (classmethod(plain), r"@state decorates a classmethod: a state is a plain method"),
        (staticmethod(plain), r"@state decorates a staticmethod"),
        (property(len), r"@state decorates a property"),
        (functools.partialmethod(generator), r"@state decorates a partialmethod"),
        (functools.partial(print), r"@state decorates a partial"),
    ],
)
def test_only_a_plain_method_is_a_state(function: Any, said: str) -> None:
    with pytest.raises(HandlerError, match=said):
        state(line())(function)


@pytest.mark.parametrize("hook", ["start", "on_timeout", "on_eof", "on_limit", "on_error", "on_close"])
def test_a_hook_is_a_plain_method_too(hook: str) -> None:
    for function in (coroutine, generator):
        with pytest.raises(HandlerError, match=rf"{function.__name__} .*test_handler_classes\.py:\d+"):
            type("Hooked", (Login,), {hook: function})
    if hook == "on_close":
        with pytest.raises(HandlerError, match="coroutine is async def"):
            type("Hooked", (AsyncRequestHandler,), {hook: coroutine})
    else:
        assert type("Named", (GreetsAwaiting,), {hook: coroutine}), "an async handler may call its own what it likes"


# -- what can be served -----------------------------------------------------------------------------------------------

ANY = ("127.0.0.1", 0)
T = TypeVar("T")


class Stateless(StateRequestHandler):  # abstract
    def helps(self) -> None:
        """Help, but as an ordinary method instead of a state."""


class Handless(AsyncRequestHandler):  # the same
    pass


class Typed(Login, Generic[T]):
    pass


class TypedBlocking(reqtable.BaseRequestHandler, Generic[T]):
    pass


class OwnInit(Login):
    def __init__(self) -> None:  # of its own
        self.words = 0


class OwnInitAwaiting(GreetsAwaiting):
    def __init__(self, entry: Any, words: int) -> None:
        super().__init__(entry)


def no_handler(request: Any) -> None:
    pass


def a_handler(request: Any, client_address: Any, server: Any) -> None:
    pass


@dataclass
class Maker:
    """Makes handlers. Its objects have no hash."""

    made: list[Any]

    def __call__(self, *given: Any) -> Any:
        self.made.append(given)


class OwnInitBlocking(reqtable.StreamRequestHandler):
    def __init__(self, request: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (
            Stateless,
            f"Stateless declares no state: put @state(line()) before a method ({line_of('# abstract')})",
        ),
        (Handless, f"Handless has no handle: write async def handle(self) ({line_of('# the same')})"),
        (Typed[int], "Typed[int] is a type hint, not a handler class: give Typed"),
        (functools.partial(Typed[int]), "give Typed"),
        (None, "None is not a handler class: give a class derived from reqtable.StateRequestHandler, Async"),
        (exercise(Login).handler, "is not a handler class: give a class"),
        (b"Login", "b'Login' is not a handler class"),
        (
            OwnInit,
            "OwnInit can't be called with (entry): too many positional arguments: a handler has no parameters of its "
            "own: declare fields in the class, as in words: int = 0, and prepare them in start() "
            f"({line_of('# of its own')})",
        ),
        (OwnInitAwaiting, "missing a required argument: 'words'"),
        (OwnInitBlocking, "OwnInitBlocking can't be called with (request, client_address, server): too many"),
    ],
    ids=lambda each: each.partition(":")[0][:40] if isinstance(each, str) else type(each).__name__,
)
@pytest.mark.parametrize("server_class", [reqtable.TCPServer, reqtable.TableTCPServer, reqtable.ThreadingUDPServer])
def test_what_can_not_be_served_is_refused_before_anything_is_bound(handler: Any, said: str, server_class: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        server_class(ANY, handler, bind_and_activate=False)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    if isinstance(handler, type) and hasattr(handler, "_unfit"):
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            exercise(handler)


@pytest.mark.parametrize(
    "handler",
    [
        functools.partial(OwnInitAwaiting, words=5),
        TypedBlocking[int],
        lambda *args: reqtable.BaseRequestHandler(*args),
        a_handler,
        no_handler,  # CPython's own tests have such a one
        Maker([]),
        type("Started", (StateRequestHandler,), {"start": Stateless.helps}),
    ],
)
def test_what_makes_a_handler_is_taken(handler: Any) -> None:
    with reqtable.TCPServer(ANY, handler, bind_and_activate=False) as server:
        assert server.RequestHandlerClass is handler


def test_a_callable_without_a_hash_makes_handlers() -> None:
    maker = Maker([])
    with served(maker) as server, socket.create_connection(server.server_address, WAIT_S) as client:
        assert client.recv(1) == b""
        [(_, address, given)] = maker.made
        assert (address, given) == (client.getsockname(), server)


@pytest.mark.parametrize("hook", ["finish_request", "process_request"])
def test_a_server_that_makes_its_handlers_itself_needs_no_class(hook: str) -> None:
    made = type("Own", (reqtable.TableTCPServer,), {hook: a_handler})
    with made(ANY, None, bind_and_activate=False) as server:
        assert server.RequestHandlerClass is None
    with pytest.raises(ConfigurationError, match="declares no state"):
        made(ANY, Stateless, bind_and_activate=False)


def test_a_partial_is_not_shipped() -> None:
    with pytest.raises(ConfigurationError, match=r"Login can't run under policy 'executor' as a functools\.partial"):
        reqtable.TCPServer(ANY, functools.partial(Login), bind_and_activate=False, dispatch="executor")


def test_a_filter_of_rows_takes_what_the_server_was_given() -> None:
    one = exercise(Login)
    for handler in (Login, functools.partial(Login), "Login"):
        assert [row["handler"] for row in one.entry.table.snapshot(handler=handler)] == ["Login"]
    assert one.entry.table.snapshot(handler=Greets) == []


# -- coroutines, and wants that nobody awaits -------------------------------------------------------------------------


def passed_on(function: Any) -> Any:
    def wrapper(self: Any) -> Any:
        return function(self)

    return wrapper


@pytest.mark.parametrize("function", [plain, generator, stream], ids=lambda each: each.__name__)
def test_handle_must_be_a_coroutine(function: Any) -> None:
    with pytest.raises(
        HandlerError, match=r"Made\.handle is not a coroutine function: .*\(.*test_handler_classes\.py:\d+\)"
    ):
        type("Made", (AsyncRequestHandler,), {"handle": function})
    assert type("Made", (AsyncRequestHandler,), {"handle": passed_on(GreetsAwaiting.handle)})


async def reads(self: Any) -> None:
    self.read(line())


async def sleeps(handler: Any) -> None:
    handler.sleep(
        1,
    )


async def calls(self: Any) -> None:
    text = await self.read(line())
    if text:
        self.call(print, *text, on="thread")


async def hands_off(self: Any) -> None:
    self.hand_off("fork")


async def sleeps_bare(self: Any) -> None:
    sleep(1)


async def awaits(self: Any) -> None:
    line()
    await self.read(line())


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (reads, "self.read"),
        (sleeps, "handler.sleep"),
        (calls, "self.call"),
        (hands_off, "self.hand_off"),
        (sleeps_bare, "sleep"),
        (awaits, "line"),
    ],
)
@pytest.mark.parametrize("where", ["handle", "of a mix-in"])
def test_a_statement_that_is_only_a_want_is_refused(function: Any, name: str, where: str) -> None:
    mixed = (type("MixIn", (), {"helper": function}),) if where == "of a mix-in" else ()
    namespace = {"handle": function} if where == "handle" else {}
    with pytest.raises(HandlerError) as caught:
        type("Made", (*mixed, GreetsAwaiting), namespace)
    said = f"{function.__name__}: the statement {name}(…) alone does nothing: write await {name}(…) ({__file__}:"
    assert str(caught.value).startswith(said)


def test_a_state_that_drops_a_want_is_refused() -> None:
    with pytest.raises(HandlerError) as caught:

        class Dropping(StateRequestHandler):
            @state(line())
            def command(self, text: bytes) -> Any:
                call(print, text)  # dropped
                return self.command

    assert "the statement call(…) alone does nothing: write return self.name, call(…)" in str(caught.value)
    assert line_of("# dropped") in str(caught.value)


def test_what_is_used_is_not_taken_for_dropped() -> None:
    class Used(AsyncRequestHandler):
        def read(self, want: Any) -> None:  # type: ignore[override]  # its own
            """Hide the `read` that returns a want."""

        async def handle(self) -> None:
            self.read(line())
            self.send(repr(line()).encode())
            waits = self.sleep(0)
            str(sleep(0)).upper()
            await waits

    exercise(Used).expect(b"line(limit=65536)").expect_end()
