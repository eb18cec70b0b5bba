"""`@state`: declares a method to be a state, and checks what a handler class declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple, TypeVar, overload

from reqtable.handlers.discarded import makes_want
from reqtable.handlers.finding import Finding, carrying, refusal
from reqtable.handlers.resumable import check_called
from reqtable.handlers.source import is_ours
from reqtable.handlers.transition import DecoratedByState, DecoratedByStateWithWant, Transition
from reqtable.table.arguments import check_timeout
from reqtable.table.places import caller, functions_in, owner_of, place_of
from reqtable.table.want import Want
from reqtable.table.wants import NOTHING

H = TypeVar("H")  # the handler
T = TypeVar("T")  # the item


@dataclass(frozen=True, slots=True)
class Declaration:
    """Holds the arguments of `@state`. The decorated function has it as its attribute `declaration`."""

    name: str
    want: Want[Any]
    timeout: float | None
    dispatch: str | None
    function: Callable[[Any, Any], Transition]  # the method, or what another decorator made of it


BY_TRANSITION = "by the transition"  # in place of a want: the state declares none, and a transition to it names one


class StateInfo(NamedTuple):
    """Describes a state. `want` is the text of its want, or `by the transition`, which names the want then.

    `successors` are the names of the states that may follow, and None if the request may end.
    """

    name: str
    want: str
    timeout: float | None
    dispatch: str | None
    successors: tuple[str | None, ...]
    initial: bool
    doc: str


@overload
def state(
    *, timeout: float | None = None, dispatch: str | None = None
) -> Callable[[Callable[[H, T], Transition]], Callable[[H, T], DecoratedByState]]: ...
@overload
def state(
    want: Want[T], *, timeout: float | None = None, dispatch: str | None = None
) -> Callable[[Callable[[H, T], Transition]], Callable[[H, T], DecoratedByStateWithWant]]: ...
def state(want: Want[Any] = NOTHING, *, timeout: float | None = None, dispatch: str | None = None) -> Any:
    """Declare a method to be a state that waits for `want`, at most `timeout` seconds (None: as the server allows).

    `dispatch` names the policy under which the state runs. Raises TypeError or ValueError for a wrong argument, and
    HandlerError if anything but a plain method is decorated.
    """
    if not isinstance(want, Want):
        raise _no_want(want)
    if timeout is not None:
        check_timeout(timeout)
    if dispatch is not None and not isinstance(dispatch, str):
        raise TypeError(f"dispatch must be the name of a policy, such as 'pool', not {dispatch!r}")

    def declare(function: Any) -> Any:
        if not isinstance(function, FunctionType):
            raise refusal(
                "state",
                place_of(function),
                f"@state decorates a {type(function).__name__}",
                "a state is a plain method",
            )
        check_called(function, ("self", "item"))
        function.declaration = Declaration(function.__name__, want, timeout, dispatch, function)  # type: ignore[attr-defined]
        return function

    return declare


def _no_want(given: Any) -> TypeError:
    """Return the error about what `@state` was given in place of a want."""
    place = caller()
    text, mend = repr(given), "write @state(line())"
    if makes_want(given):
        text, mend = f"the function {given.__name__}", f"call it, as in @state({given.__name__}(…))"
    elif isinstance(given, FunctionType):  # @state without parentheses
        text = f"the method {given.__name__}"
    return carrying(TypeError, Finding("want", f"{place.file}:{place.line}", f"@state takes a want, not {text}", mend))


def declaration_of(function: Any) -> Declaration:
    """Return the declaration of a state. A decorator's wrapper copies that of the method, but itself is called."""
    declaration: Declaration = function.declaration
    return declaration if declaration.function is function else replace(declaration, function=function)


def is_state(value: Any) -> bool:
    return isinstance(value, FunctionType) and hasattr(value, "declaration")


def why_no_state(function: FunctionType) -> tuple[str, str]:
    """Return why a method can't be returned as a state, as a clause that follows its name, and the mend."""
    name = function.__name__
    if name == "start":
        return "which is called only once, by the server", "return a state"
    if is_ours(function.__module__):
        return "which is no state", "return a state"
    try:
        inspect.signature(function).bind("self", "item")
    except TypeError:
        return "which has no @state", f"call it, as in return self.{name}(…), if it returns a state"
    return "which has no @state", f"put @state(…) before it at {place_of(function)}"


def meant_as_states(cls: type) -> set[str]:
    """Return the names of all methods that `@state` decorates in `cls` or its bases, even if they lost it again."""
    return {
        name
        for base in cls.__mro__
        for name, value in vars(base).items()
        for function in functions_in(value)
        if hasattr(function, "declaration") and (function is value or function.declaration.name == name)
    }


def check_state(cls: type, name: str, common: type) -> None:
    """Raise HandlerError if the attribute `name` of `cls` is not a state, or if `common` has that name, too."""
    if hasattr(common, name):
        text = f"{cls.__name__}.{name}: {common.__name__} has a {name} of its own"
        raise refusal("name", place_of(getattr(cls, name)), text, "rename the state")
    owner = owner_of(cls, name)
    assert owner is not None
    value = vars(owner)[name]
    if is_state(value):
        return
    full_name = f"{owner.__name__}.{name}"
    overridden = next((base for base in cls.__mro__ if is_state(vars(base).get(name))), None)
    if overridden is None:
        raise refusal(
            "lost-state",
            place_of(value),
            f"{full_name} has lost its @state to another decorator",
            "put @state(…) above the other, or have the other return a function with functools.wraps",
        )
    want = vars(overridden)[name].declaration.want
    if isinstance(value, FunctionType):
        mend, place = f"put @state({want!r}) before it", place_of(value)
    else:
        mend, place = "override the state with a method that has @state, or rename this attribute", place_of(owner)
    text = f"{full_name} is not a state, but overrides the state {overridden.__name__}.{name}"
    raise refusal("lost-state", place, text, mend)
