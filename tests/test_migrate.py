"""`state_version` and `migrate`: a request goes on with code that has other states, other fields, other classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import pytest

from reqtable import HandlerError, ReqtableError, StateRequestHandler, Transition, line, sleep, state
from tests.hosts import client_of, hosts, move
from tests.test_handler_classes import line_of as line_of_file
from tests.test_moving import receive


def line_of(text: str) -> str:
    return line_of_file(text, __file__)


@dataclass
class Item:
    name: str
    count: int


class Kind(Enum):
    OLD = 1


class Old(StateRequestHandler):
    words: list[str] = []
    dropped: int = 7
    item: Item | None = None
    kind: Any = None

    @state(line())
    def command(self, text: bytes) -> Transition:
        self.words.append(text.decode().strip())
        self.item = Item("a", 5)
        self.kind = Kind.OLD
        return self.command


class New(StateRequestHandler):
    """Has a field more, a field less, a field of another type, and a state of another name."""

    state_version = 2
    words: tuple[str, ...] = ()
    count: int = 0
    item: Item | None = None
    kind: Any = None

    @classmethod
    def migrate(cls, version: int, state: str | None, fields: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        assert version == 1
        words = tuple(fields.pop("words", ()))
        fields.pop("dropped")
        return "read" if state == "command" else state, {**fields, "words": words, "count": len(words)}

    @state(line())
    def read(self, text: bytes) -> Transition:
        self.send(b"%d %r %r %r\n" % (self.count, self.words, self.item, self.kind))
        return self.read


def test_a_request_goes_on_with_other_states_and_fields() -> None:
    with hosts(Old, after=New) as (first, second), client_of(first) as client:
        client.sendall(b"one\ntwo\nthr")
        entry = first.take()
        moved = move(first, second, entry)
        client.sendall(b"ee\n")
        assert receive(client, second, 10) == b"2 ('one', 'two') Item(name='a', count=5) <Kind.OLD: 1>\n"
        assert type(moved.handler) is New


def test_a_request_that_waits_for_something_else_than_its_state_says_goes_on_waiting() -> None:
    class Sleeps(Old):
        @state(line())
        def command(self, text: bytes) -> Transition:
            return self.command, sleep(10)

    with hosts(Sleeps, after=New) as (first, second), client_of(first) as client:
        client.sendall(b"x\n")
        entry = first.take()
        moved = move(first, second, entry)
        assert moved.handler.state_name == "read"
        second.clock.jump(10)
        assert receive(client, second, 3).startswith(b"0 ()")


@pytest.fixture
def classes() -> Iterator[None]:
    before = Item, Kind
    yield
    globals()["Item"], globals()["Kind"] = before


@pytest.mark.usefixtures("classes")
@pytest.mark.parametrize("more", [True, False])
def test_objects_of_classes_that_have_changed_are_dicts_for_migrate(more: bool) -> None:
    """A dataclass has lost a field, or has another one without a default. A member of an Enum is gone."""
    got: list[dict[str, Any]] = []

    class Sees(New):
        @classmethod
        def migrate(cls, version: int, state: str | None, fields: dict[str, Any]) -> Any:
            got.append(dict(fields))
            return super().migrate(version, state, {**fields, "item": None, "kind": None})

    with hosts(Old, after=Sees) as (first, second), client_of(first) as client:
        client.sendall(b"one\n")
        entry = first.take()
        record, sockets = first.freeze(entry)
        fields = {"name": str, "count": int, "size": int} if more else {"name": str}
        globals()["Item"] = dataclass(type("Item", (), {"__annotations__": fields, "__module__": __name__}))
        globals()["Kind"] = Enum("Kind", {"NEW": 1}, module=__name__)  # type: ignore[misc]
        assert second.table.restore([record], sockets) == [1]
        first.let_go(entry)
    assert got[-1]["item"] == {"name": "a", "count": 5}
    assert got[-1]["kind"] == "OLD"


def refusal(handler: Any, sent: bytes = b"one\n") -> str:
    """Return why a request of `Old` can't go on with `handler`. The request goes on where it is."""
    with hosts(Old, after=handler) as (first, second), client_of(first) as client:
        client.sendall(sent)
        entry = first.take()
        [record] = first.table.save()
        with entry.transport.request.dup() as own, pytest.raises(ReqtableError) as raised:
            second.table.restore([record], [own])
        assert not len(second.table)
        client.sendall(b"more\n")
        first.passes()
        assert entry.handler.words == ["one", "more"]
    return str(raised.value)


class Without(StateRequestHandler):  # of Without
    state_version = 3

    @state(line())
    def command(self, text: bytes) -> Transition:
        return self.command


