"""`StateRequestHandler`: a request as an explicit state machine.

A state is a method; `@state(want, timeout=…)` says what the state waits for and how long. The engine calls the method
with the item that the want gave. The method returns a transition:

    self.name             go to that state, which waits for the want that it declares
    self.name, want       go to that state, which waits for `want`
    None                  done: the engine sends the remaining output, then closes the connection

The whole request is data: the name of its state, its declared fields, unread input, unsent output, current want.
"""

from __future__ import annotations

import inspect
import logging
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any, ClassVar, NamedTuple, TypeVar

from reqtable.handlers.discarded import refuse_discarded
from reqtable.handlers.resumable import ResumableHandler, check_called, log
from reqtable.handlers.successors import successors
from reqtable.table.addresses import address_text
from reqtable.table.arguments import check_timeout
from reqtable.table.errors import HandlerError, IncompleteRead, InvalidTransition, LimitExceeded, TimedOut
from reqtable.table.places import functions_in, owner_of, place_of
from reqtable.table.table import Entry
from reqtable.table.wants import NOTHING, Want

F = TypeVar("F", bound=Callable[..., Any])

Transition = Any  # a state, (a state, a want), or None: `_follow` checks it


@dataclass(frozen=True, slots=True)
class Declaration:
    """Holds the arguments of `@state`. The decorated function has it as its attribute `declaration`."""

    name: str
    want: Want[Any]
    timeout: float | None
    dispatch: str | None
    function: Callable[[Any, Any], Transition]  # the method, or what another decorator made of it


class StateInfo(NamedTuple):
    """Describes a state. `successors` are the names of the states that may follow, and None if the request may end."""

    name: str
    want: str
    timeout: float | None
    dispatch: str | None
    successors: tuple[str | None, ...]
    initial: bool
    doc: str


def state(want: Want[Any] = NOTHING, *, timeout: float | None = None, dispatch: str | None = None) -> Callable[[F], F]:
    """Declare a method to be a state that waits for `want`, at most `timeout` seconds (None: as the server allows).

    `dispatch` names the policy under which the state runs. Raises TypeError or ValueError for a wrong argument, and
    HandlerError if anything but a plain method is decorated.
    """
    if not isinstance(want, Want):
        raise TypeError(f"@state takes a want, as in @state(line()), not {want!r}")
    if timeout is not None:
        check_timeout(timeout)
    if dispatch is not None and not isinstance(dispatch, str):
        raise TypeError(f"dispatch must be the name of a policy, such as 'pool', not {dispatch!r}")

    def declare(function: F) -> F:
        if not isinstance(function, FunctionType):
            raise HandlerError(
                f"@state decorates a {type(function).__name__}: a state is a plain method ({place_of(function)})"
            )
        check_called(function, ("self", "item"))
        function.declaration = Declaration(function.__name__, want, timeout, dispatch, function)  # type: ignore[attr-defined]
        return function

    return declare


