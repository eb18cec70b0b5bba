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
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from types import FunctionType, MethodType
from typing import Any, ClassVar

from reqtable.handlers.declaration import (
    BY_TRANSITION,
    Declaration,
    StateInfo,
    check_state,
    declaration_of,
    is_state,
    meant_as_states,
    why_no_state,
)
from reqtable.handlers.discarded import refuse_discarded
from reqtable.handlers.finding import Finding
from reqtable.handlers.migration import check_migration, check_saved, migrated
from reqtable.handlers.resumable import ResumableHandler, log
from reqtable.handlers.successors import named_with_a_want, successors
from reqtable.handlers.transition import Transition
from reqtable.table.addresses import address_text
from reqtable.table.errors import HandlerError, IncompleteRead, InvalidTransition, LimitExceeded, TimedOut
from reqtable.table.places import place_of
from reqtable.table.table import Entry
from reqtable.table.want import Want
from reqtable.table.wants import NOTHING


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

    # The version of the states and the fields. A program that changes them raises it, and writes `migrate`.
    state_version: ClassVar[int] = 1  # raise it when fields or states change, and define `migrate`

    _begins_in: ClassVar[str] = "start()"

    _initial: ClassVar[str] = ""

    _kept: ClassVar[tuple[str, ...]] = ()  # the attributes that a record has, although they are no fields

    # The attributes that are no data, each with what to say of a request that has one: it can't be recorded.
    _no_data: ClassVar[Mapping[str, str]] = {}

    # The names of its attributes that are no fields, and that another process has or makes by itself.
    _not_fields: ClassVar[frozenset[str]] = frozenset({"entry", "_state", "_ended", "_entered_at"})

    _savable: ClassVar[frozenset[str]] = frozenset()  # the names of all attributes that a record has or may leave out

    _example: ClassVar[str] = "name"  # the state that messages about transitions name

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise HandlerError if a state has a name that every handler uses, or is overridden by what is no state."""
        for name in sorted(meant_as_states(cls)):
            check_state(cls, name, StateRequestHandler)
        super().__init_subclass__(**kwargs)
        refuse_discarded(cls, StateRequestHandler)
        check_migration(cls, StateRequestHandler)
        declared = cls._declared()
        cls._initial = next(iter(declared), "")
        cls._example = cls._initial or "name"
        cls._savable = frozenset({*cls._fields, *cls._kept, *cls._not_fields, *cls._no_data, *_cached_in(cls)})
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
        first: Transition = getattr(self, self._initial)
        return first

    send = ResumableHandler._send
    """Queue bytes for the client; the request need not wait. Raises LimitExceeded above `output_bytes_max`."""

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
    def migrate(
        cls,
        version: int,  # noqa: ARG003  # a class has its own
        state: str | None,
        fields: dict[str, Any],
    ) -> tuple[str | None, dict[str, Any]]:
        """Return the state and the fields of a request that comes from code of another `version`, for this code.

        `state` is the name of its state, and `fields` has its fields by name. The request still waits for the same
        want, until its next transition.
        """
        return state, fields

    @classmethod
    def states(cls) -> list[StateInfo]:
        """Return the states in the order of declaration. Their successors are read from the methods' code."""
        declared = cls._declared()
        by_transition = named_with_a_want(cls, set(declared))
        return [
            StateInfo(
                name,
                BY_TRANSITION if declaration.want is NOTHING and name in by_transition else repr(declaration.want),
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
    def _unfit(cls) -> Finding | None:
        if cls._initial or cls.start is not StateRequestHandler.start:
            return None
        text = f"{cls.__name__} declares no state"
        return Finding("no-state", place_of(cls), text, "put @state(line()) before a method")

    @classmethod
    def _entered(cls) -> set[str]:
        """Return the names of the states that a request enters though no method of the author's names them."""
        return {cls._initial} if cls.start is StateRequestHandler.start else set()

    # -- for the engine -----------------------------------------------------------------------------------------------

    def _where(self) -> tuple[str | None, str | None]:
        """Return the name of the current state, and `file:line` of its method."""
        current = self._state
        return current.name, _place_of(type(self).start if current is _START else current.function)

    def _save(self) -> tuple[str | None, dict[str, Any], bool]:
        """Return the request as data: the name of its state, its fields, and whether `on_eof` was called."""
        fields, own = self.fields(), vars(self)
        for name in self._kept:
            if name in own:
                fields[name] = own[name]
        return None if self._state is _START else self._state.name, fields, self._ended

    def _undeclared(self) -> str | None:
        """Return what is wrong with an attribute that a record would not have; None if there is none."""
        if vars(self).keys() <= self._savable:  # the common case
            return None
        lost = min(vars(self).keys() - self._savable)
        cure = "annotate it in the class" if lost[0] != "_" else "a field is annotated, and begins with no underscore"
        return f"{type(self).__name__}.{lost} is not a declared field, and would be lost: {cure}"

    def _restore(self, saved: tuple[str | None, dict[str, Any], bool], made_at: float) -> None:
        """Restore what `_save` returned at the time `made_at`, by the clock of its table now."""
        name, fields, self._ended = saved
        for field in (*self._fields, *self._kept):
            if field in fields:
                setattr(self, field, fields[field])
            elif field in vars(self):
                delattr(self, field)
        self._state = _START if name is None else declaration_of(getattr(type(self), name))
        self.entry.timeout = self._state.timeout  # the whole timeout of that state

    @classmethod
    def _migrates(cls) -> bool:
        """Return whether the class has its own `migrate`."""
        return getattr(cls.migrate, "__func__", None) is not StateRequestHandler.migrate.__func__  # type: ignore[attr-defined]

    _migrated = classmethod(migrated)
    _check_saved = classmethod(check_saved)

    @classmethod
    def _declared(cls) -> dict[str, Declaration]:
        """Return the states in the order of their first declaration, those of the bases first."""
        names = [name for base in reversed(cls.__mro__) for name, value in vars(base).items() if is_state(value)]
        return {name: getattr(cls, name).declaration for name in names}

    def _first(self, item: None) -> Transition:
        return self.start()

    def _resume(self, item: Any) -> Want[Any] | None:
        current = self._state
        try:
            transition = current.function(self, item)
        except Exception as error:
            return self._raised(error)
        if type(transition) is MethodType and transition.__self__ is self:  # fast path of _follow
            function = transition.__func__
            if function is current.function:
                return current.want
            declaration: Declaration | None = getattr(function, "declaration", None)
            if declaration is not None and function is declaration.function:
                self._state = declaration
                self.entry.timeout = declaration.timeout
                return declaration.want
        return self._went(transition, current)

    def _raised(self, error: Exception) -> Want[Any] | None:
        """Handle `error`, which a state has raised, inside the caller's `except` block for it."""
        if type(error) is TypeError:
            self._explain(error)
        return self._throw(error)

    def _went(self, transition: Transition, current: Declaration) -> Want[Any] | None:
        """Take the transition that the state `current` returned, and return the next want."""
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

    def _checked(self, transition: Any, by: Callable[..., Any]) -> tuple[Declaration, Want[Any]]:
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
        return declaration_of(target.__func__), want

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
            return f"self.{target.__name__}, {': '.join(why_no_state(target.__func__))}"
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


def _cached_in(cls: type) -> Iterator[str]:
    """Yield the names whose values a handler works out again when it needs them."""
    for base in cls.__mro__:
        yield from (name for name, value in vars(base).items() if isinstance(value, cached_property))


_place_of = lru_cache(maxsize=1024)(place_of)
_START = Declaration("start", NOTHING, None, None, StateRequestHandler._first)