class Raising(Without):
    @classmethod
    def migrate(cls, *_: Any) -> Any:
        raise KeyError("missing")


class Nonsense(Without):
    answer: ClassVar[Any] = None

    @classmethod
    def migrate(cls, *_: Any) -> Any:
        return cls.answer


class Renamed(StateRequestHandler):  # of Renamed
    words: list[str] = []
    dropped: int = 0
    item: Any = None
    kind: Any = None

    @state(line())
    def ask(self, text: bytes) -> Transition:
        return self.ask


class Fewer(StateRequestHandler):  # of Fewer
    words: list[str] = []

    @state(line())
    def command(self, text: bytes) -> Transition:
        return self.command


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (
            Without,
            "Without has state_version 3, but request 1 is of version 1: write migrate(cls, version, state, fields) "
            f"({line_of('# of Without')})",
        ),
        (
            Renamed,
            "Renamed has no state 'command', in which a request is: raise state_version, and write migrate() "
            f"({line_of('# of Renamed')})",
        ),
        (
            Fewer,
            "Fewer has no field 'dropped', which a request has: raise state_version, and write migrate() "
            f"({line_of('# of Fewer')})",
        ),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_code_that_can_not_go_on_with_a_request_says_why_in_one_line(handler: Any, message: str) -> None:
    assert refusal(handler) == message


def test_a_migrate_that_fails_is_named() -> None:
    place = place_of_migrate(Raising)
    assert refusal(Raising) == f"Raising.migrate raised KeyError('missing') for request 1 of version 1 ({place})"


def place_of_migrate(handler: Any) -> str:
    code = handler.migrate.__func__.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "Nonsense.migrate returned None: return the name of a state, and a dict of the fields"),
        ({}, "Nonsense.migrate returned {}: return the name of a state, and a dict of the fields"),
        (
            ("command", []),
            "Nonsense.migrate returned ('command', []): return the name of a state, and a dict of the fields",
        ),
        ((5, {}), "Nonsense.migrate returned (5, {}): return the name of a state, and a dict of the fields"),
        (("command", {}, 1), "return the name of a state, and a dict of the fields"),
        (("nowhere", {}), "migrate() returned the state 'nowhere', which Nonsense lacks: it has command"),
        (("command", {"x": 1}), "migrate() returned the field 'x', which Nonsense lacks: it has none"),
        (("command", {5: 1}), "migrate() returned the field 5, which Nonsense lacks: it has none"),
    ],
    ids=repr,
)
def test_what_migrate_may_return(answer: Any, problem: str) -> None:
    Nonsense.answer = answer
    found = refusal(Nonsense)
    assert problem in found
    assert found.endswith(f" ({place_of_migrate(Nonsense)})")


# -- classes that are refused when they are made ----------------------------------------------------------------------


def test_a_state_version_is_a_whole_number_of_the_class() -> None:
    for wrong in ("2", 2.0, True, None):
        with pytest.raises(HandlerError) as raised:
            type("Wrong", (Old,), {"state_version": wrong, "__module__": __name__})
        assert str(raised.value).startswith(
            f"Wrong.state_version must be a whole number, not {wrong!r}: write state_version = 2 ("
        )
    with pytest.raises(HandlerError) as raised:

        class Annotated(Old):  # of Annotated
            state_version: int = 2  # type: ignore[misc]

    assert str(raised.value) == (
        "Annotated.state_version belongs to the class, but its annotation declares a field of each request: write "
        f"state_version = 2 ({line_of('# of Annotated')})"
    )


def test_migrate_is_a_class_method_of_three_arguments() -> None:
    with pytest.raises(HandlerError) as raised:

        class Plain(Old):
            def migrate(self, version: int, state: str | None, fields: Any) -> Any:  # type: ignore[override]  # of Plain
                return state, fields

    assert str(raised.value) == (
        "Plain.migrate must be a class method, because it is called for a request that has no handler yet: write "
        f"@classmethod, then def migrate(cls, version, state, fields) ({line_of('# of Plain')})"
    )
    with pytest.raises(
        HandlerError, match=r"Few.migrate is called with \(cls, version, state, fields\), but takes other"
    ):

        class Few(Old):
            @classmethod
            def migrate(cls, version: int) -> Any:  # type: ignore[override]
                return version

    with pytest.raises(HandlerError, match=r"^\S+Waits.migrate is async def, but is called as a plain function"):

        class Waits(Old):
            @classmethod
            async def migrate(cls, *given: Any) -> Any:  # type: ignore[override]
                return given
