"""What a dispatch policy is, and the registry that finds one by its name.

A policy decides where the steps of a request run. It is asked to make the `Resumable` that the loop will step, and,
where it can, to take a whole request over. The loop, the table, the limits and the deadlines are the same under every
policy.

An outside package registers one under the entry point group `reqtable.dispatch`; its value is a subclass of `Policy`.
"""

from __future__ import annotations

import inspect
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, get_origin

from reqtable.config import ARGUMENT, DEFAULT
from reqtable.handlers.resumable import ResumableHandler
from reqtable.net.datagram import Session
from reqtable.net.pktinfo import Datagram
from reqtable.net.preamble import Opening, Preface, stream_over
from reqtable.net.stream import send_at_once
from reqtable.net.transports import Lent
from reqtable.table.errors import ConfigurationError, HandlerError
from reqtable.table.places import owner_of, place_of
from reqtable.table.snapshot import handler_name, unwrapped
from reqtable.table.table import Entry, Resumable
from reqtable.table.wants import NOTHING, Call, HandOff, Want

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from reqtable.dispatch.forking.child import Forked
    from reqtable.dispatch.policy_set import Dispatcher
    from reqtable.server.engine import Engine

_WILDCARDS = ("", "0.0.0.0", "::")
# Where those hooks of a server are defined that make a handler by calling its class.
_DEFAULT_HOOKS = {"socketserver", "reqtable.server.base", "reqtable.server.mixins", "reqtable.server.classes"}

# By their places, because each of them imports this module.
_BUILT_IN = {
    "inline": "reqtable.dispatch.policies.inline:Inline",
    "greenlet": "reqtable.dispatch.policies.greenlet:Greenlet",
    "thread": "reqtable.dispatch.policies.thread:Thread",
    "pool": "reqtable.dispatch.policies.pool:Pool",
    "fork": "reqtable.dispatch.policies.fork:Fork",
    "executor": "reqtable.dispatch.policies.executor:Executor",
}