class StateRequestHandler(ResumableHandler):
    """Serves a request with methods that are its states. Class annotations declare its fields, which are plain data."""

    _hooks: ClassVar[dict[str, tuple[str, ...]]] = {
        "start": ("self",),
        "on_timeout": ("self",),
        "on_eof": ("self", "partial"),
        "on_limit": ("self", "error"),
        "on_error": ("self", "error"),
        "on_close": ("self",),
    }

    _begins_in: ClassVar[str] = "start()"

    _initial: ClassVar[str] = ""

    # The attributes that are no data, each with what to say of a request that has one: it can't be recorded.
    _no_data: ClassVar[Mapping[str, str]] = {}

    _example: ClassVar[str] = "name"  # the state that messages about transitions name

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise HandlerError if a state has a name that every handler uses, or is overridden by what is no state."""
        for name in sorted(_meant_as_states(cls)):
            _check_state(cls, name)
        super().__init_subclass__(**kwargs)
        refuse_discarded(cls, StateRequestHandler)
        declared = cls._declared()
        cls._initial = next(iter(declared), "")
        cls._example = cls._initial or "name"
        cls._pinned = {name: each.dispatch for name, each in declared.items() if each.dispatch}

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self._state = _START  # shared by requests: a bound method would cost each one 64 bytes
        self._ended = False

    # -- for the handler's author -------------------------------------------------------------------------------------

    def start(self) -> Transition:
        """Begin the request; may return a transition. The default goes to the first state declared."""
        if not self._initial:
            raise HandlerError(str(self._unfit()))
        return getattr(self, self._initial)

    send = ResumableHandler._send

    def on_timeout(self) -> Transition:
        """Handle the timeout of the state. May return a transition; the default closes."""
        return None

    def on_eof(self, partial: bytes) -> Transition:
        """Handle end of file before the state's item was complete; `partial` had arrived. The default closes."""
        return None

    def on_limit(self, error: LimitExceeded) -> Transition:
        """Handle input beyond the want's limit. The default closes the connection, with one line in the log.

        The input is still unread. To go on, go to a state that takes it: whole with `skip_line()`, or in parts with
        `chunk()`. A handler that waits for the same want again ends with HandlerError: else this would repeat for ever.
        """
        raise error

    def on_error(self, error: Exception) -> Transition:
        """Handle `error`, which a step or a `call` raised. The default reports it to the server's `handle_error`."""
        raise error

    @classmethod
    def states(cls) -> list[StateInfo]:
        """Return the states in the order of declaration. Their successors are read from the methods' code."""
        declared = cls._declared()
        return [
            StateInfo(
                name,
                repr(declaration.want),
                declaration.timeout,
                declaration.dispatch,
                successors(cls, name, set(declared)),
                name == cls._initial,
                (getattr(cls, name).__doc__ or "").partition("\n")[0].strip(),
            )
            for name, declaration in declared.items()
        ]

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the declared fields: annotations, mix-ins' included, that are neither ClassVar nor underscored."""
        return list(cls._fields)

    def fields(self) -> dict[str, Any]:
        """Return the values of the declared fields that are set."""
        return {name: getattr(self, name) for name in self.field_names() if hasattr(self, name)}

    @property
    def state_name(self) -> str:
        """The name of the current state; "start" before the first."""
        return self._state.name

    @classmethod
    def _unfit(cls) -> str | None:
        if cls._initial or cls.start is not StateRequestHandler.start:
            return None
        return f"{cls.__name__} declares no state: put @state(line()) before a method ({place_of(cls)})"

    # -- for the engine -----------------------------------------------------------------------------------------------

    def _where(self) -> tuple[str | None, str | None]:
        """Return the name of the current state, and `file:line` of its method."""
        current = self._state
        return current.name, _place_of(self.start if current is _START else current.function)

    def _save(self) -> tuple[str | None, dict[str, Any], bool]:
        """Return the request as data: the name of its state, its fields, and whether `on_eof` was called."""
        return None if self._state is _START else self.state_name, self.fields(), self._ended

    def _restore(self, saved: tuple[str | None, dict[str, Any], bool]) -> None:
        """Restore what `_save` returned."""
        name, fields, self._ended = saved
        for field in self.field_names():
            if field in fields:
                setattr(self, field, fields[field])
            elif field in vars(self):
                delattr(self, field)
        self._state = _START if name is None else _declaration_of(getattr(type(self), name))
        self.entry.timeout = self._state.timeout  # the whole timeout of that state

    @classmethod
    def _declared(cls) -> dict[str, Declaration]:
        """Return the states in the order of their first declaration, those of the bases first."""
        names = [name for base in reversed(cls.__mro__) for name, value in vars(base).items() if _is_state(value)]
        return {name: getattr(cls, name).declaration for name in names}

    def _first(self, item: None) -> Transition:
        return self.start()

    def _resume(self, item: Any) -> Want[Any] | None:
        current = self._state
        try:
            transition = current.function(self, item)
        except Exception as error:
            if type(error) is TypeError:
                self._explain(error)
            return self._throw(error)
        if type(transition) is MethodType and transition.__self__ is self:  # fast path of _follow
            function = transition.__func__
            if function is current.function:
                return current.want
            declaration: Declaration | None = getattr(function, "declaration", None)
            if declaration is not None and function is declaration.function:
                self._state = declaration
                self.entry.timeout = declaration.timeout
                return declaration.want
        if type(transition) is tuple and len(transition) == 2:  # fast path of _follow
            target, want = transition
            if type(target) is MethodType and target.__self__ is self and isinstance(want, Want):
                function = target.__func__
                declaration = getattr(function, "declaration", None)
                if declaration is not None and function is declaration.function:
                    self._state = declaration
                    self.entry.timeout = declaration.timeout
                    return want
        return self._follow(transition, current.function)

    def _throw(self, error: BaseException) -> Want[Any] | None:
        if getattr(error, "connection", None) is not None:
            pass  # of another connection than the client's
        elif isinstance(error, TimedOut):
            return self._follow(self.on_timeout(), self.on_timeout)
        elif isinstance(error, IncompleteRead):
            if self._ended:
                return None  # on_eof was called already: no more input can come
            self._ended = True
            return self._follow(self.on_eof(error.partial), self.on_eof)
        elif isinstance(error, LimitExceeded):
            return self._follow(self.on_limit(error), self.on_limit)
        if isinstance(error, Exception):
            return self._follow(self.on_error(error), self.on_error)
        raise error

    def _close(self) -> None:
        self.on_close()

    def _follow(self, transition: Transition, by: Callable[..., Any]) -> Want[Any] | None:
        """Take the transition that `by` returned, and return the next want. Raises InvalidTransition if it is none."""
        if transition is None:
            if log.isEnabledFor(logging.DEBUG):
                self._log_end(by)
            return None
        self._state, want = self._checked(transition, by)
        self.entry.timeout = self._state.timeout
        return want

    def _checked(self, transition: Transition, by: Callable[..., Any]) -> tuple[Declaration, Want[Any]]:
        """Return the state and the want of the transition that `by` returned. Raises InvalidTransition."""
        target = transition
        want = None
        if type(transition) is tuple and len(transition) == 2:
            target, want = transition
        declaration = getattr(target, "declaration", None)  # a bound method passes this on to its function
        if type(target) is not MethodType or target.__self__ is not self or type(declaration) is not Declaration:
            name, place = self._source_of(by)
            raise InvalidTransition(f"{name} returned {self._cure(transition, target)} ({place})")
        if want is None:
            want = declaration.want
        elif not isinstance(want, Want):
            name, place = self._source_of(by)
            raise InvalidTransition(
                f"{name} returned {reprlib.repr(want)} as the want of {declaration.name}: "
                f"return a want, such as line() or exactly(n) ({place})"
            )
        return _declaration_of(target.__func__), want

    def _log_end(self, by: Callable[..., Any]) -> None:
        """Log the method that ended the request: its author may have forgotten a `return`. Defaults aren't logged."""
        name = self._name_of(by)
        default = getattr(StateRequestHandler, name, None)
        if default is None or getattr(type(self), name) is not default:
            log.debug("%s: %s returned None: done (%s)", address_text(self.entry.peer), *self._source_of(by))

    def _name_of(self, by: Callable[..., Any]) -> str:
        return "start" if by is _START.function else by.__name__

    def _source_of(self, by: Callable[..., Any]) -> tuple[str, str]:
        """Return the name of the method that returned a transition, and where it is defined."""
        name = self._name_of(by)
        return f"{type(self).__name__}.{name}", place_of(getattr(type(self), name, by))

    def _cure(self, transition: Any, target: Any) -> str:
        """Say what is wrong with a transition to `target`, and what to return instead."""
        own = isinstance(target, MethodType) and target.__self__ is self
        if own:
            return f"self.{target.__name__}, which has no @state: put @state(…) before it at {place_of(target)}"
        if isinstance(target, MethodType | FunctionType) and hasattr(target, "declaration"):
            return f"{target.__qualname__}, which is not this request's: return self.{target.__name__}"
        if isinstance(target, Want):
            state = transition[1] if target is not transition else None
            name = getattr(state, "__name__", self._example)
            return f"{target!r} in place of a state: return self.{name}, {target!r}"
        if isinstance(target, str) and target in self._declared():
            return f"the string {target!r}: return self.{target}"
        if inspect.iscoroutine(target):
            target.close()
            return f"a coroutine: a state can't await, so {self._awaiting}"
        return f"{reprlib.repr(transition)}: return {self._returns()}"

    def _returns(self) -> str:
        """Say what a step returns."""
        return f"a state of this handler (self.{self._example}), a pair of a state and a want, or None"

    def _explain(self, error: TypeError) -> None:
        """Add a note to `error` if a state was called instead of returned."""
        callee, missing, _ = str(error).partition("() missing ")
        name = callee.rpartition(".")[2]
        if missing and name in self._declared():
            error.add_note(
                f"self.{name}() runs that state at once, without its item: return self.{name}, and the engine runs "
                "it with the item of its want"
            )


