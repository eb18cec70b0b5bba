"""What a dispatch policy is, and the registry that finds one by its name.

A policy decides where the steps of a request run. It is asked one thing: to make the `Resumable` that the loop will
step. The loop, the table, the limits and the deadlines are the same under every policy.

An outside package registers one under the entry point group `reqtable.dispatch`; its value is a subclass of `Policy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from reqtable.core.errors import ConfigurationError, HandlerError
from reqtable.core.table import Entry, Resumable, unwrapped
from reqtable.core.wants import Call, Failure
from reqtable.engine.datagram import Session
from reqtable.engine.stream import Stream
from reqtable.engine.transports import Lent
from reqtable.handlers.resumable import ResumableHandler

if TYPE_CHECKING:
    from reqtable.engine.engine import Engine

_WILDCARDS = ("", "0.0.0.0", "::")

# Imported when first asked for: a policy's dependencies are its own.
_BUILT_IN = {
    "inline": "reqtable.dispatch.inline:Inline",
    "greenlet": "reqtable.dispatch.greenlet:Greenlet",
}


class Policy(ABC):
    """Where the steps of the requests of one engine run. `name` is what `dispatch=` calls it."""

    name: ClassVar[str]

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._calls: ThreadPoolExecutor | None = None

    def admit(self, server: Any, request: Any, client_address: Any) -> None:
        """Enter a request into the table and run its first steps. Raises what the handler's constructor raises."""
        make = self._admit_resumable if is_resumable(server.RequestHandlerClass) else self._admit_blocking
        self.engine.begin(make(server, request, client_address))

    @classmethod
    def check(cls, handler_class: Any) -> None:
        """Raise ConfigurationError where handlers of that class can't run under this policy, with the reason."""

    @abstractmethod
    def blocking(self, entry: Entry, lent: Lent) -> Resumable:
        """What runs a blocking handler: somewhere in it, `server.finish_request(lent.request, entry.peer)`."""

    def begin_call(self, entry: Entry, want: Call[Any]) -> None:
        """Run what a `call` asks for and post its result to the entry. Raises ConfigurationError for a bad `on`."""
        if want.on not in (None, "thread"):
            raise ConfigurationError(f'call(on={want.on!r}): there is no such executor; there is "thread"')
        if self._calls is None:
            self._calls = ThreadPoolExecutor(self.engine.limits.calls_max, thread_name_prefix="reqtable-call")
        future = self._calls.submit(want.fn, *want.args, **want.kwargs)
        number = entry.calls

        def post(done: Future[Any]) -> None:
            if not done.cancelled():
                self.engine.post(self.engine.deliver, entry, number, _outcome(want, done))

        future.add_done_callback(post)

    def close(self) -> None:
        """Give back what the policy holds. Calls that are running are not waited for."""
        if self._calls is not None:
            self._calls.shutdown(wait=False, cancel_futures=True)
            self._calls = None

    def lend(self, request: Any) -> Lent:
        """The transport of a blocking handler's request."""
        return Lent(self.engine, request)

    def _admit_resumable(self, server: Any, request: Any, client_address: Any) -> Entry:
        session: Session | None = None
        if isinstance(request, tuple):
            session = Session(self.engine, request)
            entry = self._entry(server, client_address, session)
        else:
            stream = Stream(self.engine, request)
            entry = stream.entry = self._entry(server, client_address, stream)
        entry.handler = entry.resumable = server.RequestHandlerClass(entry)
        if session is not None:
            session.attach(entry)
        return entry

    def _admit_blocking(self, server: Any, request: Any, client_address: Any) -> Entry:
        lent = self.lend(request)
        entry = lent.entry = self._entry(server, client_address, lent)
        entry.resumable = self.blocking(entry, lent)
        return entry

    def _entry(self, server: Any, client_address: Any, transport: Any) -> Entry:
        local = server.server_address
        if isinstance(local, tuple) and local[0] in _WILDCARDS and not isinstance(transport.request, tuple):
            local = transport.request.getsockname()  # which of the machine's addresses it came to
        return Entry(self.engine.table, server, self, client_address, local, transport)


def _outcome(want: Call[Any], done: Future[Any]) -> Any:
    error = done.exception()
    if error is None:
        return done.result()
    if not isinstance(error, Exception):  # a SystemExit, say: it ended the call, and shall not end the server
        error = HandlerError(f"{want!r} raised {error!r}")
    return Failure(error)


def is_resumable(handler_class: Any) -> bool:
    """Whether a handler class, or a `functools.partial` of one, is a state or an async handler."""
    handler_class = unwrapped(handler_class)
    return isinstance(handler_class, type) and issubclass(handler_class, ResumableHandler)


def policy_names() -> list[str]:
    """The names that `dispatch=` knows."""
    return sorted({*_BUILT_IN, *(each.name for each in entry_points(group="reqtable.dispatch"))})


def policy_named(name: str) -> type[Policy]:
    """The policy of that name. Raises ConfigurationError where there is none, or where it can't be imported."""
    try:
        if name in _BUILT_IN:
            module, _, attribute = _BUILT_IN[name].partition(":")
            policy = getattr(import_module(module), attribute)
        else:
            found = [each for each in entry_points(group="reqtable.dispatch") if each.name == name]
            policy = found[0].load() if found else None
    except ImportError as error:
        raise ConfigurationError(f"dispatch policy {name!r} can't be used here: {error}") from error
    if policy is None:
        raise ConfigurationError(f"there is no dispatch policy {name!r}; there are {', '.join(policy_names())}")
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise ConfigurationError(f"dispatch policy {name!r} is {policy!r}, not a subclass of reqtable.dispatch.Policy")
    return policy