class Policy(ABC):
    """Where the steps of the requests of one server run. `name` is what `dispatch=` calls it.

    Its constructor raises ConfigurationError for a configuration that it can't work with.
    """

    name: ClassVar[str]
    steps_on_loop: ClassVar[bool] = True  # handlers run in the loop's own thread

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher

    @property
    def engine(self) -> Engine:
        """The loop whose table the requests are in."""
        return self.dispatcher.server._engine  # type: ignore[no-any-return]

    @classmethod
    def check(cls, handler_class: Any) -> None:
        """Raise ConfigurationError where handlers of that class can't run under this policy, with the reason."""

    @classmethod
    def check_step(cls, handler_class: Any) -> None:
        """The same for a single step, which `@state(dispatch=…)` pins to this policy."""
        cls.check(handler_class)

    @abstractmethod
    def blocking(self, entry: Entry, lent: Lent) -> Resumable:
        """What runs a blocking handler: somewhere in it, `run_blocking.run(entry, lent)`."""

    def resumable(self, entry: Entry, handler: Any) -> Resumable:
        """What runs a resumable handler; the handler itself where its steps run on the loop."""
        return self.stepping(entry, handler)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        """What runs single steps of a resumable handler while the loop does the I/O."""
        return handler  # type: ignore[no-any-return]

    def take_over(self, entry: Entry) -> Want[Any]:
        """Take over the rest of a request. Returns what the entry waits for until it is done."""
        raise ConfigurationError(f"policy {self.name!r} can't take over a request: hand it off to 'thread' or 'fork'")

    def returned(self, entry: Entry, child: Forked | None) -> Want[Any] | None:
        """A blocking handler has returned, in the loop: done, unless a child that it forked has the rest of it."""
        if child is None:
            return None
        entry.begin_call()
        return self.dispatcher.forking.adopt(entry, child)

    def wait(self) -> None:
        """Wait until the requests that it has taken over have ended."""

    def let_go(self) -> None:
        """Those that have not ended go on by themselves."""

    def close(self, wait: bool) -> None:
        """Give back what the policy holds; with `wait`, steps that are out end first."""

    def abandon(self) -> None:
        """In a forked child: give up what was the parent's, without touching what the parent still uses."""

    # -- what an entry and the loop call ------------------------------------------------------------------------------

    def begin_call(self, entry: Entry, want: Call[Any]) -> Callable[[], Any]:
        return self.dispatcher.begin_call(entry, want)

    def admitted(self) -> None:
        self.dispatcher.requests += 1

    def released(self) -> None:
        self.dispatcher.ended()

    def hand_off(self, entry: Entry, want: HandOff) -> Want[Any]:
        return self.dispatcher.policy(want.policy).take_over(entry)

    # -- entering the table -------------------------------------------------------------------------------------------

    def open(self, server: Any, request: Any, client_address: Any, preface: Preface) -> None:
        """Enter a request into the table that something has to come before; `admit` goes on with it."""
        opening = Opening(self.engine, request, preface)
        opening.entry = self._entry(server, request, client_address, opening)
        self.engine.open_request(opening)

    def admit(self, server: Any, request: Any, client_address: Any) -> None:
        """Enter a request into the table and run its first steps. Raises what the handler's constructor raises."""
        make = self._admit_resumable if is_resumable(server.RequestHandlerClass) else self._admit_blocking
        self.engine.begin(make(server, request, client_address))

    def secured(self, entry: Entry, request: Any, context: Any) -> Any:
        """The TLS socket of a request whose handshake is about to be done."""
        own = is_resumable(entry.server.RequestHandlerClass)
        return context.wrap_socket(
            request, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=not own
        )

    def lend(self, request: Any) -> Lent:
        """The transport of a blocking handler's request."""
        return Lent(self.engine, request)

    def _admit_resumable(self, server: Any, request: Any, client_address: Any) -> Entry:
        session: Session | None = None
        if isinstance(request, tuple):
            session = Session(self.engine, request)
            entry = self._entry(server, request, client_address, session)
        else:
            stream = stream_over(self.engine, request)
            entry = stream.entry = self._entry(server, request, client_address, stream)
        entry.handler = handler = server.RequestHandlerClass(entry)
        if getattr(handler, "entry", None) is None:
            name, place = type(handler).__name__, place_of(type(handler).__init__)
            raise HandlerError(f"{name}.__init__ does not call super().__init__(entry) ({place})")
        entry.resumable = self.dispatcher.resumable(entry, handler, self)
        if session is not None:
            session.attach(entry)
        return entry

    def _admit_blocking(self, server: Any, request: Any, client_address: Any) -> Entry:
        if isinstance(request, socket.socket):
            send_at_once(request)  # http.server writes the headers and the body of an answer one after the other
        lent = self.lend(request)
        entry = lent.entry = self._entry(server, request, client_address, lent)
        entry.resumable = self.blocking(entry, lent)
        return entry

    def _entry(self, server: Any, request: Any, client_address: Any, transport: Any) -> Entry:
        """The entry of a request: a new one, unless it has been opened."""
        engine = self.engine
        entry = engine.entry_of(request)
        if entry is not None:
            entry.transport = transport
            entry.want = NOTHING
            return entry
        local = server.server_address
        if isinstance(local, tuple) and local[0] in _WILDCARDS:  # which of the machine's addresses did it come to?
            if type(request) is Datagram:
                local = request.local
            elif not isinstance(request, tuple):
                local = _same(transport.request.getsockname())
        if isinstance(client_address, tuple) and client_address and isinstance(client_address[0], str):
            client_address = (_same(client_address[0]), *client_address[1:])
        return Entry(engine.table, server, self, client_address, local, transport)


@lru_cache(maxsize=4096)
def _same(thing: Any) -> Any:
    """One for all that are equal: the entries of one host, or at one address of the machine, need not have its own."""
    return thing