_place_of = lru_cache(maxsize=1024)(place_of)

_START = Declaration("start", NOTHING, None, None, StateRequestHandler._first)


def _declaration_of(function: Any) -> Declaration:
    """Return the declaration of a state. A decorator's wrapper copies that of the method, but itself is called."""
    declaration: Declaration = function.declaration
    return declaration if declaration.function is function else replace(declaration, function=function)


def _is_state(value: Any) -> bool:
    return isinstance(value, FunctionType) and hasattr(value, "declaration")


def _meant_as_states(cls: type) -> set[str]:
    """Return the names of all methods that `@state` decorates in `cls` or its bases, even if they lost it again."""
    return {
        name
        for base in cls.__mro__
        for name, value in vars(base).items()
        for function in functions_in(value)
        if hasattr(function, "declaration") and (function is value or function.declaration.name == name)
    }


def _check_state(cls: type, name: str) -> None:
    """Raise HandlerError if the attribute `name` of `cls` is not a state, or if every handler uses that name."""
    if hasattr(StateRequestHandler, name):
        raise HandlerError(
            f"{cls.__name__}.{name}: StateRequestHandler has a {name} of its own: rename the state "
            f"({place_of(getattr(cls, name))})"
        )
    owner = owner_of(cls, name)
    assert owner is not None
    value = vars(owner)[name]
    if _is_state(value):
        return
    full_name = f"{owner.__name__}.{name}"
    overridden = next((base for base in cls.__mro__ if _is_state(vars(base).get(name))), None)
    if overridden is None:
        raise HandlerError(
            f"{full_name} has lost its @state to another decorator: put @state(…) above the other, or have the other "
            f"return a function with functools.wraps ({place_of(value)})"
        )
    want = vars(overridden)[name].declaration.want
    if isinstance(value, FunctionType):
        mend, place = f"put @state({want!r}) before it", place_of(value)
    else:
        mend, place = "override the state with a method that has @state, or rename this attribute", place_of(owner)
    raise HandlerError(
        f"{full_name} is not a state, but overrides the state {overridden.__name__}.{name}: {mend} ({place})"
    )
