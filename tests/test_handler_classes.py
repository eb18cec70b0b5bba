"""What a handler class says is what its requests get: fields and states by Python's inheritance, or a clear refusal."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from reqtable import AsyncRequestHandler, HandlerError, StateRequestHandler, line, state
from reqtable.testing import exercise


def line_of(text: str) -> str:
    """`file:line` of the one line of this file that has that text at its end."""
    lines = Path(__file__).read_text().splitlines()
    [number] = [number for number, each in enumerate(lines, 1) if each.endswith(text)]
    return f"{__file__}:{number}"


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
    with pytest.raises(HandlerError, match=r"Holds\.lock .*test_handler_classes.*can't be copied.*ClassVar") as caught:

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
        "Logged.password is no state, but overrides the state Login.password: put @state(line(limit=100)) before it "
        f"({line_of('# undecorated')})"
    )
    with pytest.raises(HandlerError, match=re.escape("Undeclared.password is no state, ")) as caught:
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
    with pytest.raises(HandlerError, match=r"Logged\.password is no state, but overrides the state Login\.password: "):
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
        (generator, r"generator has a yield, .*return in place of it \(.*test_handler_classes\.py:\d+\)"),
        (classmethod(plain), r"@state stands before a classmethod: a state is a plain method"),
        (staticmethod(plain), r"@state stands before a staticmethod"),
        (property(len), r"@state stands before a property"),
        (functools.partialmethod(generator), r"@state stands before a partialmethod"),
        (functools.partial(print), r"@state stands before a partial"),
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