def is_resumable(handler_class: Any) -> bool:
    """Whether a handler class, or a `functools.partial` of one, is a state or an async handler."""
    handler_class = unwrapped(handler_class)
    return isinstance(handler_class, type) and issubclass(handler_class, ResumableHandler)


def check_servable(handler_class: Any, server: Any = None) -> None:
    """Raise ConfigurationError where no request can be served by that handler class, with the reason.

    As in `socketserver`, what makes a blocking handler may be any function, which nobody looks into, and is the
    server's own matter where that has a `finish_request` or a `process_request` of its own.
    """
    own = unwrapped(handler_class)
    generic = get_origin(own)
    if is_resumable(generic):
        raise ConfigurationError(f"{own!r} is no handler class, but a hint for type checkers: give {generic.__name__}")
    if is_resumable(own):
        if (unfit := own._unfit()) is not None:
            raise ConfigurationError(unfit)
        _check_call(handler_class, ("entry",), own._begins_in)
    elif not _makes_handlers_itself(server):
        if not callable(own):
            raise ConfigurationError(
                f"{own!r} is no handler class: give a class that is derived from reqtable.StateRequestHandler, "
                "AsyncRequestHandler or BaseRequestHandler"
            )
        if isinstance(own, type):
            _check_call(handler_class, ("request", "client_address", "server"), "setup()")
            handle = getattr(own, "handle", None)
            if inspect.iscoroutinefunction(handle):
                raise ConfigurationError(
                    f"{handler_name(own)}.handle is a coroutine, and nothing awaits that of a blocking handler: derive "
                    f"{handler_name(own)} from reqtable.AsyncRequestHandler ({place_of(handle)})"
                )


def _check_call(handler_class: Any, given: tuple[str, ...], begins_in: str) -> None:
    """Raise ConfigurationError where a handler can't be made by a call with what it is given."""
    try:
        signature = inspect.signature(handler_class)
    except (TypeError, ValueError):  # of a class written in C, perhaps
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        own = unwrapped(handler_class)
        place = place_of(vars(owner_of(own, "__init__"))["__init__"])
        raise ConfigurationError(
            f"{handler_name(own)} can't be called with ({', '.join(given)}): {error}: a handler has no parameters of "
            f"its own: declare fields in the class, as in words: int = 0, and prepare them in {begins_in} ({place})"
        ) from None


def _makes_handlers_itself(server: Any) -> bool:
    hooks = [getattr(type(server), name, None) for name in ("finish_request", "process_request")]
    return any(hook is not None and getattr(hook, "__module__", None) not in _DEFAULT_HOOKS for hook in hooks)


def policy_names() -> list[str]:
    """The names that `dispatch=` knows."""
    return sorted({*_BUILT_IN, *(each.name for each in _entry_points())})


def _entry_points() -> Iterable[EntryPoint]:
    from importlib.metadata import entry_points  # slow to import, and seldom needed

    return entry_points(group="reqtable.dispatch")


def policy_named(name: str) -> type[Policy]:
    """The policy of that name. Raises ConfigurationError where there is none, or where it can't be imported."""
    try:
        if name in _BUILT_IN:
            module, _, attribute = _BUILT_IN[name].partition(":")
            policy = getattr(import_module(module), attribute)
        else:
            found = [each for each in _entry_points() if each.name == name]
            policy = found[0].load() if found else None
    except ImportError as error:
        raise ConfigurationError(f"dispatch policy {name!r} can't be used here: {error}") from error
    if policy is None:
        raise ConfigurationError(f"there is no dispatch policy {name!r}; there are {', '.join(policy_names())}")
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise ConfigurationError(f"dispatch policy {name!r} is {policy!r}, not a subclass of reqtable.dispatch.Policy")
    return policy


def check_policy(name: str, origin: str) -> None:
    """Raise ConfigurationError where there is no policy of that name; it says where the name came from."""
    try:
        policy_named(name)
    except ConfigurationError as error:
        if origin in (ARGUMENT, DEFAULT):
            raise
        raise ConfigurationError(f"{origin}: {error}") from error
